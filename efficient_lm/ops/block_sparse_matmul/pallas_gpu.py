"""The block-sparse product on Hopper GPUs: Mosaic GPU kernels that multiply (wgmma) the kept blocks alone.

Each multiprocessor runs one block of three warpgroups over its share of the result's tiles (a persistent grid). The third
warpgroup copies (TMA) operands into shared memory, up to `stages` steps ahead and across tiles; it looks up in the pattern
which inputs and which kept block come next. The other two multiply, and store finished tiles while the copies continue. All
warpgroups know from the pattern that a tile has as many steps as its column has blocks.

Rows and their gradient: a tile is `rows` x 128 or 64 of the result, half of the rows for each warpgroup. Transposed blocks
are read in their stored layout. The gradient of the blocks: a tile is two kept blocks of one column, one for each warpgroup,
which share the copied tile of g. Where a column has an odd number of blocks, the last one is multiplied twice and stored
once.

Copies read zeros past the end of an array and write nothing there, so that any M is allowed. P counts pairs of kept blocks.
"""
import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from efficient_lm.ops import dispatch
from efficient_lm.ops.block_sparse_matmul.gradient import differentiable
from efficient_lm.ops.block_sparse_matmul.pattern import Pattern, Sweep
from efficient_lm.ops.block_sparse_matmul.tiles import SHARED, GpuTiles, gpu_tiles_for

H200_CORES = 132   # multiprocessors, where the device is not known
STORE = 64         # rows and columns of the result that are stored at a time: a row fills the 128 bytes of a swizzle
PRODUCER, CONSUMERS = 2, 2


def block_sparse_matmul(x_MI, blocks_ZUV, pattern: Pattern, *, tiles: GpuTiles | None = None):
  """See the API."""
  product = differentiable(functools.partial(rows, tiles=tiles), functools.partial(weights, tiles=tiles))
  return product(x_MI, blocks_ZUV, pattern)


def refuses(x_MI, blocks_ZUV, pattern: Pattern) -> str:
  """Why these kernels cannot take such arguments, '' if they can."""
  (M, I), (_, U, V), C = x_MI.shape, blocks_ZUV.shape, pattern.shape[1]
  if jax.__version_info__ < (0, 11): return 'it needs jax 0.11'
  if x_MI.dtype not in (jnp.bfloat16, jnp.float16): return f'rows are {x_MI.dtype}, neither bfloat16 nor float16'
  if U % 64 or V % 64: return f'blocks are {U} x {V}, not multiples of 64 x 64'
  if gpu_tiles_for(M, I, C * V, U, V).shared(U, V) > SHARED: return f'blocks of {U} x {V} do not fit into shared memory'
  return ''


def width_of(size: int) -> int:
  """The width of the tiles that cut one side of a block, for which a warpgroup has enough registers."""
  return 128 if size % 128 == 0 else 64


