"""Grouped products on a TPU: Mosaic kernels whose grid walks the visits of `schedule`.

The visits are prefetched as scalars, so that block index maps look up the next tile of rows and the next group's matrix
while the current ones are multiplied. Tiles of rows begin at multiples of their size. Where two groups share a tile, its
visits follow each other: the tile of the result stays in VMEM between them, and each visit replaces the rows of its group.
The length of the grid is the number of visits, which is known at run time.

Transposed weights (the gradient of x) are read in their stored layout and contracted over their last dimension. The gradient
of w sums tiles of x^T g over the visits of a group; rows of other groups are zeroed in both operands, because they may hold
NaN.

Prefetched visits follow megablox (jax.experimental.pallas.ops.tpu.megablox). V counts visits.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_lm.ops.grouped_matmul.gradient import differentiable
from efficient_lm.ops.grouped_matmul.schedule import visits
from efficient_lm.ops.grouped_matmul.tiles import MiB, TpuTiles, tpu_tiles


def grouped_matmul(x_MI, w_EIO, sizes_E, scale_EO=None, *, tiles: TpuTiles | None = None):
  """y_m = x_m @ w_e (* scale_e) for the group e that holds row m, and 0 for a row past the last group; see the API."""
  return differentiable(functools.partial(rows, tiles=tiles), functools.partial(weights, tiles=tiles))(
    x_MI, w_EIO, sizes_E, scale_EO)


def refuses(x_MI, w_EIO, sizes_E, scale_EO=None, *, tiles: TpuTiles | None = None) -> str:
  """Why these kernels cannot take such arguments, '' if they can."""
  if x_MI.dtype not in (jnp.bfloat16, jnp.float32): return f'x is {x_MI.dtype}, neither bfloat16 nor float32'
  if 0 in (*x_MI.shape, *w_EIO.shape): return 'there is nothing to multiply'
  if scale_EO is None and w_EIO.dtype != x_MI.dtype: return f'w is {w_EIO.dtype} and has no scale, but x is {x_MI.dtype}'
  if scale_EO is not None and w_EIO.dtype not in (jnp.int8, jnp.float8_e4m3fn):
    return f'w is {w_EIO.dtype} and has a scale, which only int8 and float8_e4m3fn may'
  return ''


def rows(x, w_EIO, sizes_E, scale_EO=None, transposed: bool = False, *, tiles: TpuTiles | None = None):
  """y_m = x_m @ w_e * scale_e, or (x_m * scale_e) @ w_e^T if `transposed`; in the dtype of x.

  x: (M, I), or the gradient (M, O) if `transposed`. The result is (M, O), or (M, I).
  """
  (M, inputs), (E, I, O), of = x.shape, w_EIO.shape, 'dgrad' if transposed else 'forward'
  tiles = _cut(tiles or tpu_tiles(of, M, I, O, E, x.dtype, w_EIO.dtype), M, I, O)
  outputs, step, width = (I, tiles.O, tiles.I) if transposed else (O, tiles.I, tiles.O)
  plan = visits(sizes_E, M, tiles.M, align=tiles.M)
  matrix = lambda v, group: jnp.minimum(group[v], E - 1)   # Rows past the groups have no matrix: the last one stays loaded.
  spec_x = pl.BlockSpec((tiles.M, step), lambda o, v, i, group, row, *_: (row[v] // tiles.M, i))
  spec_w = pl.BlockSpec((None, tiles.I, tiles.O), lambda o, v, i, group, *_: (
    (matrix(v, group), o, i) if transposed else (matrix(v, group), i, o)))
  spec_scale = pl.BlockSpec((None, 1, tiles.O), lambda o, v, i, group, *_: (
    matrix(v, group), 0, i if transposed else o))
  scales, specs = ([scale_EO.astype(jnp.float32)[:, None]], [spec_scale]) if scale_EO is not None else ([], [])
  return pl.pallas_call(
    functools.partial(_rows_kernel, inputs=inputs, num_groups=E, transposed=transposed),
    out_shape=jax.ShapeDtypeStruct((M, outputs), x.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4, grid=(pl.cdiv(outputs, width), plan.count, pl.cdiv(inputs, step)),
      in_specs=[spec_x, spec_w, *specs],
      out_specs=pl.BlockSpec((tiles.M, width), lambda o, v, i, group, row, *_: (row[v] // tiles.M, o)),
      scratch_shapes=[pltpu.VMEM((tiles.M, width), jnp.float32)]),
    compiler_params=_params(tiles.vmem(of, x.dtype.itemsize, w_EIO.dtype.itemsize)),
    cost_estimate=pl.CostEstimate(flops=2 * M * I * O, transcendentals=0, bytes_accessed=(
      x.nbytes * pl.cdiv(outputs, width) + w_EIO.nbytes + M * outputs * x.dtype.itemsize)),
    name=f'grouped_matmul_{of}',
  )(*plan[:4], x, w_EIO, *scales)


def _rows_kernel(group_V, row_V, low_V, high_V, x_ref, w_ref, *refs, inputs: int, num_groups: int, transposed: bool):
  """One step over the inputs in one visit. refs: the scales, if there are any, the result and the float32 sums."""
  *scale_ref, y_ref, sum_ref = refs
  visit, step, last = pl.program_id(1), pl.program_id(2), pl.num_programs(2) - 1

  @pl.when(step == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(group_V[visit] < num_groups)
  def _():
    x, w = x_ref[...], w_ref[...].astype(x_ref.dtype)
    if scale_ref and transposed: x = (x * scale_ref[0][...]).astype(x.dtype)
    if inputs % x.shape[1]:   # Past the last input the buffers hold arbitrary numbers.
      there = lambda a, dim: lax.broadcasted_iota(jnp.int32, a.shape, dim) < inputs - step * x_ref.shape[1]
      x, w = jnp.where(there(x, 1), x, 0), jnp.where(there(w, transposed * 1), w, 0)
    sum_ref[...] += _dot(x, w, 1, transposed * 1)

  @pl.when(step == last)
  def _():
    y = sum_ref[...] * scale_ref[0][...] if scale_ref and not transposed else sum_ref[...]
    row = lax.broadcasted_iota(jnp.int32, y.shape, 0)
    first = (visit == 0) | (row_V[visit] != row_V[jnp.maximum(visit - 1, 0)])
    others = jnp.where(first, jnp.zeros_like(y_ref), y_ref[...])
    y_ref[...] = jnp.where((low_V[visit] <= row) & (row < high_V[visit]), y.astype(y_ref.dtype), others)


def weights(x_MI, g_MO, sizes_E, *, tiles: TpuTiles | None = None):
  """dw_e = the sum of x_m^T g_m over the rows m of group e, in the dtype of x."""
  (M, I), O, E = x_MI.shape, g_MO.shape[1], sizes_E.shape[0]
  tiles = _cut(tiles or tpu_tiles('wgrad', M, I, O, E, x_MI.dtype, x_MI.dtype), M, I, O)
  plan = visits(sizes_E, M, tiles.M, align=tiles.M, empty=True, tail=False)
  return pl.pallas_call(
    _weights_kernel, out_shape=jax.ShapeDtypeStruct((E, I, O), x_MI.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4, grid=(pl.cdiv(I, tiles.I), pl.cdiv(O, tiles.O), plan.count),
      in_specs=[pl.BlockSpec((tiles.M, tiles.I), lambda i, o, v, group, row, *_: (row[v] // tiles.M, i)),
                pl.BlockSpec((tiles.M, tiles.O), lambda i, o, v, group, row, *_: (row[v] // tiles.M, o))],
      out_specs=pl.BlockSpec((None, tiles.I, tiles.O), lambda i, o, v, group, *_: (group[v], i, o)),
      scratch_shapes=[pltpu.VMEM((tiles.I, tiles.O), jnp.float32)]),
    compiler_params=_params(tiles.vmem('wgrad', x_MI.dtype.itemsize, x_MI.dtype.itemsize)),
    cost_estimate=pl.CostEstimate(flops=2 * M * I * O, transcendentals=0, bytes_accessed=(
      x_MI.nbytes * pl.cdiv(O, tiles.O) + g_MO.nbytes * pl.cdiv(I, tiles.I) + E * I * O * x_MI.dtype.itemsize)),
    name='grouped_matmul_wgrad',
  )(*plan[:4], x_MI, g_MO)


def _weights_kernel(group_V, row_V, low_V, high_V, x_ref, g_ref, dw_ref, sum_ref):
  """One visit, which is one step over the rows of its group."""
  visit = pl.program_id(2)
  low, high = low_V[visit], high_V[visit]

  @pl.when((visit == 0) | (group_V[visit] != group_V[jnp.maximum(visit - 1, 0)]))
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(low < high)
  def _():
    def ours(a):
      row = lax.broadcasted_iota(jnp.int32, a.shape, 0)
      return jnp.where((low <= row) & (row < high), a, 0)
    sum_ref[...] += _dot(ours(x_ref[...]), ours(g_ref[...]), 0, 0)

  @pl.when((visit == pl.num_programs(2) - 1) | (group_V[visit] != group_V[jnp.minimum(visit + 1, group_V.shape[0] - 1)]))
  def _():
    dw_ref[...] = sum_ref[...].astype(dw_ref.dtype)


def _dot(a, b, over_a: int, over_b: int):
  # The default precision of float32 would be one pass of bfloat16.
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, (((over_a,), (over_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _cut(tiles: TpuTiles, M: int, I: int, O: int) -> TpuTiles:
  """The tiles, cut to the dimensions: a tile must be a multiple of a register's shape or the whole dimension."""
  return TpuTiles(min(tiles.M, M), min(tiles.I, I), min(tiles.O, O))


def _params(vmem: int):
  return pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary', 'arbitrary'),
                              vmem_limit_bytes=min(vmem * 3 // 2 + 8 * MiB, 60 * MiB))
