"""Grouped products on Blackwell: the frame of the Hopper kernels with that generation's matrix unit (tcgen05).

Its sums lie in tensor memory, 128 lanes by 512 columns, and its products are started by one thread and run by themselves.
So of three warpgroups one starts copies, one starts products, and one stores what is finished, a tile of 128 rows by up to
256 columns, from one half of tensor memory while the other half is being summed up. Rows and groups are as in `pallas_gpu`.
The gradient of w is left to plain JAX. Two multiprocessors could share a product and copy less each; these do not.

Studied: the Blackwell kernels of jax.experimental.pallas.ops.gpu. Nothing here has run on a device.
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


def grouped_matmul(x_MK, w_EKN, sizes_E, scale_EN=None, *, tiles: BlackwellTiles | None = None):
  """y_m = x_m @ w_e for the group e that holds row m, and 0 for a row past the last group; see the API."""
  product = lambda x, w, sizes, scale, transposed=False: rows(x, w, sizes, transposed, tiles=tiles)
  weights = lambda x, g, sizes: xla.weights(x, g, w_EKN, sizes)
  return differentiable(product, weights)(x_MK, w_EKN, sizes_E, scale_EN)


def refuses(x_MK, w_EKN, sizes_E, scale_EN=None, *, tiles: BlackwellTiles | None = None) -> str:
  """Why this kernel cannot take such arguments, '' if it can."""
  _, K, N = w_EKN.shape
  if jax.__version_info__ < (0, 11): return 'it needs jax 0.11'
  if not x_MK.dtype == w_EKN.dtype == jnp.bfloat16: return f'it multiplies bfloat16, not {x_MK.dtype} with {w_EKN.dtype}'
  if scale_EN is not None: return 'it takes no scales'
  if 0 in (*x_MK.shape, *w_EKN.shape): return 'there is nothing to multiply'
  if K % 64 or N % 64: return f'K={K} and N={N} must be multiples of 64'
  return ''


def rows(x_MI, w_EKN, sizes_E, transposed: bool = False, *, tiles: BlackwellTiles | None = None):
  """y_m = x_m @ w_e, or x_m @ w_e^T if `transposed`; in the dtype of x."""
  M, (E, K, N), tiles = x_MI.shape[0], w_EKN.shape, tiles or BlackwellTiles()
  x_MI = whole_patterns(x_MI)
  plan = visits(sizes_E, x_MI.shape[0], ROWS, align=ALIGN)
  stages, (inner, columns) = tiles.stages, (tiles.inner, tiles.columns)
  tensor_core = functools.partial(plgpu.Barrier, orders_tensor_core=True)
  scratch = dict(
    x_smem=swizzled((stages, ROWS, inner), x_MI.dtype),
    w_smem=swizzled((stages, *((columns, inner) if transposed else (inner, columns))), x_MI.dtype),
    out_smem=swizzled((ROWS, CHUNK), x_MI.dtype), part_smem=plgpu.SMEM((ROWS, CHUNK), x_MI.dtype),
    acc_tmem=plgpu.TMEM((ROWS, 2 * columns), jnp.float32),
    full=plgpu.Barrier(num_arrivals=2, num_barriers=stages), free=tensor_core(num_barriers=stages),
    summed=tensor_core(num_barriers=2), stored=tensor_core(num_barriers=2))
  y_MO = plgpu.kernel(
    _Rows(tiles, transposed, E).body, out_type=jax.ShapeDtypeStruct((x_MI.shape[0], K if transposed else N), x_MI.dtype),
    scratch_types=scratch, grid=(dispatch.device().num_cores or 148,), grid_names=('block',), num_threads=3,
    thread_name='warpgroup', kernel_name=f"grouped_matmul_{'dgrad' if transposed else 'forward'}",
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
  )(*plan[:4], plan.count[None], x_MI, w_EKN)
  return y_MO[:M]


@dataclasses.dataclass(frozen=True)
class _Tile:
  """A tile of the result: its number in this block, group, first row, rows [row + low, row + high) and first column, its
  steps and those of the tiles before."""
  turn: jax.Array
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
    """Copies, multiplies or stores the tiles of this block: every so many-th of all."""
    across, steps = pl.cdiv(y.shape[1], self.tiles.columns), pl.cdiv(x.shape[1], self.tiles.inner)
    block, blocks = lax.axis_index('block'), lax.axis_size('block')
    turns = lax.div(count[0] * across - block + blocks - 1, blocks)

    def every(function):
      def one(turn, before):
        v, column = banded(block + turn * blocks, count[0], across, self.tiles.band)
        own = jnp.where(group_V[v] < self.num_groups, steps, 0)   # the rows past the groups are only written
        group = jnp.minimum(group_V[v], self.num_groups - 1)
        tile = _Tile(turn, group, row_V[v], low_V[v], high_V[v], column * self.tiles.columns, own, before)
        function(tile, x, w, y, buffers)
        return before + own
      lax.fori_loop(0, turns, one, jnp.int32(0))

    for warpgroup, function in enumerate((self.copy, self.multiply, self.store)):
      pl.when(lax.axis_index('warpgroup') == warpgroup)(functools.partial(every, function))
    plgpu.wait_smem_to_gmem(0)

  def copy(self, tile: _Tile, x, w, y, buffers):
    """Starts the copies of each step as soon as its place is free."""
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
    """Starts the product of each step when its operands are there; it frees them by itself."""
    half, columns = lax.rem(tile.turn, 2), self.tiles.columns
    x_smem, w_smem, full, free = (buffers[name] for name in ('x_smem', 'w_smem', 'full', 'free'))
    sums = buffers['acc_tmem'].at[:, pl.ds(half * columns, columns)]
    pl.when(tile.turn > 1)(lambda: plgpu.barrier_wait(buffers['stored'].at[half]))

    def one(i, _):
      slot = lax.rem(tile.before + i, self.tiles.stages)
      plgpu.barrier_wait(full.at[slot])
      matrix = w_smem.at[slot].transpose((1, 0)) if self.transposed else w_smem.at[slot]
      plgpu.tcgen05_mma(sums, x_smem.at[slot], matrix, free.at[slot], accumulate=i > 0)
    lax.fori_loop(0, tile.steps, one, None)
    plgpu.tcgen05_commit_arrive(buffers['summed'].at[half])

  def store(self, tile: _Tile, x, w, y, buffers):
    """Stores a tile when its sums are complete."""
    half, columns = lax.rem(tile.turn, 2), self.tiles.columns
    plgpu.barrier_wait(buffers['summed'].at[half])
    for c in range(0, columns, CHUNK):
      sums = buffers['acc_tmem'].at[:, pl.ds(half * columns + c, CHUNK)]
      chunk = plgpu.async_load_tmem(sums, layout=plgpu.Layout.TCGEN05)
      chunk = jnp.where(jnp.broadcast_to(tile.steps > 0, chunk.shape), chunk, 0.).astype(y.dtype)
      _store_rows(chunk, y, tile.row, tile.column + c, tile.low, tile.high, buffers['out_smem'], buffers['part_smem'])
    plgpu.wait_load_tmem()
    plgpu.barrier_arrive(buffers['stored'].at[half])


def _store_rows(chunk, y, row, column, first, last, whole, part):
  """Writes rows [first, last) of a tile to y from (row, column) on; columns past its end are left out.

  whole: swizzled, for all of them. part: not swizzled, since swizzled copies start at whole patterns.
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
    # A copy has a fixed number of rows, so one for each bit of how many there are.
    count, start = last - first, first
    for size in (64, 32, 16, 8, 4, 2, 1):
      there = (count & size) != 0

      @pl.when(there)
      def _(size=size, start=start):
        plgpu.copy_smem_to_gmem(part.at[pl.ds(start, size)], y.at[pl.ds(row + start, size), columns])
      start += jnp.where(there, size, 0)
