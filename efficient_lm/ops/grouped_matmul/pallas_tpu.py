"""Grouped products on a TPU: Mosaic kernels whose grid walks the visits of `schedule`.

The visits are prefetched as scalars, so that block index maps can look up which tile of rows and which group's matrix
comes next while the current one is multiplied. Tiles of rows lie on a grid. Where groups meet, visits of one tile follow
each other: the tile of the result stays in VMEM between them and each visit replaces the rows of its group. The grid is as
long as there are visits, a number known at run time.

Transposed weights (the gradient of x) are read as they lie and contracted over their last dimension. The gradient of w
sums tiles of x^T g while visits stay in a group; rows of others are zeroed on both sides, because they may hold NaN.

After megablox (jax.experimental.pallas.ops.tpu.megablox), from which the idea of prefetched visits comes.
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


def grouped_matmul(x_MK, w_EKN, sizes_E, scale_EN=None, *, tiles: TpuTiles | None = None):
  """y_m = x_m @ w_e (* scale_e) for the group e that holds row m, and 0 for a row past the last group; see the API."""
  return differentiable(functools.partial(rows, tiles=tiles), functools.partial(weights, tiles=tiles))(
    x_MK, w_EKN, sizes_E, scale_EN)


def refuses(x_MK, w_EKN, sizes_E, scale_EN=None, *, tiles: TpuTiles | None = None) -> str:
  """Why these kernels cannot take such arguments, '' if they can."""
  if x_MK.dtype not in (jnp.bfloat16, jnp.float32): return f'x is {x_MK.dtype}, neither bfloat16 nor float32'
  if 0 in (*x_MK.shape, *w_EKN.shape): return 'there is nothing to multiply'
  if scale_EN is None and w_EKN.dtype != x_MK.dtype: return f'w is {w_EKN.dtype} and has no scale, but x is {x_MK.dtype}'
  if scale_EN is not None and w_EKN.dtype not in (jnp.int8, jnp.float8_e4m3fn):
    return f'w is {w_EKN.dtype} and has a scale, which only int8 and float8_e4m3fn may'
  return ''


def rows(x_MI, w_EKN, sizes_E, scale_EN=None, transposed: bool = False, *, tiles: TpuTiles | None = None):
  """y_m = x_m @ w_e * scale_e, or (x_m * scale_e) @ w_e^T if `transposed`; in the dtype of x.

  x_MI has the `inputs` that are summed over: K, or N if `transposed`. The result has the other ones.
  """
  (M, inputs), (E, K, N), of = x_MI.shape, w_EKN.shape, 'dgrad' if transposed else 'forward'
  tiles = _cut(tiles or tpu_tiles(of, M, K, N, E, x_MI.dtype, w_EKN.dtype), M, K, N)
  outputs, step, width = (K, tiles.N, tiles.K) if transposed else (N, tiles.K, tiles.N)
  plan = visits(sizes_E, M, tiles.M, align=tiles.M)
  matrix = lambda v, group: jnp.minimum(group[v], E - 1)   # the rows past the groups have none: the last one stays
  spec_x = pl.BlockSpec((tiles.M, step), lambda o, v, i, group, row, *_: (row[v] // tiles.M, i))
  spec_w = pl.BlockSpec((None, tiles.K, tiles.N), lambda o, v, i, group, *_: (
    (matrix(v, group), o, i) if transposed else (matrix(v, group), i, o)))
  spec_scale = pl.BlockSpec((None, 1, tiles.N), lambda o, v, i, group, *_: (
    matrix(v, group), 0, i if transposed else o))
  scales, specs = ([scale_EN.astype(jnp.float32)[:, None]], [spec_scale]) if scale_EN is not None else ([], [])
  return pl.pallas_call(
    functools.partial(_rows_kernel, inputs=inputs, num_groups=E, transposed=transposed),
    out_shape=jax.ShapeDtypeStruct((M, outputs), x_MI.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4, grid=(pl.cdiv(outputs, width), plan.count, pl.cdiv(inputs, step)),
      in_specs=[spec_x, spec_w, *specs],
      out_specs=pl.BlockSpec((tiles.M, width), lambda o, v, i, group, row, *_: (row[v] // tiles.M, o)),
      scratch_shapes=[pltpu.VMEM((tiles.M, width), jnp.float32)]),
    compiler_params=_params(tiles.vmem(of, x_MI.dtype.itemsize, w_EKN.dtype.itemsize)),
    cost_estimate=pl.CostEstimate(flops=2 * M * K * N, transcendentals=0, bytes_accessed=(
      x_MI.nbytes * pl.cdiv(outputs, width) + w_EKN.nbytes + M * outputs * x_MI.dtype.itemsize)),
    name=f'grouped_matmul_{of}',
  )(*plan[:4], x_MI, w_EKN, *scales)


def _rows_kernel(group_V, row_V, low_V, high_V, x_ref, w_ref, *refs, inputs: int, num_groups: int, transposed: bool):
  """A step over the inputs in one visit. refs: the scales, if there are any, the result and the float32 sums."""
  *scale_ref, y_ref, sum_ref = refs
  visit, step, last = pl.program_id(1), pl.program_id(2), pl.num_programs(2) - 1

  @pl.when(step == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(group_V[visit] < num_groups)
  def _():
    x, w = x_ref[...], w_ref[...].astype(x_ref.dtype)
    if scale_ref and transposed: x = (x * scale_ref[0][...]).astype(x.dtype)
    if inputs % x.shape[1]:   # past the end a block holds anything
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


def weights(x_MK, g_MN, sizes_E, *, tiles: TpuTiles | None = None):
  """dw_e = the sum of x_m^T g_m over the rows m of group e, in the dtype of x."""
  (M, K), N, E = x_MK.shape, g_MN.shape[1], sizes_E.shape[0]
  tiles = _cut(tiles or tpu_tiles('wgrad', M, K, N, E, x_MK.dtype, x_MK.dtype), M, K, N)
  plan = visits(sizes_E, M, tiles.M, align=tiles.M, empty=True, tail=False)
  return pl.pallas_call(
    _weights_kernel, out_shape=jax.ShapeDtypeStruct((E, K, N), x_MK.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4, grid=(pl.cdiv(K, tiles.K), pl.cdiv(N, tiles.N), plan.count),
      in_specs=[pl.BlockSpec((tiles.M, tiles.K), lambda k, n, v, group, row, *_: (row[v] // tiles.M, k)),
                pl.BlockSpec((tiles.M, tiles.N), lambda k, n, v, group, row, *_: (row[v] // tiles.M, n))],
      out_specs=pl.BlockSpec((None, tiles.K, tiles.N), lambda k, n, v, group, *_: (group[v], k, n)),
      scratch_shapes=[pltpu.VMEM((tiles.K, tiles.N), jnp.float32)]),
    compiler_params=_params(tiles.vmem('wgrad', x_MK.dtype.itemsize, x_MK.dtype.itemsize)),
    cost_estimate=pl.CostEstimate(flops=2 * M * K * N, transcendentals=0, bytes_accessed=(
      x_MK.nbytes * pl.cdiv(N, tiles.N) + g_MN.nbytes * pl.cdiv(K, tiles.K) + E * K * N * x_MK.dtype.itemsize)),
    name='grouped_matmul_wgrad',
  )(*plan[:4], x_MK, g_MN)


def _weights_kernel(group_V, row_V, low_V, high_V, x_ref, g_ref, dw_ref, sum_ref):
  """One visit: a step over the rows of its group."""
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
  # One pass of bfloat16 would be the default for float32 too.
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, (((over_a,), (over_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _cut(tiles: TpuTiles, M: int, K: int, N: int) -> TpuTiles:
  """A block must be a multiple of the registers' shape or the whole dimension."""
  return TpuTiles(min(tiles.M, M), min(tiles.K, K), min(tiles.N, N))


def _params(vmem: int):
  return pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary', 'arbitrary'),
                              vmem_limit_bytes=min(vmem * 3 // 2 + 8 * MiB, 60 * MiB))
