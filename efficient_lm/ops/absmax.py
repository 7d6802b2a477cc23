"""Symmetric rounding by the largest magnitude ("absmax"), shared by all operations and formats:

  scale = max |x| / limit;   values = round(x / scale), cut off at ±limit

It is round-to-nearest (RTN), and of two equally near values the even one is taken. |x - values * scale| is at most half a
scale for integers, and half the distance of neighbouring values times the scale for float8.
"""
import jax.numpy as jnp
import numpy as np

TINY = float(np.finfo(np.float32).tiny)   # the least normal float32 number
# `least` where numbers are multiplied by the reciprocal of a scale, or by a kernel's factor that contains it: below this the
# factor may leave the normal float32 numbers.
SMALL = 1e-30


def largest(dtype) -> float:
  """The largest value of a quantized dtype that is used: the grid is symmetric, so int8 goes to 127 on both sides."""
  dtype = jnp.dtype(dtype)
  return float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)


def scale_of(absmax, limit: float, least: float | None = None):
  """The scale that maps magnitudes `absmax` to `limit`: positive, so that zeros stay zeros, and finite with its reciprocal.

  Args:
    absmax: the largest magnitudes, float32, of any shape.
    limit: the largest value of the grid, in steps.
    least: smaller magnitudes count as this one; by default the one whose scale is the least normal float32 number.
  """
  return jnp.maximum(absmax, limit * TINY if least is None else least) / limit


def nearest(y, dtype=jnp.int8, limit: float | None = None, lowest: float | None = None):
  """y, in steps, rounded to the nearest value of `dtype` from `lowest` to `limit`.

  limit: the largest value of the dtype by default. lowest: -limit by default.
  """
  limit = largest(dtype) if limit is None else limit
  if jnp.issubdtype(jnp.dtype(dtype), jnp.integer): y = jnp.round(y)
  return jnp.clip(y, -limit if lowest is None else lowest, limit).astype(dtype)


def values_and_scale(x, dtype=jnp.int8, *, axis: int = -1, limit: float | None = None, least: float | None = None):
  """Values of `dtype` in the shape of x, and their float32 scale with a 1 for `axis`: x ≈ values * scale.

  Args:
    x: float, of any shape; numbers along `axis` share a scale.
    limit, least: see `nearest` and `scale_of`.
  """
  x, limit = x.astype(jnp.float32), largest(dtype) if limit is None else limit
  scale = scale_of(jnp.max(jnp.abs(x), axis=axis, keepdims=True), limit, least)
  return nearest(x / scale, dtype, limit), scale
