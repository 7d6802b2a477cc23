"""The storage of quantized matrices, quantizing and dequantizing.

A matrix is stored with its outputs first, w_OI, so that the inputs of one output lie together: products with few rows read
  it fastest in this order, and it is the only one in which Hopper multiplies 8-bit numbers. Numbers of 4 or 2 bits are
  packed two or four to a byte along I, as neighbours (`ops.packing`), so that I may be cut wherever a group of scales ends.
"""
import dataclasses

import jax
import jax.numpy as jnp

from efficient_lm.ops import absmax
from efficient_lm.ops.packing import pack, unpack

FLOAT8 = jnp.float8_e4m3fn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
  """w_OI[o, i] = (q_OI[o, i] - zero_QO[i // group, o]) * scale_QO[i // group, o], with group = I / Q.

  values: q_OI as int8 or float8_e4m3fn (bits 8), or packed, uint8 (O, I * bits / 8) (bits 4 or 2).
  scale_QO: float; Q = 1 is one scale an output.
  zero_QO: float, in steps, or None for 0. It need not be an integer: with -0.5 the grid of 2 bits is ±0.5, ±1.5.
  bits: 8, 4 or 2.
  """
  values: jax.Array
  scale_QO: jax.Array
  zero_QO: jax.Array | None = None
  bits: int = dataclasses.field(default=8, metadata={'static': True})

  @property
  def shape(self) -> tuple[int, int]:
    """(O, I) of the matrix, for any number of bits."""
    return self.values.shape[0], self.values.shape[1] * 8 // self.bits

  @property
  def group(self) -> int:
    """The number of inputs that share a scale."""
    return self.shape[1] // self.scale_QO.shape[0]


def integers(w: QuantizedMatrix):
  """q_OI of a matrix, unpacked: int8 or float8."""
  return unpack(w.values, w.bits)


def dequantize(w: QuantizedMatrix, dtype=jnp.float32):
  """w_OI, computed in float32 and rounded once to `dtype`."""
  O, I = w.shape
  q_OQJ = integers(w).astype(jnp.float32).reshape(O, -1, w.group)
  if w.zero_QO is not None: q_OQJ -= w.zero_QO.T.astype(jnp.float32)[..., None]
  return (q_OQJ * w.scale_QO.T.astype(jnp.float32)[..., None]).reshape(O, I).astype(dtype)


def quantize(w_OI, bits: int = 8, group: int | None = None, *, dtype=jnp.int8, symmetric: bool = True) -> QuantizedMatrix:
  """Round-to-nearest (RTN) on a grid that just holds the numbers of each group: the error is at most half a step.

  Args:
    w_OI: the matrix, its outputs first.
    bits: 8, 4 or 2.
    group: inputs that share a scale, a divisor of I; I by default.
    dtype: int8, or float8_e4m3fn with 8 bits, whose steps grow with the numbers.
    symmetric: True for a grid around 0 that does not use its lowest integer, so that 2 bits are ternary. False for a zero
      point that places the grid between the group's smallest and largest number; not for float8.

  Raises:
    ValueError: groups do not divide I or do not fill whole bytes, or bits and dtype do not suit each other.
  """
  O, I = w_OI.shape
  group = group or I
  if I % group or group * bits % 8: raise ValueError(f'groups of {group}: must divide {I} inputs and fill whole bytes')
  if bits not in (8, 4, 2): raise ValueError(f'{bits} bits: storage is for 8, 4 or 2')
  if dtype == FLOAT8 and (bits != 8 or not symmetric): raise ValueError('float8 has 8 bits and no zero point')
  w_OQJ = w_OI.astype(jnp.float32).reshape(O, I // group, group)
  if symmetric:
    limit = None if dtype == FLOAT8 else 2 ** (bits - 1) - 1
    (q_OQJ, scale_OQ1), zero_OQ1 = absmax.values_and_scale(w_OQJ, dtype, limit=limit), None
  else:
    low_OQ1, high_OQ1 = jnp.min(w_OQJ, axis=-1, keepdims=True), jnp.max(w_OQJ, axis=-1, keepdims=True)
    # The zero point of a group of equal numbers, whose extent is 0, must stay finite.
    extent_OQ1 = jnp.maximum(high_OQ1 - low_OQ1, 2.0 ** -16 * jnp.maximum(-low_OQ1, high_OQ1))
    scale_OQ1 = absmax.scale_of(extent_OQ1, 2 ** bits - 1)
    zero_OQ1 = -2 ** (bits - 1) - low_OQ1 / scale_OQ1
    q_OQJ = absmax.nearest(w_OQJ / scale_OQ1 + zero_OQ1, limit=2 ** (bits - 1) - 1, lowest=-2 ** (bits - 1))
  zero_QO = None if zero_OQ1 is None else zero_OQ1[..., 0].T
  return QuantizedMatrix(pack(q_OQJ.reshape(O, I), bits), scale_OQ1[..., 0].T, zero_QO, bits)


def quantize_rows(x_MI, dtype=jnp.int8):
  """Values of `dtype` (int8 or float8_e4m3fn) and float32 scale_M1, one a row, such that x ≈ values * scale.

  It is plain jnp on every device, and no part of a kernel: XLA fuses it with the operation that computes x, which is often a
  normalisation and has the whole row already.
  """
  return absmax.values_and_scale(x_MI, dtype)
