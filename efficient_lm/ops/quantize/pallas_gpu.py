"""Quantization of rows on Hopper: a row is read once, stays in the registers of a warpgroup, and is written once as bytes.

Rows come through a ring of copies (TMA), so that some are under way while one is worked on. Rotations are left to XLA: a
warpgroup has no cheap way to add numbers that different threads hold, and a tensor core wants 64 rows, which do not fit.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from efficient_lm.ops.quantize.grid import SMALLEST, largest
from efficient_lm.ops.quantize.tiles import GpuTiles, gpu_tiles_for

# Registers of a thread hold the row in float32, 128 numbers at most, beside the rest.
LONGEST = 16384
LINE = 256   # numbers: a copy may have no dimension that is longer, so a row is several lines


def refuses(x_MD, *, norm_D=None, hadamard=None, **_) -> str:
  """Why this kernel cannot take these arguments, or ''."""
  D = x_MD.shape[1]
  if not hasattr(plgpu, 'InterpretGPUParams'): return 'needs jax 0.11'
  if hadamard is not None: return 'it has no Hadamard product'
  if D % 512 or D > LONGEST: return f'rows of {D} numbers: must be a multiple of 512, at most {LONGEST}'
  return ''


def quantize(x_MD, *, dtype, norm_D=None, eps: float = 1e-6, hadamard: int | None = None, tiles: GpuTiles | None = None):
  """See the API."""
  M, D = x_MD.shape
  tiles = tiles or gpu_tiles_for(M, D, x_MD.dtype.itemsize)
  row = (D // LINE, LINE)
  operands = [x_MD.reshape(M, *row)]
  if norm_D is not None: operands.append(norm_D.astype(jnp.float32).reshape(row))
  scratch = dict(x=plgpu.SMEM((tiles.stages, *row), x_MD.dtype), values=plgpu.SMEM((2, *row), dtype),
                 barriers=plgpu.Barrier(num_barriers=tiles.stages))
  values, scale_M = plgpu.kernel(
    functools.partial(_kernel, tiles=tiles, eps=eps, normalised=norm_D is not None, dtype=dtype),
    out_type=(jax.ShapeDtypeStruct((M, *row), dtype), jax.ShapeDtypeStruct((M,), jnp.float32)),
    grid=(pl.cdiv(M, tiles.rows),), grid_names=('rows',), scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(),
  )(*operands)
  return values.reshape(M, D), scale_M


def _kernel(x_ref, *refs, tiles: GpuTiles, eps: float, normalised: bool, dtype, x, values, barriers):
  *norm, values_ref, scale_ref = refs
  (M, *shape), stages = x_ref.shape, tiles.stages
  first = lax.axis_index('rows') * tiles.rows
  count = jnp.minimum(M - first, tiles.rows)
  strided = plgpu.Layout.WG_STRIDED(tuple(shape), vec_size=4)
  if normalised: norm_D = plgpu.layout_cast(norm[0][...], strided)

  def fetch(i):
    slot = lax.rem(i, stages)
    pl.when(i < count)(lambda: plgpu.copy_gmem_to_smem(x_ref.at[first + i], x.at[slot], barriers.at[slot]))

  for i in range(stages): fetch(jnp.int32(i))

  def row(i, _):
    slot, out = lax.rem(i, stages), lax.rem(i, 2)
    plgpu.barrier_wait(barriers.at[slot])
    y_D = plgpu.layout_cast(x[slot], strided).astype(jnp.float32)
    if normalised:
      y_D = y_D * lax.rsqrt(jnp.sum(y_D * y_D) * (1 / math.prod(shape)) + eps) * norm_D
    scale = jnp.maximum(jnp.max(jnp.abs(y_D)), SMALLEST) * (1 / largest(dtype))
    y_D = y_D * (1 / scale)
    if dtype == jnp.int8: y_D = jnp.round(y_D)
    limit = largest(dtype)
    y_D = jnp.minimum(jnp.maximum(y_D, -limit), limit)
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    values[out] = y_D.astype(dtype)
    scale_ref[first + i] = scale
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values.at[out], values_ref.at[first + i])
    fetch(i + stages)

  lax.fori_loop(0, count, row, None)
  plgpu.wait_smem_to_gmem(0)
