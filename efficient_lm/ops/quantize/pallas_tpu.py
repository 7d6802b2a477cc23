"""Quantization of rows on TPU: some whole rows at a time in VMEM, read once and written once as bytes.

The Hadamard product is one on the matrix unit, of 128 columns or more: smaller blocks stand on the diagonal of one of 128.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_lm.ops.quantize.grid import as_values, hadamard_matrix, step_of
from efficient_lm.ops.quantize.tiles import VMEM, TpuTiles, tpu_tiles_for, vmem

LANES = 128
LARGEST_BLOCK = 1024


def refuses(x_MD, *, hadamard=None, **_) -> str:
  """Why this kernel cannot take these arguments, or ''."""
  D = x_MD.shape[1]
  if D % LANES: return f'rows of {D} numbers: must be a multiple of {LANES}'
  if hadamard is not None and hadamard > LARGEST_BLOCK: return f'Hadamard blocks of {hadamard}: at most {LARGEST_BLOCK}'
  if vmem(TpuTiles(32), D, x_MD.dtype.itemsize) > VMEM: return f'32 rows of {D} numbers do not fit VMEM'
  return ''


def quantize(x_MD, *, dtype, norm_D=None, eps: float = 1e-6, hadamard: int | None = None, tiles: TpuTiles | None = None):
  """See the API."""
  M, D = x_MD.shape
  rows = (tiles or tpu_tiles_for(M, D, x_MD.dtype.itemsize)).rows
  operands, specs = [x_MD], [pl.BlockSpec((rows, D), lambda i: (i, 0))]
  if norm_D is not None:
    operands.append(norm_D.astype(jnp.float32)[None])
    specs.append(pl.BlockSpec((1, D), lambda i: (0, 0)))
  if hadamard is not None:
    matrix = np.kron(np.eye(max(1, LANES // hadamard)), hadamard_matrix(hadamard))
    operands.append(jnp.asarray(matrix, jnp.bfloat16))   # ones and minus ones: exact
    specs.append(pl.BlockSpec(matrix.shape, lambda i: (0, 0)))
  values_MD, scale_M1 = pl.pallas_call(
    functools.partial(_kernel, normalised=norm_D is not None, eps=eps, hadamard=hadamard),
    out_shape=(jax.ShapeDtypeStruct((M, D), dtype), jax.ShapeDtypeStruct((M, 1), jnp.float32)),
    grid=(pl.cdiv(M, rows),), in_specs=specs,
    out_specs=(pl.BlockSpec((rows, D), lambda i: (i, 0)), pl.BlockSpec((rows, 1), lambda i: (i, 0))),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)), name='quantize',
  )(*operands)
  return values_MD, scale_M1[:, 0]


def _kernel(x_ref, *refs, normalised: bool, eps: float, hadamard: int | None):
  *more, values_ref, scale_ref = refs
  y_MD = x_ref[...].astype(jnp.float32)
  if normalised: y_MD = y_MD * lax.rsqrt(jnp.mean(y_MD * y_MD, axis=1, keepdims=True) + eps) * more[0][...]
  if hadamard is not None: y_MD = _rotated(y_MD, more[-1][...]) * hadamard ** -.5
  scale_M1 = step_of(jnp.max(jnp.abs(y_MD), axis=1, keepdims=True), values_ref.dtype)
  values_ref[...] = as_values(y_MD * (1 / scale_M1), values_ref.dtype)
  scale_ref[...] = scale_M1


def _rotated(y_MD, h_QQ):
  """y H in blocks. H is exact in bfloat16, and y is the sum of three bfloat16 numbers: three products, not the six that two
  float32 operands take."""
  size, total = h_QQ.shape[0], 0
  for _ in range(3):
    part_MD = y_MD.astype(jnp.bfloat16)
    y_MD = y_MD - part_MD.astype(jnp.float32)
    total += jnp.concatenate([jnp.dot(part_MD[:, j:j + size], h_QQ, preferred_element_type=jnp.float32)
                              for j in range(0, part_MD.shape[1], size)], axis=1)
  return total
