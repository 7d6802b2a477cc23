"""Grouped products on Blackwell: the frame of the Hopper kernels with that generation's matrix unit (tcgen05).

Sums lie in tensor memory, 128 lanes by 512 columns, and products are started by one thread and run asynchronously. Therefore
one of three warpgroups starts copies, one starts products, and one stores finished tiles of 128 rows by up to 256 columns,
from one half of tensor memory while the other half accumulates sums. Rows and groups are as in `pallas_gpu`. Plain JAX
computes the gradient of w. Two multiprocessors could share a product and copy less each; these kernels do not.

The kernel follows the Blackwell kernels of jax.experimental.pallas.ops.gpu. It has not run on a device. V counts visits of
`schedule`.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from efficient_lm.ops import dispatch
from efficient_lm.ops.grouped_matmul import xla
from efficient_lm.ops.grouped_matmul.gradient import differentiable
from efficient_lm.ops.grouped_matmul.pallas_gpu import ALIGN, banded, swizzled, whole_patterns
from efficient_lm.ops.grouped_matmul.schedule import visits
from efficient_lm.ops.grouped_matmul.tiles import BlackwellTiles

ROWS = 128   # of tensor memory, and so of a tile
CHUNK = 64   # columns of the result that go through shared memory at a time


def grouped_matmul(x_MI, w_EIO, sizes_E, scale_EO=None, *, tiles: BlackwellTiles | None = None):
  """y_m = x_m @ w_e for the group e that holds row m, and 0 for a row past the last group; see the API."""
  product = lambda x, w, sizes, scale, transposed=False: rows(x, w, sizes, transposed, tiles=tiles)
  weights = lambda x, g, sizes: xla.weights(x, g, w_EIO, sizes)
  return differentiable(product, weights)(x_MI, w_EIO, sizes_E, scale_EO)


def refuses(x_MI, w_EIO, sizes_E, scale_EO=None, *, tiles: BlackwellTiles | None = None) -> str:
  """Why this kernel cannot take such arguments, '' if it can."""
  _, I, O = w_EIO.shape
  if jax.__version_info__ < (0, 11): return 'it needs jax 0.11'
  if not x_MI.dtype == w_EIO.dtype == jnp.bfloat16: return f'it multiplies bfloat16, not {x_MI.dtype} with {w_EIO.dtype}'
  if scale_EO is not None: return 'it takes no scales'
  if 0 in (*x_MI.shape, *w_EIO.shape): return 'there is nothing to multiply'
  if I % 64 or O % 64: return f'{I} inputs and {O} outputs must be multiples of 64'
  return ''


def rows(x, w_EIO, sizes_E, transposed: bool = False, *, tiles: BlackwellTiles | None = None):
  """y_m = x_m @ w_e, or x_m @ w_e^T if `transposed`; in the dtype of x."""
  M, (E, I, O), tiles = x.shape[0], w_EIO.shape, tiles or BlackwellTiles()
  x = whole_patterns(x)
  plan = visits(sizes_E, x.shape[0], ROWS, align=ALIGN)
  stages, (inner, columns) = tiles.stages, (tiles.inner, tiles.columns)
  tensor_core = functools.partial(plgpu.Barrier, orders_tensor_core=True)
  scratch = dict(
    x_smem=swizzled((stages, ROWS, inner), x.dtype),
    w_smem=swizzled((stages, *((columns, inner) if transposed else (inner, columns))), x.dtype),
    out_smem=swizzled((ROWS, CHUNK), x.dtype), part_smem=plgpu.SMEM((ROWS, CHUNK), x.dtype),
    acc_tmem=plgpu.TMEM((ROWS, 2 * columns), jnp.float32),
    full=plgpu.Barrier(num_arrivals=2, num_barriers=stages), free=tensor_core(num_barriers=stages),
    summed=tensor_core(num_barriers=2), stored=tensor_core(num_barriers=2))
  y = plgpu.kernel(
    _Rows(tiles, transposed, E).body, out_type=jax.ShapeDtypeStruct((x.shape[0], I if transposed else O), x.dtype),
    scratch_types=scratch, grid=(dispatch.device().num_cores or 148,), grid_names=('block',), num_threads=3,
    thread_name='warpgroup', kernel_name=f"grouped_matmul_{'dgrad' if transposed else 'forward'}",
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
  )(*plan[:4], plan.count[None], x, w_EIO)
  return y[:M]


@dataclasses.dataclass(frozen=True)
class _Tile:
  """A tile of the result: its number within this block of threads, its group, its first row, its own rows [row + low, row +
  high), its first column, its number of steps, and the steps of the tiles before it."""
  number: jax.Array
  group: jax.Array
  row: jax.Array
  low: jax.Array
  high: jax.Array
  column: jax.Array
  steps: jax.Array
  before: jax.Array


@dataclasses.dataclass(frozen=True)
class _Rows:
  """The kernel of `rows`."""
  tiles: BlackwellTiles
  transposed: bool
  num_groups: int

  def body(self, group_V, row_V, low_V, high_V, count, x, w, y, **buffers):
    """Copies, multiplies or stores the tiles of this block of threads, depending on the warpgroup."""
    across, steps = pl.cdiv(y.shape[1], self.tiles.columns), pl.cdiv(x.shape[1], self.tiles.inner)
    block, blocks = lax.axis_index('block'), lax.axis_size('block')
    own_tiles = lax.div(count[0] * across - block + blocks - 1, blocks)

    def every(function):
      def one(number, before):
        v, column = banded(block + number * blocks, count[0], across, self.tiles.band)
        own = jnp.where(group_V[v] < self.num_groups, steps, 0)   # rows past the groups are written without a product
        group = jnp.minimum(group_V[v], self.num_groups - 1)
        tile = _Tile(number, group, row_V[v], low_V[v], high_V[v], column * self.tiles.columns, own, before)
        function(tile, x, w, y, buffers)
        return before + own
      lax.fori_loop(0, own_tiles, one, jnp.int32(0))

    for warpgroup, function in enumerate((self.copy, self.multiply, self.store)):
      pl.when(lax.axis_index('warpgroup') == warpgroup)(functools.partial(every, function))
    plgpu.wait_smem_to_gmem(0)

  def copy(self, tile: _Tile, x, w, y, buffers):
    """Starts the copies of each step as soon as its buffers are free."""
    stages, row = self.tiles.stages, pl.multiple_of(tile.row, ALIGN)
    x_smem, w_smem, full, free = (buffers[name] for name in ('x_smem', 'w_smem', 'full', 'free'))

    def one(i, _):
      slot, inputs = lax.rem(tile.before + i, stages), pl.ds(i * self.tiles.inner, self.tiles.inner)
      outputs = pl.ds(tile.column, self.tiles.columns)
      pl.when(tile.before + i >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
      plgpu.copy_gmem_to_smem(x.at[pl.ds(row, ROWS), inputs], x_smem.at[slot], full.at[slot])
      matrix = (outputs, inputs) if self.transposed else (inputs, outputs)
      plgpu.copy_gmem_to_smem(w.at[tile.group, *matrix], w_smem.at[slot], full.at[slot])
    lax.fori_loop(0, tile.steps, one, None)

  def multiply(self, tile: _Tile, x, w, y, buffers):
    """Starts the product of each step when its operands have arrived; the product frees their buffers when it ends."""
    half, columns = lax.rem(tile.number, 2), self.tiles.columns
    x_smem, w_smem, full, free = (buffers[name] for name in ('x_smem', 'w_smem', 'full', 'free'))
    sums = buffers['acc_tmem'].at[:, pl.ds(half * columns, columns)]
    pl.when(tile.number > 1)(lambda: plgpu.barrier_wait(buffers['stored'].at[half]))

    def one(i, _):
      slot = lax.rem(tile.before + i, self.tiles.stages)
      plgpu.barrier_wait(full.at[slot])
      matrix = w_smem.at[slot].transpose((1, 0)) if self.transposed else w_smem.at[slot]
      plgpu.tcgen05_mma(sums, x_smem.at[slot], matrix, free.at[slot], accumulate=i > 0)
    lax.fori_loop(0, tile.steps, one, None)
    plgpu.tcgen05_commit_arrive(buffers['summed'].at[half])

  def store(self, tile: _Tile, x, w, y, buffers):
    """Stores a tile when its sums are complete."""
    half, columns = lax.rem(tile.number, 2), self.tiles.columns
    plgpu.barrier_wait(buffers['summed'].at[half])
    for c in range(0, columns, CHUNK):
      sums = buffers['acc_tmem'].at[:, pl.ds(half * columns + c, CHUNK)]
      chunk = plgpu.async_load_tmem(sums, layout=plgpu.Layout.TCGEN05)
      chunk = jnp.where(jnp.broadcast_to(tile.steps > 0, chunk.shape), chunk, 0.).astype(y.dtype)
      _store_rows(chunk, y, tile.row, tile.column + c, tile.low, tile.high, buffers['out_smem'], buffers['part_smem'])
    plgpu.wait_load_tmem()
    plgpu.barrier_arrive(buffers['stored'].at[half])


def _store_rows(chunk, y, row, column, first, last, whole, part):
  """Writes rows [first, last) of a tile to y from (row, column) on, without columns past the end of y.

  whole: a swizzled buffer for tiles of which all rows are written. part: a buffer without swizzling for others, because
  swizzled copies must start at whole patterns.
  """
  columns = pl.ds(column, CHUNK)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  @pl.when(last - first == ROWS)
  def _():
    whole[...] = chunk
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(whole, y.at[pl.ds(pl.multiple_of(row, ALIGN), ROWS), columns])

  @pl.when((last - first < ROWS) & (last > first))
  def _():
    part[...] = chunk
    plgpu.commit_smem()
    # A copy has a fixed number of rows: there is one copy for each bit of the number of rows.
    count, start = last - first, first
    for size in (64, 32, 16, 8, 4, 2, 1):
      there = (count & size) != 0

      @pl.when(there)
      def _(size=size, start=start):
        plgpu.copy_smem_to_gmem(part.at[pl.ds(start, size)], y.at[pl.ds(row + start, size), columns])
      start += jnp.where(there, size, 0)
