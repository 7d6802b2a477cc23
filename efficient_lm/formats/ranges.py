"""Ranges: between which numbers the grid of a tile is stretched. Numbers outside are clipped to the ends of the grid."""
import dataclasses

from efficient_lm.errors import IncompatibleError
from efficient_lm.lazy import lazy

jnp = lazy('jax.numpy')
lax = lazy('jax.lax')

config = dataclasses.dataclass(kw_only=True, unsafe_hash=True)
WITHIN = (-3, -1)   # the two dimensions of `granularity.tile` that one scale is for


@dataclasses.dataclass(frozen=True)
class Reduce:
  """Reductions of tiles (..., n, a, q, b) over a and b. `names`: axes of `shard_map`'s mesh whose devices share a tile."""
  names: tuple[str, ...] = ()

  def max(self, tiles):
    here = jnp.max(tiles, WITHIN)
    return lax.pmax(here, self.names) if self.names else here

  def min(self, tiles):
    return -self.max(-tiles)

  def mean(self, tiles):
    here = jnp.mean(tiles, WITHIN)
    return lax.pmean(here, self.names) if self.names else here


@config
class AbsMax:
  """From the smallest to the largest number, so that nothing is clipped."""

  def extremes(self, tiles, format, reduce: Reduce):
    """low and high (..., n, q) of tiles (..., n, a, q, b)."""
    return reduce.min(tiles), reduce.max(tiles)


@config
class AbsMean:
  """From minus to plus the mean magnitude: BitNet b1.58's scale of ternary weights (Ma et al. 2024, arXiv 2402.17764, eq.
  3)."""

  def extremes(self, tiles, format, reduce: Reduce):
    mean = reduce.mean(jnp.abs(tiles))
    return -mean, mean


@config
class Percentile:
  """From minus to plus the magnitude that `percent` of the magnitudes do not exceed; of an asymmetric grid, each end has a
  percentile of its own."""
  percent: float = 99.9

  def check(self):
    if not 50 < self.percent <= 100: yield 'percent', self.percent, 'must be above 50 and at most 100'

  def extremes(self, tiles, format, reduce: Reduce):
    if reduce.names: raise IncompatibleError(f'a percentile over devices {reduce.names} is not defined: choose AbsMax()')
    if format.symmetric:
      high = jnp.percentile(jnp.abs(tiles), self.percent, axis=WITHIN)
      return -high, high
    return jnp.percentile(tiles, 100 - self.percent, axis=WITHIN), jnp.percentile(tiles, self.percent, axis=WITHIN)


@config
class MeanSquaredError:
  """The extremes, shrunk by the factor that leaves the smallest squared error, of `candidates` factors between `least` and 1
  (the search of LAPQ and of AWQ's clipping). The factor 1 is among them, so that the error is never larger than AbsMax's."""
  candidates: int = 32
  least: float = 0.35

  def check(self):
    if self.candidates < 1: yield 'candidates', self.candidates, 'must be at least 1'
    if not 0 < self.least <= 1: yield 'least', self.least, 'must be above 0 and at most 1'

  def extremes(self, tiles, format, reduce: Reduce):
    low, high = format.range.extremes(tiles, format, reduce)
    largest = reduce.min(tiles), reduce.max(tiles)

    def better(best, factor):
      error, *_ = best
      ends = largest[0] * factor, largest[1] * factor
      found = self.error(tiles, ends, format, reduce)
      return tuple(jnp.where(found < error, new, old) for new, old in zip((found, *ends), best)), None

    start = self.error(tiles, (low, high), format, reduce), low, high
    (_, low, high), _ = lax.scan(better, start, jnp.linspace(1, self.least, self.candidates))
    return low, high

  @staticmethod
  def error(tiles, extremes, format, reduce: Reduce):
    """Mean squared error (..., n, q) of rounding with the grid between these extremes."""
    return reduce.mean(jnp.square(format.snap_tiles(tiles, format.fit(*extremes)) - tiles))
