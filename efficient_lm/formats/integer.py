"""Grids of equal steps: integers of 8, 4, 3 or 2 bits, full-range ones with a step of either sign, grids that begin at any
number, mid-rise grids without a zero, and ternary numbers."""
import dataclasses
from typing import Any

from efficient_lm.formats.format import LARGEST_HALF, Format, Scales, scale_dtype_field, scale_dtype_problems
from efficient_lm.formats.granularity import Channel, Group, Tensor
from efficient_lm.formats.ranges import AbsMean
from efficient_lm.lazy import lazy

jnp = lazy('jax.numpy')

config = dataclasses.dataclass(kw_only=True, unsafe_hash=True)
BITS = (8, 4, 3, 2)


def bits_problems(format):
  """Says which numbers of bits can be stored, if that of the format cannot."""
  if format.bits not in BITS: yield 'bits', format.bits, f'must be one of {", ".join(map(str, BITS))}'


@config
class Int(Format):
  """Integers times a step. A symmetric grid has the integers -L … L with L = 2^(bits - 1) - 1, so that 2 bits are ternary.
  An asymmetric one has all 2^bits, and an integer zero point that places them between a tile's smallest and largest number,
  so that 0 stays exactly 0 (Jacob et al. 2018, arXiv 1712.05877, section 2.1)."""
  bits: int = 8
  scales: Any = dataclasses.field(default_factory=Channel)
  symmetric: bool = True
  scale_dtype: str = scale_dtype_field()

  def check(self):
    yield from bits_problems(self)
    yield from scale_dtype_problems(self)

  @property
  def largest(self) -> float: return 2. ** (self.bits - 1) - 1

  def codes(self, y):
    from efficient_lm.ops.absmax import nearest
    return nearest(y, limit=self.largest, lowest=-self.largest if self.symmetric else -self.largest - 1)

  def numbers(self, codes): return codes.astype(jnp.float32)

  def fit(self, low, high):
    if self.symmetric: return super().fit(low, high)
    from efficient_lm.ops.absmax import scale_of
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    scale = self.kept(scale_of(high - low, 2 ** self.bits - 1))
    zero = jnp.round(-2 ** (self.bits - 1) - low / self.stored_scale(scale)).astype(jnp.int8)
    return Scales(jnp.swapaxes(scale, -1, -2), jnp.swapaxes(zero, -1, -2))

  @property
  def element(self) -> str: return f'int{self.bits}{"" if self.symmetric else " with zero point"}'


@config
class FullRangeInt(Format):
  """All 2^bits integers -2^(bits - 1) … 2^(bits - 1) - 1 times a step of either sign, for weights after training: of 3 bits,
  `Int` leaves one level of eight unused. The sign gives the additional level to the side of a tile's largest magnitude, as
  GGUF's Q4_0 does, and no zero point is stored. The step is the least with which that number is not cut off, and the largest
  of the other side by at most half a step (Q4_0 cuts off up to a whole one)."""
  bits: int = 4
  scales: Any = dataclasses.field(default_factory=Channel)
  scale_dtype: str = scale_dtype_field()

  symmetric = False

  def check(self):
    yield from bits_problems(self)
    yield from scale_dtype_problems(self)

  @property
  def largest(self) -> float: return 2. ** (self.bits - 1)

  def codes(self, y):
    from efficient_lm.ops.absmax import nearest
    return nearest(y, limit=self.largest - 1, lowest=-self.largest)

  def numbers(self, codes): return codes.astype(jnp.float32)

  def fit(self, low, high):
    """Scales of either sign: code -2^(bits - 1) stands for whichever of low and high is farther from 0."""
    from efficient_lm.ops.absmax import scale_of
    far, near = jnp.maximum(-low, high), jnp.minimum(-low, high)
    step = self.kept(scale_of(jnp.maximum(far, near * (self.largest / (self.largest - 0.5))), self.largest))
    return Scales(jnp.swapaxes(jnp.where(high > -low, -step, step), -1, -2))

  @property
  def element(self) -> str: return f'full-range int{self.bits}'


@config
class Affine(Format):
  """2^bits levels low + i * step, from the smallest number of a tile to its largest, both ends in float16: GGUF's Q4_1, for
  weights after training. `Int(symmetric=False)` has the same levels moved by less than a step, so that 0 is among them; here
  a tile of numbers far from 0 keeps all of its levels, and what has been pruned needs its mask.

  Codes are those of `Int`, -2^(bits - 1) …; `Scales.zero` is the level of the lowest, not a zero point.
  """
  bits: int = 4
  scales: Any = dataclasses.field(default_factory=lambda: Group(size=32))

  symmetric, has_zero, scale_dtype = False, False, 'float16'

  def check(self): yield from bits_problems(self)

  @property
  def lowest(self) -> float: return -2. ** (self.bits - 1)

  def codes(self, y):
    from efficient_lm.ops.absmax import nearest
    return nearest(y, limit=-self.lowest - 1, lowest=self.lowest)

  def numbers(self, codes): return codes.astype(jnp.float32)

  def in_steps(self, w, step, zero=None): return (w - zero) / step + self.lowest

  def from_steps(self, numbers, step, zero=None):
    # The product of a float16 and a whole number of 8 bits is exact: that it may be fused with the sum changes nothing.
    return (numbers - self.lowest) * step + zero

  def integer_steps(self, scales: Scales):
    step, low = self.steps(scales)
    return step, self.lowest - low / step

  def fit(self, low, high):
    from efficient_lm.ops.absmax import scale_of
    half = jnp.clip(low, -LARGEST_HALF, LARGEST_HALF).astype(self.scale_dtype)
    step = self.kept(scale_of(high - half.astype(jnp.float32), 2 ** self.bits - 1))
    return Scales(jnp.swapaxes(step, -1, -2), jnp.swapaxes(half, -1, -2))

  @property
  def element(self) -> str: return f'affine int{self.bits}'


@config
class MidRise(Format):
  """2^bits levels on both sides of zero, none of which is 0: ±1/2, ±3/2 … steps. 2 bits have four levels, where `Int` has
  three (the grid of ParetoQ's stretched elastic quantization, Liu et al. 2025, arXiv 2502.02631)."""
  bits: int = 2
  scales: Any = dataclasses.field(default_factory=Channel)

  offset = 0.5

  def check(self): yield from bits_problems(self)

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
  """-1, 0 or 1 times the mean magnitude (BitNet b1.58, Ma et al. 2024, arXiv 2402.17764, eq. 1-3), stored in 2 bits."""
  scales: Any = dataclasses.field(default_factory=Tensor)
  scale_dtype: str = scale_dtype_field()

  element, bits, largest = 'ternary', 2, 1.

  def check(self): yield from scale_dtype_problems(self)

  @property
  def range(self): return AbsMean()

  def codes(self, y):
    from efficient_lm.ops.absmax import nearest
    return nearest(y, limit=self.largest)

  def numbers(self, codes): return codes.astype(jnp.float32)
