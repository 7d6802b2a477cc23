"""The roofline of `bench --ops`: the rates that a device reaches with large products of matrices, by precision, and with
reading and writing memory.

They are measured in the same run, with XLA's own programs. An operation may therefore exceed 100 % of the roofline: it is
then faster than these programs.
"""
import dataclasses

import jax
import jax.numpy as jnp

from efficient_lm.benches import timer

# The dtype of two matrices -> the dtype of their product.
RESULT = {'float32': 'float32', 'bfloat16': 'bfloat16', 'float16': 'float16', 'int8': 'int32', 'float8_e4m3fn': 'bfloat16'}


@dataclasses.dataclass(frozen=True)
class Ceilings:
  """The rates of a device. flops: FLOP/s by precision. bandwidth: bytes a second."""
  flops: dict[str, float]
  bandwidth: float

  def seconds(self, flops: float, num_bytes: float, precision: str) -> float:
    """The least time that this work can take, in seconds."""
    return max(flops / self.flops[precision], num_bytes / self.bandwidth)

  def best(self, other: 'Ceilings') -> 'Ceilings':
    """The higher of each rate: the device may have been busy, or hot, in one of the measurements."""
    return Ceilings({name: max(rate, other.flops[name]) for name, rate in self.flops.items()},
                    max(self.bandwidth, other.bandwidth))


def matrices(precision: str, size: int):
  """Two square matrices of random numbers."""
  x, y = (jax.random.normal(key, (size, size)) for key in jax.random.split(jax.random.key(0)))
  if precision == 'int8': x, y = 40 * x, 40 * y
  return x.astype(precision), y.astype(precision)


def product_rate(precision: str, size: int) -> float:
  """FLOP/s of a square product of that size: the better of x @ y and x @ y^T, because either is faster in some precision."""
  def product(x, y, axis):
    return jax.lax.dot_general(x, y, (((1,), (axis,)), ((), ())), preferred_element_type=RESULT[precision])
  x, y = matrices(precision, size)
  return 2 * size ** 3 / min(timer.median(lambda x, y, axis=axis: product(x, y, axis), x, y) for axis in (0, 1))


def memory_rate(num_bytes: int) -> float:
  """Bytes a second: the better of reading one array, and of reading one and writing another."""
  x = jnp.ones(num_bytes // 4, jnp.float32)
  reading = x.nbytes / timer.median(jnp.sum, x)
  return max(reading, 2 * x.nbytes / timer.median(lambda x: x + 1, x))


def measured(precisions: set[str], quick: bool = False) -> Ceilings:
  """The ceilings of the default device, measured."""
  here = jax.default_backend() == 'cpu'
  # A CPU has no units for narrow floats: their product is slow, and a small one is enough to measure it.
  size = lambda precision: 256 if quick else 8192 if not here else 2048 if precision == 'float32' else 512
  return Ceilings({precision: product_rate(precision, size(precision)) for precision in sorted(precisions)},
                  memory_rate(2 ** 20 if quick else 2 ** 27 if here else 2 ** 30))
