"""Grouped products on Hopper: persistent Mosaic GPU kernels, one block a multiprocessor.

One of three warpgroups only starts copies, ahead of the others by as many steps as fit in shared memory, also across tiles.
The other two multiply (wgmma) and share the tile of the result. The visits of `schedule` say which rows a tile has and which
group they belong to; tiles begin at multiples of 8 rows, as swizzled copies must. Where a tile also holds rows of other
groups, its own rows are stored in runs of powers of two, so that no other row is written; tiles of one group are stored
whole. Tiles are ordered in bands of some row tiles by all columns, so that the operands in use stay in the L2 cache. Two
blocks may form a cluster, which copies the rows of x that both multiply only once.

Transposed weights (the gradient of x) are copied in their stored layout and transposed by the matrix unit. The gradient of w
steps over the rows of a group; in its first and last step, rows of other groups are zeroed in shared memory in both
operands, because they may hold NaN. Each consumer warpgroup converts its half of weights of eight bits into a second buffer,
while the product of the previous step runs.

The kernels follow the Hopper kernels of jax.experimental.pallas.ops.gpu, and CUTLASS's warp-specialised persistent schedule.
V counts visits of `schedule`.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from efficient_lm.ops import dispatch
from efficient_lm.ops.grouped_matmul.gradient import differentiable
from efficient_lm.ops.grouped_matmul.schedule import visits
from efficient_lm.ops.grouped_matmul.tiles import GpuTiles, gpu_tiles

ALIGN = 8          # rows of a swizzle pattern
CHUNK = 64, 32     # rows and columns of the result that pass through shared memory at a time
PRODUCER = 2       # the warpgroup that copies; warpgroups 0 and 1 multiply
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232


def grouped_matmul(x_MI, w_EIO, sizes_E, scale_EO=None, *, tiles: GpuTiles | None = None):
  """y_m = x_m @ w_e (* scale_e) for the group e that holds row m, and 0 for a row past the last group; see the API."""
  return differentiable(functools.partial(rows, tiles=tiles), functools.partial(weights, tiles=tiles))(
    x_MI, w_EIO, sizes_E, scale_EO)


def refuses(x_MI, w_EIO, sizes_E, scale_EO=None, *, tiles: GpuTiles | None = None) -> str:
  """Why these kernels cannot take such arguments, '' if they can."""
  _, I, O = w_EIO.shape
  if jax.__version_info__ < (0, 11): return 'it needs jax 0.11'
  if x_MI.dtype != jnp.bfloat16: return f'x is {x_MI.dtype}, not bfloat16'
  if 0 in (*x_MI.shape, *w_EIO.shape): return 'there is nothing to multiply'
  if scale_EO is None and w_EIO.dtype != x_MI.dtype: return f'w is {w_EIO.dtype} and has no scale, but x is {x_MI.dtype}'
  if scale_EO is not None and w_EIO.dtype not in (jnp.int8, jnp.float8_e4m3fn):
    return f'w is {w_EIO.dtype} and has a scale, which only int8 and float8_e4m3fn may'
  multiple = 64 if scale_EO is None else 128
  if I % 64 or O % multiple: return f'{I} inputs and {O} outputs must be multiples of 64 and {multiple}'
  return ''


def rows(x, w_EIO, sizes_E, scale_EO=None, transposed: bool = False, *, tiles: GpuTiles | None = None):
  """y_m = x_m @ w_e * scale_e, or (x_m * scale_e) @ w_e^T if `transposed`; in the dtype of x.

  x: (M, I), or the gradient (M, O) if `transposed`. The result is (M, O), or (M, I).
  """
  M, (E, I, O), of = x.shape[0], w_EIO.shape, 'dgrad' if transposed else 'forward'
  x = whole_patterns(x)
  tiles = tiles or gpu_tiles(of, M, I, O, E, x.dtype, w_EIO.dtype)
  plan = visits(sizes_E, x.shape[0], tiles.M, align=ALIGN)
  scales = [] if scale_EO is None else [scale_EO.astype(jnp.float32)]
  work = _Rows(tiles, transposed, scaled=bool(scales), num_groups=E)
  y = _kernel(work.body, of, tiles.cluster, jax.ShapeDtypeStruct((x.shape[0], I if transposed else O), x.dtype),
                 work.scratch(w_EIO.dtype))(*plan[:4], plan.count[None], x, w_EIO, *scales)
  return y[:M]


@dataclasses.dataclass(frozen=True)
class _Rows:
  """The kernel of `rows`. The two consumers split the rows of a tile. They split its columns where each converts its own
  weights, and where there are fewer rows than two products take."""
  tiles: GpuTiles
  transposed: bool
  scaled: bool
  num_groups: int

  @property
  def step(self) -> int:
    """The number of inputs of a step."""
    return self.tiles.O if self.transposed else self.tiles.I

  @property
  def columns(self) -> int:
    """The number of outputs of a tile."""
    return self.tiles.I if self.transposed else self.tiles.O

  @property
  def by_columns(self) -> bool:
    return self.scaled or CHUNK[0] > self.tiles.M // 2

  @property
  def scales_inputs(self) -> bool:
    return self.scaled and self.transposed

  @property
  def share(self) -> tuple[int, int]:
    """The rows and columns of a tile that one consumer multiplies."""
    return (self.tiles.M, self.columns // 2) if self.by_columns else (self.tiles.M // 2, self.columns)

  def scratch(self, w_dtype) -> dict:
    """Buffers in shared memory, and barriers: `full` when a step's operands have arrived, `free` when they have been
    used."""
    stages, (I, O) = self.tiles.stages, (self.tiles.I, self.tiles.O)
    wide = (I // 2, O) if self.transposed else (I, O // 2)
    extra = {'wide_smem': swizzled((2, 2, *wide), jnp.bfloat16)} if self.scaled else {}
    if self.scales_inputs: extra['scale_smem'] = plgpu.SMEM((stages, self.step), jnp.float32)
    return dict(
      x_smem=swizzled((stages, self.tiles.M, self.step), jnp.bfloat16), w_smem=swizzled((stages, I, O), w_dtype),
      out_smem=swizzled((2, 2, *CHUNK), jnp.bfloat16), part_smem=plgpu.SMEM((2, *CHUNK), jnp.bfloat16),
      full=plgpu.Barrier(num_arrivals=2 + self.scales_inputs, num_barriers=stages),
      free=_freed(self.tiles), **extra)

  def body(self, group_V, row_V, low_V, high_V, count, x, w, *refs, x_smem, w_smem, out_smem, part_smem, full, free,
           wide_smem=None, scale_smem=None):
    """Copies or multiplies the tiles of this block of threads, depending on the warpgroup."""
    *scale, y = refs
    steps = pl.cdiv(x.shape[1], self.step)
    across, cluster = pl.cdiv(y.shape[1], self.columns * self.tiles.cluster), self.tiles.cluster

    def place(number):
      """(visit, first column, number of steps) of a tile. Rows past the groups have no steps: they are only written."""
      visit, column = banded(number, count[0], across, self.tiles.band)
      column = (column * cluster + lax.axis_index('cluster')) * self.columns
      return visit, column, jnp.where(group_V[visit] < self.num_groups, steps, 0)

    def copy(number, done):
      visit, column, steps = place(number)
      group, row = jnp.minimum(group_V[visit], self.num_groups - 1), pl.multiple_of(row_V[visit], ALIGN)

      def start(i, slot):
        inputs, outputs = pl.ds(i * self.step, self.step), pl.ds(column, self.columns)
        plgpu.copy_gmem_to_smem(x.at[pl.ds(row, self.tiles.M), inputs], x_smem.at[slot], full.at[slot],
                                collective_axes=_together(cluster))
        matrix = (outputs, inputs) if self.transposed else (inputs, outputs)
        plgpu.copy_gmem_to_smem(w.at[group, *matrix], w_smem.at[slot], full.at[slot])
        if self.scales_inputs: plgpu.copy_gmem_to_smem(scale[0].at[group, inputs], scale_smem.at[slot], full.at[slot])
      return _copied(steps, done, free, start)

    def multiply(number, done):
      visit, column, steps = place(number)
      group = jnp.minimum(group_V[visit], self.num_groups - 1)
      own = _Share(self, lax.axis_index('warpgroup'), group, column)

      def sums(acc):
        def start(i, slot):
          w_ref = own.of_w(w_smem.at[slot])
          if self.scaled: w_ref = own.widened(w_ref, wide_smem.at[own.index, lax.rem(i, 2)], scale_smem, slot)
          plgpu.wgmma(acc, own.of_x(x_smem.at[slot]), w_ref.transpose((1, 0)) if self.transposed else w_ref)
        _multiplied(steps, done, full, free, start)
        return acc[...]

      acc = pl.run_scoped(sums, plgpu.ACC(self.share))
      own.store(acc, y, scale, row_V[visit], low_V[visit], high_V[visit], out_smem, part_smem)
      return done + steps

    _specialised(count[0] * across, free, copy, multiply)


@dataclasses.dataclass(frozen=True)
class _Share:
  """The part of a consumer of `_Rows` in one tile. index: 0 or 1, for the consumer. group, column: those of the tile."""
  work: _Rows
  index: jax.Array
  group: jax.Array
  column: jax.Array

  def of_x(self, x_ref):
    """The rows of x that it multiplies."""
    return x_ref if self.work.by_columns else x_ref.at[pl.ds(self.index * self.work.share[0], self.work.share[0])]

  def of_w(self, w_ref):
    """The part of the matrix that it multiplies by."""
    own = pl.ds(self.index * self.work.share[1], self.work.share[1])
    if not self.work.by_columns: return w_ref
    return w_ref.at[own] if self.work.transposed else w_ref.at[:, own]

  def widened(self, w_ref, wide_ref, scale_smem, slot):
    """That part, converted to bfloat16 in wide_ref, and multiplied by its scales if their dimension is summed over."""
    w = w_ref[...]
    # Hopper has no instruction from float8 to bfloat16.
    if self.work.scales_inputs or w.dtype != jnp.int8: w = w.astype(jnp.float32)
    if self.work.scales_inputs: w *= lax.broadcast_in_dim(scale_smem[slot], w.shape, (1,))
    wide_ref[...] = w.astype(wide_ref.dtype)
    plgpu.commit_smem()
    return wide_ref

  def store(self, acc, y, scale, row, low, high, out_smem, part_smem):
    """Writes those of the rows [row + low, row + high) of the tile that are in its part, a chunk at a time."""
    (height, width), number = self.work.share, 0
    top, left = (0, self.index * width) if self.work.by_columns else (self.index * height, 0)
    for r in range(0, height, CHUNK[0]):
      first, last = jnp.clip(low - top - r, 0, CHUNK[0]), jnp.clip(high - top - r, 0, CHUNK[0])
      for c in range(0, width, CHUNK[1]):
        column = self.column + left + c
        chunk = acc[r:r + CHUNK[0], c:c + CHUNK[1]]
        if scale and not self.work.transposed:
          # Columns past the last one are not stored, but their scales must be read from valid memory.
          inside = pl.ds(jnp.minimum(column, y.shape[1] - CHUNK[1]), CHUNK[1])
          scales = plgpu.load(scale[0].at[self.group, inside], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
          chunk *= lax.broadcast_in_dim(scales, chunk.shape, (1,))
        whole, part = out_smem.at[self.index, number % 2], part_smem.at[self.index]
        _store_rows(chunk.astype(y.dtype), y, row + top + r, column, first, last, whole, part, number)
        number += 1


def _store_rows(chunk, y, row, column, first, last, whole, part, number: int):
  """Writes rows [first, last) of chunk `number` of a tile to y from (row, column) on, without columns past the end of y.

  whole: one of two buffers in turn, for chunks of which all rows are written. part: a buffer without swizzling for others,
  because swizzled copies must start at whole patterns.
  """
  columns = pl.ds(column, CHUNK[1])

  @pl.when(last - first == CHUNK[0])
  def _():
    plgpu.wait_smem_to_gmem(min(number, 1), wait_read_only=True)
    whole[...] = chunk
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(whole, y.at[pl.ds(pl.multiple_of(row, ALIGN), CHUNK[0]), columns])

  @pl.when((last - first < CHUNK[0]) & (last > first))
  def _():
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    part[...] = chunk
    plgpu.commit_smem()
    # A copy has a fixed number of rows: there is one copy for each bit of the number of rows.
    count, start = last - first, first
    for size in (32, 16, 8, 4, 2, 1):
      there = (count & size) != 0

      @pl.when(there)
      def _(size=size, start=start):
        plgpu.copy_smem_to_gmem(part.at[pl.ds(start, size)], y.at[pl.ds(row + start, size), columns])
      start += jnp.where(there, size, 0)


def weights(x_MI, g_MO, sizes_E, *, tiles: GpuTiles | None = None):
  """dw_e = the sum of x_m^T g_m over the rows m of group e, in the dtype of x."""
  (M, I), O, E = x_MI.shape, g_MO.shape[1], sizes_E.shape[0]
  x_MI, g_MO = whole_patterns(x_MI), whole_patterns(g_MO)
  tiles = tiles or gpu_tiles('wgrad', M, I, O, E, x_MI.dtype, x_MI.dtype)
  end_E = jnp.cumsum(sizes_E)
  scratch = dict(
    x_smem=swizzled((tiles.stages, tiles.M, tiles.I), x_MI.dtype),
    g_smem=swizzled((tiles.stages, tiles.M, tiles.O), g_MO.dtype), out_smem=swizzled((2, 2, *CHUNK), x_MI.dtype),
    full=plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
    free=_freed(tiles), masked=plgpu.Barrier(num_arrivals=2))
  return _kernel(functools.partial(_weights_body, tiles), 'wgrad', tiles.cluster,
                 jax.ShapeDtypeStruct((E, I, O), x_MI.dtype), scratch)(
    end_E - sizes_E, end_E, x_MI, g_MO)


def _weights_body(tiles: GpuTiles, start_E, end_E, x, g, dw, *, x_smem, g_smem, out_smem, masked, full, free):
  """Copies or multiplies the tiles of this block of threads. Each consumer has half of a tile's rows, the columns of x."""
  (E, I, O), height = dw.shape, tiles.I // 2
  down, across = pl.cdiv(I, tiles.I), pl.cdiv(O, tiles.O * tiles.cluster)

  def place(number):
    """(group, its first row rounded down, number of steps over its rows, first row and first column in dw)."""
    group = lax.div(number, down * across)
    i, o = banded(lax.rem(number, down * across), down, across, tiles.band)
    start, end = start_E[group], end_E[group]
    aligned = lax.div(start, ALIGN) * ALIGN
    steps = jnp.where(end > start, lax.div(end - aligned + tiles.M - 1, tiles.M), 0)
    return group, aligned, steps, i * tiles.I, (o * tiles.cluster + lax.axis_index('cluster')) * tiles.O

  def copy(number, done):
    _, aligned, steps, top, left = place(number)

    def start(i, slot):
      rows = pl.ds(pl.multiple_of(aligned + i * tiles.M, ALIGN), tiles.M)
      plgpu.copy_gmem_to_smem(x.at[rows, pl.ds(top, tiles.I)], x_smem.at[slot], full.at[slot],
                              collective_axes=_together(tiles.cluster))
      plgpu.copy_gmem_to_smem(g.at[rows, pl.ds(left, tiles.O)], g_smem.at[slot], full.at[slot])
    return _copied(steps, done, free, start)

  def multiply(number, done):
    group, aligned, steps, top, left = place(number)
    consumer = lax.axis_index('warpgroup')

    def sums(acc):
      def start(i, slot):
        own = x_smem.at[slot, :, pl.ds(consumer * height, height)]
        row = aligned + i * tiles.M
        first, last = start_E[group] - row, end_E[group] - row

        @pl.when((first > 0) | (last < tiles.M))
        def _():
          _keep_rows(own, first, last)
          _keep_rows(g_smem.at[slot, :, pl.ds(consumer * (tiles.O // 2), tiles.O // 2)], first, last)
          plgpu.commit_smem()
          plgpu.barrier_arrive(masked)
          plgpu.barrier_wait(masked)
        plgpu.wgmma(acc, own.transpose((1, 0)), g_smem.at[slot])
      _multiplied(steps, done, full, free, start)
      return acc[...]

    acc = pl.run_scoped(sums, plgpu.ACC((height, tiles.O)))
    _store_matrix(acc, dw, group, top + consumer * height, left, out_smem, consumer)
    return done + steps

  _specialised(E * down * across, free, copy, multiply)


def _keep_rows(ref, first, last):
  """Zeroes the rows of a tile that are not in [first, last)."""
  row = plgpu.broadcasted_iota(jnp.int32, ref.shape, 0, layout=plgpu.Layout.WGMMA)
  ref[...] = jnp.where((first <= row) & (row < last), ref[...], jnp.zeros(ref.shape, ref.dtype))


def _store_matrix(acc, dw, group, row, column, out_smem, consumer):
  """Writes acc to dw[group] from (row, column) on, without rows and columns past its end."""
  number = 0
  for r in range(0, acc.shape[0], CHUNK[0]):
    for c in range(0, acc.shape[1], CHUNK[1]):
      chunk = out_smem.at[consumer, number % 2]
      plgpu.wait_smem_to_gmem(min(number, 1), wait_read_only=True)
      chunk[...] = acc[r:r + CHUNK[0], c:c + CHUNK[1]].astype(dw.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(chunk, dw.at[group, pl.ds(row + r, CHUNK[0]), pl.ds(column + c, CHUNK[1])])
      number += 1


def _specialised(total, free, copy, multiply):
  """Runs copy or multiply(number, steps done) -> steps done for the tiles of this block of threads, whose numbers are block,
  block + blocks, … below `total`."""
  block, blocks = lax.axis_index('block'), lax.axis_size('block')
  own_tiles = lax.div(total - block + blocks - 1, blocks)
  every = lambda function: lax.fori_loop(0, own_tiles, lambda t, done: function(block + t * blocks, done), jnp.int32(0))

  @pl.when(lax.axis_index('warpgroup') == PRODUCER)
  def _():
    plgpu.set_max_registers(PRODUCER_REGISTERS, action='decrease')
    every(copy)
    # A block must not end before the consumers of its cluster have arrived at its barriers.
    for slot in range(free.shape[0]): plgpu.barrier_wait(free.at[slot])

  @pl.when(lax.axis_index('warpgroup') != PRODUCER)
  def _():
    plgpu.set_max_registers(CONSUMER_REGISTERS, action='increase')
    for slot in range(free.shape[0]): plgpu.barrier_arrive(free.at[slot])
    every(multiply)
    plgpu.wait_smem_to_gmem(0)


def _copied(steps, done, free, start):
  """Calls start(i, slot), which starts the copies of step i, as soon as its slot is free. -> number of steps done."""
  def one(i, done):
    slot = lax.rem(done, free.shape[0])
    plgpu.barrier_wait(free.at[slot])
    start(i, slot)
    return done + 1
  return lax.fori_loop(0, steps, one, done)


def _multiplied(steps, done, full, free, start):
  """Calls start(i, slot), which starts the product of step i, when its operands have arrived, and frees the slot of the
  step before."""
  stages = full.shape[0]

  def one(i, done):
    slot = lax.rem(done, stages)
    plgpu.barrier_wait(full.at[slot])
    start(i, slot)
    plgpu.wgmma_wait(1)

    @pl.when(i > 0)
    def _():
      plgpu.barrier_arrive(free.at[lax.rem(done + stages - 1, stages)])
    return done + 1
  lax.fori_loop(0, steps, one, done)
  plgpu.wgmma_wait(0)

  @pl.when(steps > 0)
  def _():
    plgpu.barrier_arrive(free.at[lax.rem(done + steps + stages - 1, stages)])


def banded(number, down, across, band: int):
  """(row, column) of tile `number` in a grid of down x across that is swept column by column, `band` rows at a time."""
  top = lax.div(number, band * across) * band
  height = jnp.minimum(band, down - top)
  within = number - top * across
  return top + lax.rem(within, height), lax.div(within, height)


def swizzled(shape: tuple[int, ...], dtype):
  """A buffer in shared memory in the layout of the matrix unit, in patterns as wide as its rows, at most 128 bytes."""
  swizzle = plgpu.find_swizzle(shape[-1] * jnp.dtype(dtype).itemsize * 8)
  return plgpu.SMEM(shape, dtype, transforms=(
    plgpu.TilingTransform((ALIGN, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)))


def _freed(tiles: GpuTiles):
  """The barriers at which the consumers of the whole cluster arrive when a step's operands have been used."""
  if tiles.cluster == 1: return plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages)
  return plgpu.ClusterBarrier(collective_axes=('cluster',), num_arrivals=2, num_barriers=tiles.stages)


def _together(cluster: int):
  return 'cluster' if cluster > 1 else None


def whole_patterns(x):
  """x, padded to whole patterns of rows. A number of rows that is a multiple already costs nothing."""
  return jnp.pad(x, ((0, -x.shape[0] % ALIGN), (0, 0)))


def _kernel(body, of: str, cluster: int, out_type, scratch: dict):
  blocks = (dispatch.device().num_cores or 132) // cluster
  return plgpu.kernel(
    body, out_type=out_type, scratch_types=scratch, grid=(blocks,), grid_names=('block',), cluster=(cluster,),
    cluster_names=('cluster',), num_threads=3, thread_name='warpgroup', kernel_name=f'grouped_matmul_{of}',
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup))
