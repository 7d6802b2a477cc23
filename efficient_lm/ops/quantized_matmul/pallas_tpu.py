"""Quantized products on a TPU: the weight is read at its stored size and unpacked in VMEM, just before the matrix unit.

The grid has tiles of rows, tiles of outputs, and steps over the inputs. Products of integers are summed in int32 and are
multiplied by their scales once, at the last step. Otherwise each step dequantizes its block of the weight in float32, group
by group, and rounds it once to the dtype of x. Packed numbers are never interleaved: each plane (`ops.packing`) is
multiplied by the inputs that belong to it, which have been put side by side beforehand.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_lm.ops.packing import wide_planes
from efficient_lm.ops.quantized_matmul.storage import QuantizedMatrix, quantize_rows
from efficient_lm.ops.quantized_matmul.tiles import MiB, TpuTiles, steps_of, tpu_tiles
from efficient_lm.ops.quantized_matmul.xla import split


def quantized_matmul(x_MI, w: QuantizedMatrix, activations: str | None = None, *, tiles: TpuTiles | None = None):
  """See the API."""
  (M, I), O = x_MI.shape, w.shape[0]
  tiles = tiles or tpu_tiles(M, w, activations)
  x, scale_M1 = (x_MI, None) if activations is None else quantize_rows(x_MI, jnp.dtype(activations))
  x_PMI = jnp.stack(split(x, w.bits))
  values = w.values if w.bits == 8 else lax.bitcast_convert_type(w.values, jnp.int8)
  per_byte, width = 8 // w.bits, w.values.shape[1]
  spec = lambda shape, index: pl.BlockSpec(shape, index)
  operands = [x_PMI, values]
  specs = [spec((per_byte, tiles.M, tiles.I), lambda m, o, i: (0, m, i)), spec((tiles.O, tiles.I), lambda m, o, i: (o, i))]
  if activations is None:
    kernel, sums = functools.partial(_float_kernel, bits=w.bits, zeros=w.zero_QO is not None), jnp.float32
    group = w.group * w.bits // 8
    for array_QO in (w.scale_QO, w.zero_QO):
      if array_QO is None: continue
      per_step = max(tiles.I // group, 1)
      # (Q, O) -> (Q / per_step, O, per_step): a column for each group of a step, along the weight's rows.
      operands.append(array_QO.astype(jnp.float32).reshape(-1, per_step, O).swapaxes(1, 2))
      specs.append(spec((None, tiles.O, per_step), lambda m, o, i: (i * tiles.I // max(group, tiles.I), o, 0)))
  else:
    kernel = functools.partial(_integer_kernel, bits=w.bits)
    sums = jnp.int32 if activations == 'int8' else jnp.float32
    operands += [scale_M1, w.scale_QO.astype(jnp.float32)]
    specs += [spec((tiles.M, 1), lambda m, o, i: (m, 0)), spec((1, tiles.O), lambda m, o, i: (0, o))]
  return pl.pallas_call(
    kernel, out_shape=jax.ShapeDtypeStruct((M, O), x_MI.dtype),
    grid=(pl.cdiv(M, tiles.M), pl.cdiv(O, tiles.O), width // tiles.I),
    in_specs=specs, out_specs=spec((tiles.M, tiles.O), lambda m, o, i: (m, o)),
    scratch_shapes=[pltpu.VMEM((tiles.M, tiles.O), sums)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=tiles.vmem(w.bits, x.dtype.itemsize) + 16 * MiB),
    cost_estimate=pl.CostEstimate(flops=2 * M * I * O, transcendentals=0, bytes_accessed=(
      x.nbytes * pl.cdiv(O, tiles.O) + w.values.nbytes * pl.cdiv(M, tiles.M) + M * O * x_MI.dtype.itemsize)),
    name=f'quantized_matmul_w{w.bits}_{activations or x.dtype.name}',
  )(*operands)


def refuses(x_MI, w: QuantizedMatrix, activations: str | None = None, *, tiles: TpuTiles | None = None) -> str:
  """Why these kernels cannot take such arguments, '' if they can."""
  width, group = w.values.shape[1], w.group * w.bits // 8
  if x_MI.dtype not in (jnp.bfloat16, jnp.float32): return f'x is {x_MI.dtype}, neither bfloat16 nor float32'
  if 0 in x_MI.shape: return 'there is nothing to multiply'
  if width % 128: return f'a row of the weight has {width} bytes, no multiple of 128'
  if activations and w.scale_QO.shape[0] > 1: return 'rounded activations need one scale an output, not groups'
  if activations and w.zero_QO is not None: return 'rounded activations and zero points do not go together'
  if not activations and w.values.dtype == jnp.float8_e4m3fn: return 'a float8 weight needs float8 activations'
  if not steps_of(width, group, 512): return f'groups of {w.group} inputs neither divide 128 bytes nor are made of them'
  return ''


def _integer_kernel(x_ref, w_ref, scale_M1_ref, scale_1O_ref, y_ref, sum_ref, *, bits: int):
  """A step over the inputs: adds to the int32 sums of integers, or to the float32 sums of float8 numbers."""
  @pl.when(pl.program_id(2) == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  for p, plane in enumerate(wide_planes(w_ref[...], bits)):
    x = x_ref[p]
    # Only the newest TPU multiplies float8 numbers; in bfloat16 they are exact.
    if x.dtype == jnp.float8_e4m3fn: x, plane = x.astype(jnp.bfloat16), plane.astype(jnp.bfloat16)
    sum_ref[...] += _dot(x, plane.astype(x.dtype), sum_ref.dtype)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    y_ref[...] = (sum_ref[...].astype(jnp.float32) * scale_M1_ref[...] * scale_1O_ref[...]).astype(y_ref.dtype)


def _float_kernel(x_ref, w_ref, scale_OQ_ref, *refs, bits: int, zeros: bool):
  """A step over the inputs with the dequantized weight. refs: the zero points, if there are any, the result, the sums."""
  *zero_OQ_ref, y_ref, sum_ref = refs

  @pl.when(pl.program_id(2) == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  scale_OI = _spread(scale_OQ_ref[...], w_ref.shape[1])
  zero_OI = _spread(zero_OQ_ref[0][...], w_ref.shape[1]) if zeros else 0
  for p, plane in enumerate(wide_planes(w_ref[...], bits)):
    w_OI = ((plane.astype(jnp.float32) - zero_OI) * scale_OI).astype(x_ref.dtype)
    sum_ref[...] += _dot(x_ref[p], w_OI, jnp.float32)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _spread(a_OQ, width: int):
  """(O, Q) -> (O, width): each column is repeated over its group, 128 lanes at a time by selecting among few columns."""
  O, Q = a_OQ.shape
  if Q == 1: return a_OQ
  group = width // Q
  vectors = []
  for start in range(0, width, 128):
    first, last = start // group, (start + 127) // group
    vector = jnp.broadcast_to(a_OQ[:, first:first + 1], (O, 128))
    if last > first:
      member = lax.broadcasted_iota(jnp.int32, (O, 128), 1) // group
      for q in range(first + 1, last + 1):
        vector = jnp.where(member == q - first, jnp.broadcast_to(a_OQ[:, q:q + 1], (O, 128)), vector)
    vectors.append(vector)
  return jnp.concatenate(vectors, axis=1)


def _dot(x_MI, w_OI, dtype):
  """x @ w^T; float32 operands at full precision."""
  precision = lax.Precision.HIGHEST if x_MI.dtype == jnp.float32 else None
  return lax.dot_general(x_MI, w_OI, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=dtype)
