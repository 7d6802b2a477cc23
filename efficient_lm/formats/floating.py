"""Grids whose steps grow with the numbers: float8, NF4, and the block formats MXFP8, MXFP4 and NVFP4."""
import dataclasses
import itertools
from typing import Any

from efficient_lm.formats.format import Format, Scales
from efficient_lm.formats.granularity import Channel, Group
from efficient_lm.lazy import lazy

jnp = lazy('jax.numpy')
np = lazy('numpy')

config = dataclasses.dataclass(kw_only=True, unsafe_hash=True)
LARGEST = {'e4m3': 448., 'e5m2': 57344.}
DTYPES = {'e4m3': 'float8_e4m3fn', 'e5m2': 'float8_e5m2'}
E2M1 = (0., .5, 1., 1.5, 2., 3., 4., 6.)   # magnitudes of a float of 4 bits: 2 of exponent, 1 of mantissa
# Quantiles of a normal distribution, 0 among them (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, appendix E).
NORMAL = (-1., -.6961928009986877, -.5250730514526367, -.39491748809814453, -.28444138169288635, -.18477343022823334,
          -.09105003625154495, 0., .07958029955625534, .16093020141124725, .24611230194568634, .33791524171829224,
          .44070982933044434, .5626170039176941, .7229568362236023, 1.)


def cast(y, variant: str):
  """The nearest float8; numbers beyond the largest become the largest."""
  from efficient_lm.ops.absmax import nearest
  return nearest(y, DTYPES[variant])


@config
class Float8(Format):
  """8-bit floats (Micikevicius et al. 2022, arXiv 2209.05433). 'e4m3' errs by at most 1/16 of a number; 'e5m2', which is for
  gradients, by at most 1/8, and has a wider range."""
  variant: str = 'e4m3'
  scales: Any = dataclasses.field(default_factory=Channel)

  bits = 8

  def check(self):
    if self.variant not in DTYPES: yield 'variant', self.variant, "must be 'e4m3' or 'e5m2'"

  @property
  def largest(self) -> float: return LARGEST[self.variant]

  def codes(self, y): return cast(y, self.variant)

  def numbers(self, codes): return codes.astype(jnp.float32)

  @property
  def element(self) -> str: return f'float8 {self.variant}'


@config
class NF4(Format):
  """Sixteen quantiles of a normal distribution: if weights are normal, equally many of them are nearest to each."""
  scales: Any = dataclasses.field(default_factory=lambda: Group(size=64))

  element, bits, largest, offset = 'NF4', 4, 1., None

  def codes(self, y):
    table = np.asarray(NORMAL)
    return jnp.searchsorted(jnp.asarray((table[1:] + table[:-1]) / 2, jnp.float32), y).astype(jnp.uint8)

  def numbers(self, codes): return jnp.asarray(NORMAL, jnp.float32)[codes.astype(jnp.int32) & 15]


class _E2M1(Format):
  """Floats of 4 bits: codes 0 … 7 are the magnitudes, and 8 … 15 the same magnitudes with a minus."""
  bits, largest, offset = 4, 6., None

  def codes(self, y):
    magnitude = jnp.abs(y)
    # Ties go to the even mantissa, which every second magnitude has.
    passed = (magnitude >= (low + high) / 2 if i % 2 else magnitude > (low + high) / 2
              for i, (low, high) in enumerate(itertools.pairwise(E2M1)))
    return sum(above.astype(jnp.uint8) for above in passed) + jnp.where(jnp.signbit(y), jnp.uint8(8), jnp.uint8(0))

  def numbers(self, codes):
    return jnp.asarray(E2M1 + tuple(-number for number in E2M1), jnp.float32)[codes.astype(jnp.int32) & 15]


def exponent_above(x):
  """The smallest integer n with 2^n >= x, for positive x, int32."""
  mantissa, exponent = jnp.frexp(x)   # x = mantissa * 2^exponent, 1/2 <= mantissa < 1
  return jnp.where(mantissa == 0.5, exponent - 1, exponent)


def power_of_two(exponent):
  """2^exponent as float32, exact."""
  return jnp.ldexp(jnp.float32(1), exponent)


def _fit_power_of_two(largest: float, low, high) -> Scales:
  """The smallest power of two with which no number exceeds the grid, as a biased exponent in a byte (E8M0). The OCP MX
  specification (v1.0, section 6.3) leaves the choice open; the scale of its example is rounded down, and clips up to an
  eighth of the largest number."""
  from efficient_lm.ops.absmax import scale_of
  exponent = exponent_above(scale_of(jnp.maximum(-low, high), largest))
  return Scales(jnp.swapaxes(jnp.clip(exponent + 127, 1, 254), -1, -2).astype(jnp.uint8))


def _stored_power_of_two(scale):
  return power_of_two(scale.astype(jnp.int32) - 127)


@config
class MXFP8(Format):
  """float8 e4m3 in groups of 32 that share a power of two (OCP Microscaling formats, v1.0, section 5.1)."""
  element, bits, largest, scales, standard = 'MXFP8', 8, LARGEST['e4m3'], Group(size=32), True

  def fit(self, low, high): return _fit_power_of_two(self.largest, low, high)
  def stored_scale(self, scale): return _stored_power_of_two(scale)
  def codes(self, y): return cast(y, 'e4m3')
  def numbers(self, codes): return codes.astype(jnp.float32)


@config
class MXFP4(_E2M1):
  """4-bit floats in groups of 32 that share a power of two (OCP Microscaling formats, v1.0, section 5.1)."""
  element, scales, standard = 'MXFP4', Group(size=32), True

  def fit(self, low, high): return _fit_power_of_two(self.largest, low, high)
  def stored_scale(self, scale): return _stored_power_of_two(scale)


@config
class NVFP4(_E2M1):
  """4-bit floats in groups of 16 that share a float8 e4m3 scale, and a float32 scale for the matrix (NVIDIA 2025, arXiv
  2509.25149, section 2). The scale of the matrix is a power of two here, so that products with it are exact in whichever
  order a compiler computes them; the range of the float8 scales allows that."""
  element, scales, joint, standard = 'NVFP4', Group(size=16), True, True

  def fit(self, low, high):
    from efficient_lm.ops.absmax import scale_of
    extent = jnp.maximum(-low, high)
    whole = scale_of(jnp.max(extent, axis=(-2, -1), keepdims=True), self.largest * LARGEST['e4m3'])
    outer = power_of_two(exponent_above(whole))
    # A group that is small beside the matrix must not have the scale 0: the smallest positive float8 is 2^-9.
    inner = cast(jnp.maximum(extent / self.largest / outer, 2. ** -9), 'e4m3')
    return Scales(jnp.swapaxes(inner, -1, -2), outer=outer)
