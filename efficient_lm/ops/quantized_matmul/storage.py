"""How quantized matrices lie in memory, and how to get there and back.

A matrix lies with its outputs first, w_NK: what one output needs lies together, which is how a product with few rows reads
it fastest, and the only order in which Hopper multiplies 8-bit numbers. Numbers of 4 or 2 bits lie two or four to a byte
along K, the first in the lowest bits, in two's complement: byte j of a row holds inputs 2j and 2j + 1, or 4j to 4j + 3. It
is the order of `jnp.int4` in memory, K may be cut wherever a group of scales ends, and nothing else depends on K.

Nobody has to interleave what is unpacked. A byte shifted by b bits gives every second (fourth) input, a *plane*, and the
product is the sum of the products of planes: y = x[:, 0::2] @ low^T + x[:, 1::2] @ high^T. See `planes`.
"""
import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

FLOAT8 = jnp.float8_e4m3fn
LARGEST = {'int8': 127., 'float8_e4m3fn': 448.}   # magnitudes; -128 is left out so that the grid is symmetric


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
  """w_NK[n, k] = (q_NK[n, k] - zero_QN[k // group, n]) * scale_QN[k // group, n], with group = K / Q.

  values: q_NK as int8 or float8_e4m3fn (bits 8), or packed, uint8 (N, K * bits / 8) (bits 4 or 2).
  scale_QN: float; Q = 1 is one scale an output.
  zero_QN: float, in steps, or None for 0. It need not be whole: -0.5 makes 2 bits the grid ±0.5, ±1.5.
  """
  values: jax.Array
  scale_QN: jax.Array
  zero_QN: jax.Array | None = None
  bits: int = dataclasses.field(default=8, metadata={'static': True})

  @property
  def shape(self) -> tuple[int, int]:
    """(N, K) of the matrix, whatever its storage."""
    return self.values.shape[0], self.values.shape[1] * 8 // self.bits

  @property
  def group(self) -> int:
    """Inputs that share a scale."""
    return self.shape[1] // self.scale_QN.shape[0]


def pack_int4(q_NK):
  """Integers in [-8, 8), K even -> uint8 (N, K / 2); higher bits are dropped. `unpack_int4` is its inverse."""
  return _pack(q_NK, 4)


def unpack_int4(packed_NK):
  """uint8 (N, K / 2) -> int8 (N, K) in [-8, 8)."""
  return _unpack(packed_NK, 4)


def pack_int2(q_NK):
  """Integers in [-2, 2), K divisible by 4 -> uint8 (N, K / 4). Ternary weights are its -1, 0 and 1."""
  return _pack(q_NK, 2)


def unpack_int2(packed_NK):
  """uint8 (N, K / 4) -> int8 (N, K) in [-2, 2)."""
  return _unpack(packed_NK, 2)


