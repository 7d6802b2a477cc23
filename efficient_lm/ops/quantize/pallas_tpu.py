"""Quantization of rows on TPU: some whole rows at a time lie in VMEM, are read once, and are written once as bytes.

The Hadamard product is computed by the matrix unit with matrices of at least 128 columns: smaller blocks form the diagonal
of a matrix of 128.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_lm.ops.absmax import SMALL, largest, nearest, scale_of
from efficient_lm.ops.hadamard import sylvester
from efficient_lm.ops.quantize.tiles import VMEM, TpuTiles, tpu_tiles_for, vmem

LANES = 128
LARGEST_BLOCK = 1024


def refuses(x_MI, *, block=None, **_) -> str:
  """Why this kernel cannot take these arguments, or ''."""
  I = x_MI.shape[1]
  if I % LANES: return f'rows of {I} numbers: must be a multiple of {LANES}'
  if block is not None and block > LARGEST_BLOCK: return f'Hadamard blocks of {block}: at most {LARGEST_BLOCK}'
  if vmem(TpuTiles(32), I, x_MI.dtype.itemsize) > VMEM: return f'32 rows of {I} numbers do not fit VMEM'
  return ''


def quantize(x_MI, *, dtype, norm_I=None, eps: float = 1e-6, block: int | None = None, tiles: TpuTiles | None = None):
  """See the API."""
  M, I = x_MI.shape
  rows = (tiles or tpu_tiles_for(M, I, x_MI.dtype.itemsize)).rows
  operands, specs = [x_MI], [pl.BlockSpec((rows, I), lambda i: (i, 0))]
  if norm_I is not None:
    operands.append(norm_I.astype(jnp.float32)[None])
    specs.append(pl.BlockSpec((1, I), lambda i: (0, 0)))
  if block is not None:
    matrix = np.kron(np.eye(max(1, LANES // block)), sylvester(block))
    operands.append(jnp.asarray(matrix, jnp.bfloat16))   # ones and minus ones: exact
    specs.append(pl.BlockSpec(matrix.shape, lambda i: (0, 0)))
  values_MI, scale_M1 = pl.pallas_call(
    functools.partial(_kernel, normalised=norm_I is not None, eps=eps, block=block),
    out_shape=(jax.ShapeDtypeStruct((M, I), dtype), jax.ShapeDtypeStruct((M, 1), jnp.float32)),
    grid=(pl.cdiv(M, rows),), in_specs=specs,
    out_specs=(pl.BlockSpec((rows, I), lambda i: (i, 0)), pl.BlockSpec((rows, 1), lambda i: (i, 0))),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)), name='quantize',
  )(*operands)
  return values_MI, scale_M1[:, 0]


def _kernel(x_ref, *refs, normalised: bool, eps: float, block: int | None):
  *more, values_ref, scale_ref = refs
  y_MI = x_ref[...].astype(jnp.float32)
  if normalised: y_MI = y_MI * lax.rsqrt(jnp.mean(y_MI * y_MI, axis=1, keepdims=True) + eps) * more[0][...]
  if block is not None: y_MI = _rotated(y_MI, more[-1][...]) * block ** -.5
  scale_M1 = scale_of(jnp.max(jnp.abs(y_MI), axis=1, keepdims=True), largest(values_ref.dtype), SMALL)
  values_ref[...] = nearest(y_MI * (1 / scale_M1), values_ref.dtype)
  scale_ref[...] = scale_M1


def _rotated(y_MI, h_JJ):
  """y H in blocks. H is exact in bfloat16, and y is the sum of three bfloat16 numbers, so that three products are enough;
  with two float32 operands there would be six."""
  size, total = h_JJ.shape[0], 0
  for _ in range(3):
    part_MI = y_MI.astype(jnp.bfloat16)
    y_MI = y_MI - part_MI.astype(jnp.float32)
    total += jnp.concatenate([jnp.dot(part_MI[:, j:j + size], h_JJ, preferred_element_type=jnp.float32)
                              for j in range(0, part_MI.shape[1], size)], axis=1)
  return total
