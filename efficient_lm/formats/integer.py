"""Grids of equal steps: integers of 8, 4, 3 or 2 bits, all levels around zero, and ternary."""
import dataclasses
from typing import Any

from efficient_lm.formats.format import Format, Scales, positive
from efficient_lm.formats.granularity import Channel, Tensor
from efficient_lm.formats.ranges import AbsMean
from efficient_lm.lazy import lazy

jnp = lazy('jax.numpy')

config = dataclasses.dataclass(kw_only=True, unsafe_hash=True)
BITS = (8, 4, 3, 2)


def complaints(format):
  """About the number of bits."""
  if format.bits not in BITS: yield 'bits', format.bits, f'must be one of {", ".join(map(str, BITS))}'


@config
class Int(Format):
  """Integers times a step. Symmetric: -L … L with L = 2^(bits - 1) - 1, so 2 bits are ternary. Else all 2^bits, and an
  integer zero point that places them from a tile's smallest to its largest number; 0 stays exactly 0 (Jacob et al. 2018,
  arXiv 1712.05877, section 2.1)."""
  bits: int = 8
  scales: Any = dataclasses.field(default_factory=Channel)
  symmetric: bool = True

  def check(self): yield from complaints(self)

  @property
  def largest(self) -> float: return 2. ** (self.bits - 1) - 1

  def codes(self, y):
    least = -self.largest if self.symmetric else -self.largest - 1
    return jnp.clip(jnp.round(y), least, self.largest).astype(jnp.int8)

  def numbers(self, codes): return codes.astype(jnp.float32)

  def fit(self, low, high):
    if self.symmetric: return super().fit(low, high)
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    scale = positive((high - low) / (2 ** self.bits - 1))
    zero = jnp.round(-2 ** (self.bits - 1) - low / scale).astype(jnp.int8)
    return Scales(jnp.swapaxes(scale, -1, -2), jnp.swapaxes(zero, -1, -2))

  @property
  def element(self) -> str: return f'int{self.bits}{"" if self.symmetric else " with zero point"}'


@config
class MidRise(Format):
  """All 2^bits levels on both sides of zero, none of them 0: ±1/2, ±3/2 … steps. With 2 bits four levels where `Int` has
  three (the grid of ParetoQ's stretched elastic quantization, Liu et al. 2025, arXiv 2502.02631)."""
  bits: int = 2
  scales: Any = dataclasses.field(default_factory=Channel)

  offset = 0.5

  def check(self): yield from complaints(self)

  @property
  def largest(self) -> float: return 2. ** (self.bits - 1) - self.offset

  def codes(self, y):
    limit = 2. ** (self.bits - 1)
    return jnp.clip(jnp.floor(y), -limit, limit - 1).astype(jnp.int8)

  def numbers(self, codes): return codes.astype(jnp.float32) + self.offset

  @property
  def element(self) -> str: return f'mid-rise int{self.bits}'


@config
class Ternary(Format):
  """-1, 0 and 1 times the mean magnitude (BitNet b1.58, Ma et al. 2024, arXiv 2402.17764, eq. 1-3), stored in 2 bits."""
  scales: Any = dataclasses.field(default_factory=Tensor)

  element, bits, largest = 'ternary', 2, 1.

  @property
  def range(self): return AbsMean()

  def codes(self, y): return jnp.clip(jnp.round(y), -1, 1).astype(jnp.int8)

  def numbers(self, codes): return codes.astype(jnp.float32)