def _pack(q_NK, bits: int):
  N, K = q_NK.shape
  per_byte = 8 // bits
  if K % per_byte: raise ValueError(f'{K} inputs of {bits} bits do not fill whole bytes: K must be divisible by {per_byte}')
  q_NKP = q_NK.astype(jnp.int32).reshape(N, K // per_byte, per_byte) & (2 ** bits - 1)
  # The fields do not overlap, so their sum is their union.
  return jnp.sum(q_NKP << (bits * jnp.arange(per_byte)), axis=-1).astype(jnp.uint8)


def _unpack(packed_NK, bits: int):
  return jnp.stack(planes(packed_NK, bits), axis=-1).reshape(packed_NK.shape[0], -1)


def planes(packed_NK, bits: int) -> list[jax.Array]:
  """8 / bits arrays in the shape of the bytes: int8 inputs p, p + 8 / bits, p + 2 * 8 / bits, … for p = 0, 1, …"""
  if bits == 8: return [packed_NK]
  signed = lax.bitcast_convert_type(packed_NK, jnp.int8)
  # Up to the top of the byte and down again: the second shift spreads the sign.
  return [lax.shift_right_arithmetic(lax.shift_left(signed, jnp.int8(8 - bits - shift)), jnp.int8(8 - bits))
          for shift in range(0, 8, bits)]


def integers(w: QuantizedMatrix):
  """q_NK of a matrix of any storage: int8 or float8."""
  return w.values if w.bits == 8 else _unpack(w.values, w.bits)


def dequantize(w: QuantizedMatrix, dtype=jnp.float32):
  """w_NK, computed in float32 and rounded once to `dtype`."""
  N, K = w.shape
  q_NQK = integers(w).astype(jnp.float32).reshape(N, -1, w.group)
  if w.zero_QN is not None: q_NQK -= w.zero_QN.T.astype(jnp.float32)[..., None]
  return (q_NQK * w.scale_QN.T.astype(jnp.float32)[..., None]).reshape(N, K).astype(dtype)


def quantize(w_NK, bits: int = 8, group: int | None = None, *, dtype=jnp.int8, symmetric: bool = True) -> QuantizedMatrix:
  """Rounds to the nearest point of a grid that just holds each group's numbers: error at most half a step.

  Args:
    w_NK: the matrix, outputs first.
    bits: 8, 4 or 2.
    group: inputs that share a scale, a divisor of K; K by default.
    dtype: int8, or float8_e4m3fn with 8 bits, whose steps grow with the number.
    symmetric: the grid's middle is 0 and its lowest integer is not used, so that 2 bits are ternary. Otherwise a zero point
      places the grid between the group's smallest and largest number; not for float8.
  """
  N, K = w_NK.shape
  group = group or K
  if K % group or group * bits % 8: raise ValueError(f'groups of {group}: must divide {K} inputs and fill whole bytes')
  if bits not in (8, 4, 2): raise ValueError(f'{bits} bits: storage is for 8, 4 or 2')
  w_NQK = w_NK.astype(jnp.float32).reshape(N, K // group, group)
  zero_NQ = None
  if dtype == FLOAT8:
    if bits != 8 or not symmetric: raise ValueError('float8 has 8 bits and no zero point')
    scale_NQ = _scale(jnp.max(jnp.abs(w_NQK), axis=-1), LARGEST['float8_e4m3fn'])
  elif symmetric:
    scale_NQ = _scale(jnp.max(jnp.abs(w_NQK), axis=-1), 2 ** (bits - 1) - 1)
  else:
    low_NQ, high_NQ = jnp.min(w_NQK, axis=-1), jnp.max(w_NQK, axis=-1)
    # A group of equal numbers has no extent, and its zero point must stay finite.
    extent_NQ = jnp.maximum(high_NQ - low_NQ, 2.0 ** -16 * jnp.maximum(-low_NQ, high_NQ))
    scale_NQ = _scale(extent_NQ, 2 ** bits - 1)
    zero_NQ = -2 ** (bits - 1) - low_NQ / scale_NQ
  q_NQK = w_NQK / scale_NQ[..., None]
  if zero_NQ is not None: q_NQK += zero_NQ[..., None]
  if dtype != FLOAT8: q_NQK = jnp.clip(jnp.round(q_NQK), -2 ** (bits - 1), 2 ** (bits - 1) - 1)
  q_NK = q_NQK.reshape(N, K).astype(dtype)
  values = q_NK if bits == 8 else _pack(q_NK, bits)
  return QuantizedMatrix(values, scale_NQ.T, None if zero_NQ is None else zero_NQ.T, bits)


def quantize_rows(x_MK, dtype=jnp.int8):
  """Values of `dtype` (int8 or float8_e4m3fn) and float32 scale_M1, one a row, such that x ≈ values * scale.

  Plain jnp on every device, and not part of a kernel: XLA fuses it with whatever made x, commonly a normalisation that has
  the row at hand.
  """
  x_MK = x_MK.astype(jnp.float32)
  scale_M1 = _scale(jnp.max(jnp.abs(x_MK), axis=-1, keepdims=True), LARGEST[jnp.dtype(dtype).name])
  q_MK = x_MK / scale_M1
  return (q_MK if dtype == FLOAT8 else jnp.round(q_MK)).astype(dtype), scale_M1


def _scale(extent, steps: float):
  """Never zero, and never so small that x / scale overflows: rows of zeros stay zeros."""
  return jnp.maximum(extent / steps, jnp.finfo(jnp.float32).tiny)
