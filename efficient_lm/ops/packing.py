"""Codes of fewer than eight bits in whole bytes: the two orders in which they are stored, and their inverses.

Neighbours, for weights: codes follow each other along the last dimension, the first in the lowest bits, in two's
complement. Byte j holds codes 2j and 2j + 1 of 4 bits, or 4j to 4j + 3 of 2 bits; eight codes of 3 bits fill three bytes. It
is the order of `jnp.int4` in memory, and a row may be cut wherever whole bytes end.

Parts, where planes (below) must be whole stretches of what they stand for: byte j holds codes j, j + n, j + 2 n, …, the
first in the lowest bits, where n is the number of bytes. Of 4 bits these are halves, the order of the key-value cache.

Unpacked codes need not be interleaved. Bytes shifted by b bits are one *plane* of codes, and a product with a packed matrix
is the sum of the products with its planes: for neighbours y = x[:, 0::2] @ low^T + x[:, 1::2] @ high^T.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax


def codes_in_whole_bytes(bits: int) -> int:
  """The least number of codes that fill whole bytes: 1, 2, 8 or 4 for 8, 4, 3 or 2 bits."""
  return 8 // math.gcd(bits, 8)


def pack(codes, bits: int):
  """Neighbours: int8 or uint8 codes (..., I), of which the low `bits` count, -> uint8 (..., I * bits / 8).

  Args:
    codes: I of them in a row; of 8 bits they are returned as they are.
    bits: 8, 4, 3 or 2.

  Raises:
    ValueError: I codes do not fill whole bytes.
  """
  if bits == 8: return codes
  *lead, size = codes.shape
  count = codes_in_whole_bytes(bits)
  if size % count: raise ValueError(f'{size} codes of {bits} bits do not fill whole bytes: their number must be a multiple '
                                    f'of {count}')
  fields = codes.astype(jnp.int32).reshape(*lead, size // count, count) & (2 ** bits - 1)
  # The fields do not overlap, so their sum is their union: an integer of one byte, or of three bytes for 3 bits.
  whole = jnp.sum(fields << (bits * jnp.arange(count)), axis=-1)
  if bits != 3: return whole.astype(jnp.uint8)
  return ((whole[..., None] >> (8 * jnp.arange(3))) & 255).astype(jnp.uint8).reshape(*lead, -1)


def unpack(packed, bits: int):
  """The inverse of `pack`: uint8 (..., I * bits / 8) -> int8 (..., I), signed. Codes of 8 bits are returned as they are."""
  if bits == 8: return packed
  *lead, size = packed.shape
  if bits != 3: return jnp.stack(planes(packed, bits), axis=-1).reshape(*lead, -1)
  three = packed.astype(jnp.int32).reshape(*lead, size // 3, 3)
  whole = jnp.sum(three << (8 * jnp.arange(3)), axis=-1, keepdims=True)
  fields = (whole >> (3 * jnp.arange(8))) & 7
  return jnp.where(fields >= 4, fields - 8, fields).astype(jnp.int8).reshape(*lead, -1)


def planes(packed, bits: int) -> list[jax.Array]:
  """8 / bits arrays of signed int8 in the shape of the bytes; of 8 bits the codes themselves.

  Of neighbours, plane p holds codes p, p + 8 / bits, p + 2 * 8 / bits, …; of parts, plane p holds part p.
  """
  if bits == 8: return [packed]
  signed = lax.bitcast_convert_type(packed, jnp.int8)
  # Up to the top of the byte and down again: the second shift spreads the sign.
  return [lax.shift_right_arithmetic(lax.shift_left(signed, jnp.int8(8 - bits - shift)), jnp.int8(8 - bits))
          for shift in range(0, 8, bits)]


def wide_planes(packed, bits: int) -> list[jax.Array]:
  """`planes` as int32, for TPU kernels, whose vectors have no shifts of bytes; of 8 bits the codes themselves."""
  if bits == 8: return [packed]
  wide = packed.astype(jnp.int32)
  return [lax.shift_right_arithmetic(lax.shift_left(wide, 32 - bits - shift), 32 - bits) for shift in range(0, 8, bits)]


def as_int4(packed):
  """uint8 (..., n) -> int4 (..., 2 n): the same bytes, read as XLA and GPU kernels read them."""
  return lax.bitcast_convert_type(packed, jnp.int4).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def pack_parts(codes, bits: int):
  """Parts: int8 codes (..., I), of which the low `bits` count, -> uint8 (..., I * bits / 8), for 4 or 2 bits and whole
  bytes. Codes of 8 bits are returned as they are."""
  if bits == 8: return codes
  parts = jnp.split(codes.astype(jnp.uint8) & jnp.uint8(2 ** bits - 1), 8 // bits, axis=-1)
  return functools.reduce(jnp.bitwise_or, [part << jnp.uint8(bits * p) for p, part in enumerate(parts)])


def unpack_parts(packed, bits: int):
  """The inverse of `pack_parts`: uint8 (..., n) -> int8 (..., n * 8 / bits)."""
  return jnp.concatenate(planes(packed, bits), axis=-1)


def pack_halves(codes):
  """Parts of 4 bits: int8 codes in [-8, 7], (..., H) with H even, -> uint8 (..., H / 2)."""
  return pack_parts(codes, 4)


def unpack_halves(packed):
  """The inverse of `pack_halves`: uint8 (..., H / 2) -> int8 (..., H)."""
  return unpack_parts(packed, 4)
