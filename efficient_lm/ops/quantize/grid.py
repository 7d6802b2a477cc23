"""What every implementation of quantization shares: the step of a row, rounding, packing, and the Hadamard matrix."""
import jax.numpy as jnp
import numpy as np

# A row smaller than this counts as zero: below it the step would leave the normal float32 numbers, and 1 / step with it.
SMALLEST = 1e-30


def largest(dtype) -> float:
  """The largest value of a quantized dtype that is used: the grid is symmetric, so int8 goes to 127 on both sides."""
  dtype = jnp.dtype(dtype)
  return float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)


def step_of(absmax, dtype):
  """The scale that maps `absmax` to the largest value. Finite and positive, also for a row of zeros."""
  return jnp.maximum(absmax, SMALLEST) / largest(dtype)


def as_values(y, dtype):
  """Rounds y, in units of the step, to the nearest value of `dtype`: ties to even."""
  limit = largest(dtype)
  if jnp.issubdtype(jnp.dtype(dtype), jnp.integer): y = jnp.round(y)
  return jnp.clip(y, -limit, limit).astype(dtype)


def hadamard_matrix(size: int) -> np.ndarray:
  """Sylvester's matrix of ones and minus ones, (size, size): symmetric, and its square is size * I. H[i, j] = (-1)^(bits
  that i and j share)."""
  if size & (size - 1) or size < 2: raise ValueError(f'a Hadamard block of {size}: must be a power of two, at least 2')
  index = np.arange(size)
  shared = np.array([bits.bit_count() for bits in range(size)])[index[:, None] & index[None, :]]
  return (1 - 2 * (shared % 2)).astype(np.float32)


def pack_halves(values):
  """int8 values in [-8, 7], (..., H) -> uint8 (..., H / 2): byte h holds value h in its low and h + H / 2 in its high
  four bits, so that unpacking is two masks and a concatenation, with no shuffle of neighbours."""
  low, high = jnp.split(values.astype(jnp.uint8) & 15, 2, axis=-1)
  return low | (high << 4)


def halves(packed):
  """uint8 (..., H / 2) -> int8 values 0 … H / 2 - 1 and H / 2 … H - 1, (..., H / 2) each."""
  signed = packed.astype(jnp.int8)
  return jnp.right_shift(jnp.left_shift(signed, 4), 4), jnp.right_shift(signed, 4)


def unpack_halves(packed):
  """uint8 (..., H / 2) -> int8 (..., H), the inverse of `pack_halves`."""
  return jnp.concatenate(halves(packed), axis=-1)
