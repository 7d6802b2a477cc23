"""Which numbers of a group are the smallest, for any score and without sorting."""
import jax.numpy as jnp
from jax import lax


def lowest(values, count):
  """bool, True for the `count` smallest of the last dim, of equal ones the first.

  values: floats of either sign, infinite ones too, no NaN; compared as float32. count: whole numbers, from 0 to the size of
  that dim, which broadcast against (…, 1).

  The smallest value that is not among them is found by bisecting the bits of floats, which are ordered as the floats are,
  once those of negative ones are flipped: 32 passes over the array, where sorting takes many more.
  """
  bits = _ordered(values)
  count = jnp.asarray(count, jnp.int32)
  smaller = lambda threshold: jnp.sum(bits < threshold, -1, dtype=jnp.int32, keepdims=True)

  def bisected(i, threshold):
    higher = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
    return jnp.where(smaller(higher) <= count, higher, threshold)

  threshold = lax.fori_loop(0, 32, bisected, jnp.zeros((*bits.shape[:-1], 1), jnp.uint32))
  equal = bits == threshold
  return (bits < threshold) | (equal & (jnp.cumsum(equal, -1, dtype=jnp.int32) <= count - smaller(threshold)))


def _ordered(values):
  """uint32, in the order of the floats; zeros of either sign are equal."""
  bits, sign = lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32), jnp.uint32(1 << 31)
  bits = jnp.where(bits == sign, 0, bits)
  return jnp.where(bits & sign, ~bits, bits | sign)
