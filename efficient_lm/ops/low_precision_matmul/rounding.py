"""Rounding of the operands of a product along the dimension that it sums over: round-to-nearest (RTN) or stochastic."""
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.absmax import SMALL, largest, nearest, scale_of

# The format of gradients -> the format of the weights or activations that they are multiplied with.
FORMATS = {'int8': 'int8', 'float8_e4m3fn': 'float8_e4m3fn', 'float8_e5m2': 'float8_e4m3fn'}


class Passes(NamedTuple):
  """The format of each pass, or None for a pass whose operands are not rounded."""
  forward: str | None = None
  dgrad: str | None = None
  wgrad: str | None = None


def noise(key, shape: tuple[int, int]):
  """16 random bits for each number, uint16: a hash of the number's position and the key. The generator of `jax.random` is a
  cipher: on a CPU it takes ten times as long as this, which is as long as the product that the noise is for."""
  rows, columns = shape
  first, *_, last = jax.random.key_data(key)
  words = rows, -(-columns // 2)   # of 32 bits
  place = lax.broadcasted_iota(jnp.uint32, words, 0) * jnp.uint32(words[1]) + lax.broadcasted_iota(jnp.uint32, words, 1)
  bits = place * jnp.uint32(0x9E3779B1) + first
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B) ^ last   # the finaliser of MurmurHash3 (Appleby), mixed with the key
  bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
  return lax.bitcast_convert_type(bits ^ (bits >> 16), jnp.uint16).reshape(rows, -1)[:, :columns]


def rounded(a, axis: int, dtype, noise=None):
  """Values of `dtype` in the shape of a, and float32 scales with a 1 for the dim `axis`, along which numbers share a scale:
  a ≈ values * scale. With `noise`, rounding is stochastic, and the mean of values * scale over the noise is a."""
  a = a.astype(jnp.float32)
  scale = scale_of(jnp.max(jnp.abs(a), axis=axis, keepdims=True), largest(dtype), SMALL)
  y = a * (1 / scale)
  return nearest(y, dtype) if noise is None else at_random(y, dtype, noise), scale


def at_random(y, dtype, noise):
  """floor(y + u) in units of the distance of neighbouring values of `dtype` at y, with u uniform in (0, 1). Its mean is
  y."""
  step = _step(y, jnp.dtype(dtype))
  u = (noise.astype(jnp.float32) + 0.5) * 2. ** -16
  limit = largest(dtype)
  return jnp.clip(jnp.floor(y / step + u) * step, -limit, limit).astype(dtype)


def _step(y, dtype):
  """The distance of neighbouring values of `dtype` at y: 1 for integers, a power of two by the exponent of y for floats."""
  if jnp.issubdtype(dtype, jnp.integer): return jnp.float32(1)
  info = jnp.finfo(dtype)
  power = lax.bitcast_convert_type(lax.bitcast_convert_type(y, jnp.uint32) & 0x7f80_0000, jnp.float32)   # 2^exponent of |y|
  return jnp.maximum(power, info.smallest_normal.astype(jnp.float32)) * 2. ** -info.nmant


def run_of_rows(M: int, E: int) -> int:
  """Rows of a group that share scales in the gradient of its matrix: about as many as an average group has, at most 256."""
  return min(max(8, 2 ** round(math.log2(max(M / E, 1)))), 256)
