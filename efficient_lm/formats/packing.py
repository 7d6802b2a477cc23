"""Codes of fewer than eight bits in whole bytes, along the last dimension.

The first code lies in the lowest bits. Codes of 4 and 2 bits lie as `ops.quantized_matmul` reads them; of 3 bits, eight
fill three bytes.
"""
import math

from efficient_lm.errors import Misfit
from efficient_lm.lazy import lazy

jnp = lazy('jax.numpy')


def pack(codes, bits: int):
  """int8 or uint8 codes (..., K), of which the low `bits` count, -> uint8 (..., K * bits / 8); of 8 bits themselves."""
  if bits == 8: return codes
  per_byte, K = 8 // math.gcd(bits, 8), codes.shape[-1]
  if K % per_byte: raise Misfit(f'{K} codes of {bits} bits do not fill whole bytes: their number must be a multiple of '
                                    f'{per_byte}')
  # per_byte codes are one integer of up to 24 bits, and that is cut into bytes.
  fields = codes.astype(jnp.int32).reshape(*codes.shape[:-1], K // per_byte, per_byte) & (2 ** bits - 1)
  whole = jnp.sum(fields << (bits * jnp.arange(per_byte)), axis=-1, keepdims=True)
  return ((whole >> (8 * jnp.arange(per_byte * bits // 8))) & 255).astype(jnp.uint8).reshape(*codes.shape[:-1], -1)


def unpack(packed, bits: int):
  """uint8 (..., K * bits / 8) -> int8 (..., K) in two's complement of `bits` bits; of 8 bits what it was given."""
  if bits == 8: return packed
  per_byte = 8 // math.gcd(bits, 8)
  num_bytes = per_byte * bits // 8
  parts = packed.astype(jnp.int32).reshape(*packed.shape[:-1], packed.shape[-1] // num_bytes, num_bytes)
  whole = jnp.sum(parts << (8 * jnp.arange(num_bytes)), axis=-1, keepdims=True)
  fields = (whole >> (bits * jnp.arange(per_byte))) & (2 ** bits - 1)
  signed = jnp.where(fields >= 2 ** (bits - 1), fields - 2 ** bits, fields)
  return signed.astype(jnp.int8).reshape(*packed.shape[:-1], -1)
