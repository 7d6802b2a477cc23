"""What a device can reach at all: the best of large products of matrices, by precision, and of reading and writing memory.

These are the roofline of `bench --ops`: measured in the same run, by XLA's own programs, so that a figure above 100 % says
that an operation did better than those, not that it broke physics.
"""
import dataclasses

import jax
import jax.numpy as jnp

from efficient_lm.benches import clock

# Dtype of the product of two matrices, by theirs.
RESULT = {'float32': 'float32', 'bfloat16': 'bfloat16', 'float16': 'float16', 'int8': 'int32', 'float8_e4m3fn': 'bfloat16'}


@dataclasses.dataclass(frozen=True)
class Ceilings:
  """FLOP/s by precision, bytes a second."""
  flops: dict[str, float]
  bandwidth: float

  def seconds(self, flops: float, num_bytes: float, precision: str) -> float:
    """The least that this work can take."""
    return max(flops / self.flops[precision], num_bytes / self.bandwidth)

  def best(self, other: 'Ceilings') -> 'Ceilings':
    """The higher of each: a device may have been busy, or hot, when one was measured."""
    return Ceilings({name: max(rate, other.flops[name]) for name, rate in self.flops.items()},
                    max(self.bandwidth, other.bandwidth))


def matrices(precision: str, size: int):
  """Two square matrices of random numbers."""
  x, y = (jax.random.normal(key, (size, size)) for key in jax.random.split(jax.random.key(0)))
  if precision == 'int8': x, y = 40 * x, 40 * y
  return x.astype(precision), y.astype(precision)


def product_rate(precision: str, size: int) -> float:
  """FLOP/s of a square product of that size: the better of x @ y and x @ y^T, each the faster one of some precision."""
  def product(x, y, axis):
    return jax.lax.dot_general(x, y, (((1,), (axis,)), ((), ())), preferred_element_type=RESULT[precision])
  x, y = matrices(precision, size)
  return 2 * size ** 3 / min(clock.median(lambda x, y, axis=axis: product(x, y, axis), x, y) for axis in (0, 1))


def memory_rate(num_bytes: int) -> float:
  """Bytes a second: the better of reading an array and of reading one and writing another."""
  x = jnp.ones(num_bytes // 4, jnp.float32)
  reading = x.nbytes / clock.median(jnp.sum, x)
  return max(reading, 2 * x.nbytes / clock.median(lambda x: x + 1, x))


def measured(precisions: set[str], quick: bool = False) -> Ceilings:
  """Those of the default device."""
  here = jax.default_backend() == 'cpu'
  # A CPU has no units for narrow floats: a product of them is slow, and a small one tells.
  size = lambda precision: 256 if quick else 8192 if not here else 2048 if precision == 'float32' else 512
  return Ceilings({precision: product_rate(precision, size(precision)) for precision in sorted(precisions)},
                  memory_rate(2 ** 20 if quick else 2 ** 27 if here else 2 ** 30))
