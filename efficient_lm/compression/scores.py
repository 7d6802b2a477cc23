"""What an entry of a matrix is worth, for pruning to take the least: the base of all scores, and magnitude."""
import dataclasses
from typing import Any

from efficient_lm.compression.patterns import GONE, PerMatrix
from efficient_lm.lazy import lazy

jnp = lazy('jax.numpy')


class Score:
  """Subclasses are dataclasses that a config can hold.

  needs: names of the statistics that it wants of each weight's inputs (`weights.observed`); none: no calibration.
  gradient: the statistic that it wants of each weight's gradients (`compression.gradients`), or ''.
  drawn: whether it asks for a key. updates: whether it moves the entries that are kept.
  pattern: among which entries it compares, if nothing else is asked for.
  """
  needs: tuple[str, ...] = ()
  gradient = ''
  drawn = False
  updates = False
  pattern: Any = PerMatrix()

  def of(self, w_OI, found: dict):
    """Scores (..., O, I), at least 0, of a matrix by its statistics."""
    raise NotImplementedError

  def pruned(self, w_OI, keep_OI, found: dict, pattern, share):
    """(matrix, mask), both (..., O, I), by the statistics of its inputs. Entries that an earlier mask has taken are the
    first to count as zeros.

    keep_OI: the earlier mask, bool, or None. share: (...,), of zeros, of each matrix."""
    score_OI = self.of(w_OI, found)
    if keep_OI is None: return w_OI, pattern.keep(score_OI, share)
    return w_OI, pattern.keep(jnp.where(keep_OI, score_OI, GONE), share) & keep_OI


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Magnitude(Score):
  """|w|: no data is asked for. What all scores fall back to where there is nothing to go by."""

  def of(self, w_OI, found): return jnp.abs(w_OI)
