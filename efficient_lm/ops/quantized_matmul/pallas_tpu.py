"""Quantized products on a TPU: the weight is read at its stored size and unpacked in VMEM, on the way to the matrix unit.

The grid walks tiles of rows, of outputs, and steps over the inputs. Integers times integers are summed in int32 and meet
their scales once, at the last step. Otherwise each step dequantises its block of the weight in float32, group by group, and
rounds it once to the dtype of x. Packed numbers are never interleaved: each plane of a byte meets the inputs that belong to
it, which have been put side by side beforehand; see `storage`.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_lm.ops.quantized_matmul.storage import QuantizedMatrix, quantize_rows
from efficient_lm.ops.quantized_matmul.tiles import MiB, TpuTiles, steps_of, tpu_tiles
from efficient_lm.ops.quantized_matmul.xla import split


def quantized_matmul(x_MK, w: QuantizedMatrix, activations: str | None = None, *, tiles: TpuTiles | None = None):
  """See the API."""
  (M, K), N = x_MK.shape, w.shape[0]
  tiles = tiles or tpu_tiles(M, w, activations)
  x, scale_M1 = (x_MK, None) if activations is None else quantize_rows(x_MK, jnp.dtype(activations))
  x_PMK = jnp.stack(split(x, w.bits))
  values = w.values if w.bits == 8 else lax.bitcast_convert_type(w.values, jnp.int8)
  per_byte, width = 8 // w.bits, w.values.shape[1]
  spec = lambda shape, index: pl.BlockSpec(shape, index)
  operands = [x_PMK, values]
  specs = [spec((per_byte, tiles.M, tiles.K), lambda m, n, k: (0, m, k)), spec((tiles.N, tiles.K), lambda m, n, k: (n, k))]
  if activations is None:
    kernel, sums = functools.partial(_float_kernel, bits=w.bits, zeros=w.zero_QN is not None), jnp.float32
    group = w.group * w.bits // 8
    for array_QN in (w.scale_QN, w.zero_QN):
      if array_QN is None: continue
      per_step = max(tiles.K // group, 1)
      # (Q, N) -> (Q / per_step, N, per_step): a column for each group of a step, along the weight's rows.
      operands.append(array_QN.astype(jnp.float32).reshape(-1, per_step, N).swapaxes(1, 2))
      specs.append(spec((None, tiles.N, per_step), lambda m, n, k: (k * tiles.K // max(group, tiles.K), n, 0)))
  else:
    kernel = functools.partial(_integer_kernel, bits=w.bits)
    sums = jnp.int32 if activations == 'int8' else jnp.float32
    operands += [scale_M1, w.scale_QN.astype(jnp.float32)]
    specs += [spec((tiles.M, 1), lambda m, n, k: (m, 0)), spec((1, tiles.N), lambda m, n, k: (0, n))]
  return pl.pallas_call(
    kernel, out_shape=jax.ShapeDtypeStruct((M, N), x_MK.dtype),
    grid=(pl.cdiv(M, tiles.M), pl.cdiv(N, tiles.N), width // tiles.K),
    in_specs=specs, out_specs=spec((tiles.M, tiles.N), lambda m, n, k: (m, n)),
    scratch_shapes=[pltpu.VMEM((tiles.M, tiles.N), sums)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=tiles.vmem(w.bits, x.dtype.itemsize) + 16 * MiB),
    cost_estimate=pl.CostEstimate(flops=2 * M * K * N, transcendentals=0, bytes_accessed=(
      x.nbytes * pl.cdiv(N, tiles.N) + w.values.nbytes * pl.cdiv(M, tiles.M) + M * N * x_MK.dtype.itemsize)),
    name=f'quantized_matmul_w{w.bits}_{activations or x.dtype.name}',
  )(*operands)


def refuses(x_MK, w: QuantizedMatrix, activations: str | None = None, *, tiles: TpuTiles | None = None) -> str:
  """Why these kernels cannot take such arguments, '' if they can."""
  width, group = w.values.shape[1], w.group * w.bits // 8
  if x_MK.dtype not in (jnp.bfloat16, jnp.float32): return f'x is {x_MK.dtype}, neither bfloat16 nor float32'
  if 0 in x_MK.shape: return 'there is nothing to multiply'
  if width % 128: return f'a row of the weight has {width} bytes, no multiple of 128'
  if activations and w.scale_QN.shape[0] > 1: return 'rounded activations need one scale an output, not groups'
  if activations and w.zero_QN is not None: return 'rounded activations and zero points do not go together'
  if not activations and w.values.dtype == jnp.float8_e4m3fn: return 'a float8 weight needs float8 activations'
  if not steps_of(width, group, 512): return f'groups of {w.group} inputs neither divide 128 bytes nor are made of them'
  return ''


def _integer_kernel(x_ref, w_ref, scale_M1_ref, scale_1N_ref, y_ref, sum_ref, *, bits: int):
  """A step over the inputs: integer sums, or those of float8 in float32."""
  @pl.when(pl.program_id(2) == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  for p, plane in enumerate(_planes(w_ref[...], bits)):
    x = x_ref[p]
    # Of the TPUs only the newest multiplies float8; in bfloat16 it is exact.
    if x.dtype == jnp.float8_e4m3fn: x, plane = x.astype(jnp.bfloat16), plane.astype(jnp.bfloat16)
    sum_ref[...] += _dot(x, plane.astype(x.dtype), sum_ref.dtype)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    y_ref[...] = (sum_ref[...].astype(jnp.float32) * scale_M1_ref[...] * scale_1N_ref[...]).astype(y_ref.dtype)


def _float_kernel(x_ref, w_ref, scale_NQ_ref, *refs, bits: int, zeros: bool):
  """A step over the inputs with the weight dequantised. refs: the zero points, if there are any, the result, the sums."""
  *zero_NQ_ref, y_ref, sum_ref = refs

  @pl.when(pl.program_id(2) == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  scale_NK = _spread(scale_NQ_ref[...], w_ref.shape[1])
  zero_NK = _spread(zero_NQ_ref[0][...], w_ref.shape[1]) if zeros else 0
  for p, plane in enumerate(_planes(w_ref[...], bits)):
    w_NK = ((plane.astype(jnp.float32) - zero_NK) * scale_NK).astype(x_ref.dtype)
    sum_ref[...] += _dot(x_ref[p], w_NK, jnp.float32)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _planes(w_NK, bits: int) -> list:
  """int32 numbers of each plane of packed bytes (8 bits: the numbers as they are). There are no shifts of bytes."""
  if bits == 8: return [w_NK]
  wide = w_NK.astype(jnp.int32)
  return [lax.shift_right_arithmetic(lax.shift_left(wide, 32 - bits - shift), 32 - bits) for shift in range(0, 8, bits)]


def _spread(a_NQ, width: int):
  """(N, Q) -> (N, width): each column repeated over its group, a vector of 128 at a time by selecting among few columns."""
  N, Q = a_NQ.shape
  if Q == 1: return a_NQ
  group = width // Q
  vectors = []
  for start in range(0, width, 128):
    first, last = start // group, (start + 127) // group
    vector = jnp.broadcast_to(a_NQ[:, first:first + 1], (N, 128))
    if last > first:
      member = lax.broadcasted_iota(jnp.int32, (N, 128), 1) // group
      for q in range(first + 1, last + 1):
        vector = jnp.where(member == q - first, jnp.broadcast_to(a_NQ[:, q:q + 1], (N, 128)), vector)
    vectors.append(vector)
  return jnp.concatenate(vectors, axis=1)


def _dot(x_MK, w_NK, dtype):
  """x @ w^T; float32 operands at full precision."""
  precision = lax.Precision.HIGHEST if x_MK.dtype == jnp.float32 else None
  return lax.dot_general(x_MK, w_NK, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=dtype)