def rows(x_MI, blocks_ZUV, sweep: Sweep, transposed: bool = False, *, tiles: GpuTiles | None = None):
  """y_o = the sum of x_i w_z over the sweep's blocks of each output block o, or of x_i w_z^T if `transposed`."""
  (M, I), (_, U, V), num_outputs = x_MI.shape, blocks_ZUV.shape, sweep.starts.shape[0] - 1
  read, write = (V, U) if transposed else (U, V)
  tiles = tiles or gpu_tiles_for(M, *((num_outputs * U, I) if transposed else (I, num_outputs * V)), U, V)
  width, half, dtype = width_of(write), tiles.rows // CONSUMERS, x_MI.dtype
  parts, steps, grid = write // width, read // tiles.inner, (pl.cdiv(M, tiles.rows), num_outputs * (write // width))

  def place(loop):
    """The first row of a tile, the number of its output block, and its first column in that block."""
    m, column = plgpu.planar_snake(loop.index[0], grid, 0, tiles.band)
    return m * tiles.rows, lax.div(column, jnp.int32(parts)), lax.rem(column, jnp.int32(parts)) * width

  def body(starts, inputs_Z, blocks_Z, x, w, y, x_smem, w_smem, y_smem, full, empty):
    def produce(loop, carry):
      row, o, column = place(loop)

      def block(z, step):
        first, number = inputs_Z[z] * read, blocks_Z[z]
        for i in range(steps):
          slot, inner = lax.rem(step, jnp.int32(tiles.stages)), pl.ds(i * tiles.inner, tiles.inner)
          outer = pl.ds(column, width)
          plgpu.barrier_wait(empty.at[slot])
          plgpu.copy_gmem_to_smem(x.at[pl.ds(row, tiles.rows), pl.ds(first + i * tiles.inner, tiles.inner)],
                                  x_smem.at[slot], full.at[slot])
          plgpu.copy_gmem_to_smem(w.at[(number, outer, inner) if transposed else (number, inner, outer)],
                                  w_smem.at[slot], full.at[slot])
          step += 1
        return step
      return lax.fori_loop(starts[o], starts[o + 1], block, carry)

    def consume(half_number, loop, carry):
      row, o, column = place(loop)
      mine = pl.ds(half_number * half, half)

      def operands(slot): return x_smem.at[slot, mine], w_smem.at[slot].T if transposed else w_smem.at[slot]
      count = (starts[o + 1] - starts[o]) * steps
      sums, carry = _multiply((half, width), carry, count, operands, full, empty, tiles.stages)
      _store(sums.astype(dtype), y_smem.at[half_number], y.at[pl.ds(row + half_number * half, half),
                                                            pl.ds(o * write + column, width)])
      return carry

    _specialise(produce, consume, grid[0] * grid[1], empty, tiles.stages)

  return _kernel(body, jax.ShapeDtypeStruct((M, num_outputs * write), dtype),
                 'block_sparse_matmul_' + ('dgrad' if transposed else 'forward'), tiles, dtype,
                 x=(tiles.rows, tiles.inner), w=(width, tiles.inner) if transposed else (tiles.inner, width))(
    *(jnp.asarray(numbers, jnp.int32) for numbers in sweep), x_MI, blocks_ZUV)


def pairs(column_starts, num_blocks: int):
  """The blocks of each column in pairs: the first block and the column of each pair, and the number of pairs, all int32."""
  counts = (column_starts[1:] - column_starts[:-1] + 1) // 2
  ends = jnp.cumsum(counts)
  most = max(1, (num_blocks + counts.shape[0]) // 2)
  pair = jnp.arange(most, dtype=jnp.int32)
  column = jnp.minimum(jnp.sum(pair[:, None] >= ends, axis=1, dtype=jnp.int32), counts.shape[0] - 1)
  first = column_starts[column] + 2 * (pair - (ends - counts)[column])
  return jnp.clip(first, 0, num_blocks - 1).astype(jnp.int32), column, ends[-1:].astype(jnp.int32)


def weights(x_MI, g_MO, blocks_ZUV, pattern: Pattern, *, tiles: GpuTiles | None = None):
  """dw_z = x_r^T g_c for the row r and the column c of each kept block."""
  (M, I), O, (Z, U, V), dtype = x_MI.shape, g_MO.shape[1], blocks_ZUV.shape, blocks_ZUV.dtype
  tiles = tiles or gpu_tiles_for(M, I, O, U, V)
  height, width, steps = width_of(U), width_of(V), pl.cdiv(M, tiles.inner)
  parts = U // height, V // width
  starts = jnp.asarray(pattern.column_starts, jnp.int32)
  first_P, column_P, count = pairs(starts, Z)

  def body(rows_Z, first_P, column_P, count, starts, x, g, dw, x_smem, g_smem, dw_smem, full, empty):
    def place(loop):
      """The first block of a pair, the last block of its column, the column, and the first row and column in the blocks."""
      p, part = (over(loop.index[0], jnp.int32(parts[0] * parts[1])) for over in (lax.div, lax.rem))
      i, j = lax.div(part, jnp.int32(parts[1])) * height, lax.rem(part, jnp.int32(parts[1])) * width
      column = column_P[p]
      return first_P[p], starts[column + 1] - 1, column, i, j

    def produce(loop, carry):
      first, last, column, i, j = place(loop)
      places = [rows_Z[jnp.minimum(first + number, last)] * U + i for number in range(CONSUMERS)]

      def step(m, step):
        slot, inner = lax.rem(step, jnp.int32(tiles.stages)), pl.ds(m * tiles.inner, tiles.inner)
        plgpu.barrier_wait(empty.at[slot])
        for number, place in enumerate(places):
          plgpu.copy_gmem_to_smem(x.at[inner, pl.ds(place, height)], x_smem.at[slot, number], full.at[slot])
        plgpu.copy_gmem_to_smem(g.at[inner, pl.ds(column * V + j, width)], g_smem.at[slot], full.at[slot])
        return step + 1
      return lax.fori_loop(0, steps, step, carry)

    def consume(number, loop, carry):
      first, last, _, i, j = place(loop)
      operands = lambda slot: (x_smem.at[slot, number].T, g_smem.at[slot])
      sums, carry = _multiply((height, width), carry, steps, operands, full, empty, tiles.stages)

      @pl.when(first + number <= last)
      def _():
        _store(sums.astype(dtype), dw_smem.at[number], dw.at[first + number, pl.ds(i, height), pl.ds(j, width)])
      return carry

    _specialise(produce, consume, count[0] * (parts[0] * parts[1]), empty, tiles.stages)

  return _kernel(body, jax.ShapeDtypeStruct((Z, U, V), dtype), 'block_sparse_matmul_wgrad', tiles, dtype,
                 x=(CONSUMERS, tiles.inner, height), w=(tiles.inner, width))(
    jnp.asarray(pattern.rows_Z, jnp.int32), first_P, column_P, count, starts, x_MI, g_MO)


def _kernel(body, out_type, name: str, tiles: GpuTiles, dtype, *, x, w):
  """A persistent kernel of three warpgroups. x, w: the shapes of the operands of one step."""
  def smem(*shape):
    swizzle = plgpu.find_swizzle(shape[-1] * dtype.itemsize * 8)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, swizzle // dtype.itemsize)),
                                               plgpu.SwizzleTransform(swizzle)))
  num_copies = 2 if len(x) == 2 else 1 + x[0]
  return plgpu.kernel(
    body, out_type=out_type, kernel_name=name, grid=(dispatch.device().num_cores or H200_CORES,), grid_names=('block',),
    num_threads=CONSUMERS + 1, thread_name='warpgroup', scratch_types=[
      smem(tiles.stages, *x), smem(tiles.stages, *w), smem(CONSUMERS, 2, STORE, STORE),
      plgpu.Barrier(num_arrivals=num_copies, num_barriers=tiles.stages),
      plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tiles.stages)])


def _specialise(produce, consume, num_tiles, empty, stages: int):
  """Runs the producer and the consumers over the same tiles; both carry the number of steps done before."""
  warpgroup = lax.axis_index('warpgroup')

  def over_tiles(tile):
    @plgpu.nd_loop((num_tiles,), collective_axes='block', init_carry=jnp.int32(0))
    def _(loop, carry): return tile(loop, carry)

  @pl.when(warpgroup == PRODUCER)
  def _():
    plgpu.set_max_registers(40, action='decrease')
    over_tiles(produce)

  @pl.when(warpgroup < PRODUCER)
  def _():
    plgpu.set_max_registers(232, action='increase')
    for slot in range(stages): plgpu.barrier_arrive(empty.at[slot])   # all slots are free for the first copies
    over_tiles(functools.partial(consume, warpgroup))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _multiply(shape: tuple[int, int], step, count, operands, full, empty, stages: int):
  """The sum over `count` steps of the products of both operands, and the number of the next step."""
  slot_of = lambda step: lax.rem(step, jnp.int32(stages))

  def scope(sums_ref):
    def one(i, step):
      slot = slot_of(step)
      plgpu.barrier_wait(full.at[slot])
      plgpu.wgmma(sums_ref, *operands(slot))
      plgpu.wgmma_wait(1)   # for the product of the previous step, whose shared memory is freed

      @pl.when(i > 0)
      def _(): plgpu.barrier_arrive(empty.at[slot_of(step - 1)])
      return step + 1

    last = lax.fori_loop(0, count, one, step)
    sums = sums_ref[...]

    @pl.when(count > 0)
    def _(): plgpu.barrier_arrive(empty.at[slot_of(last - 1)])
    return sums, last

  return pl.run_scoped(scope, plgpu.ACC(shape, jnp.float32))


def _store(sums, smem, gmem):
  """Stores a warpgroup's result piece by piece through two slots of shared memory."""
  height, width = sums.shape
  for i, (row, column) in enumerate(itertools.product(range(0, height, STORE), range(0, width, STORE))):
    # The store before the last one has freed this slot; for the first, also the last one of the tile before must have: of an
    # odd number of pieces it had the same slot.
    plgpu.wait_smem_to_gmem(min(i, 1), wait_read_only=True)
    smem[i % 2] = sums[row:row + STORE, column:column + STORE]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.at[i % 2], gmem.at[pl.ds(row, STORE), pl.ds(column, STORE)])
