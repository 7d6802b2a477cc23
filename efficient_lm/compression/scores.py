"""The importance of parts of a model, of which pruning removes the least: the base of all scores, and those of both kinds.

Scores of entries choose among the numbers of a matrix (`PruneOnce`); scores of groups rank all indices of a dimension, such
as hidden units or layers, of which a whole one goes (`Shrink`, `compression.group_scores`). Some know both. Nothing here
loads JAX before something is scored.
"""
import dataclasses
from typing import Any

from efficient_lm.compression.patterns import GONE, PerMatrix
from efficient_lm.compression.shape import SIZES
from efficient_lm.lazy import lazy

jax, jnp = lazy('jax'), lazy('jax.numpy')
config = dataclasses.dataclass(kw_only=True, unsafe_hash=True)


class Score:
  """Subclasses are dataclasses that a config can hold.

  Of entries. of_entries: whether it can rank them. needs: names of the statistics that it wants of each weight's inputs
  (`weights.observed`); none: no calibration. gradient: the statistic that it wants of each weight's gradients
  (`compression.gradients`), or ''. drawn: whether it asks for a key. updates: whether it moves the entries that are kept.
  pattern: among which entries it compares, if nothing else is asked for.

  While training. in_training: whether it can rank entries there. remembers: whether it has a memory of more than the step
  under way.

  Of groups. kinds: the sizes of `Shape` that it can rank; none: no groups. calibrated: whether it reads batches of text for
  that.
  """
  of_entries = True
  in_training = False
  remembers = False
  needs: tuple[str, ...] = ()
  gradient = ''
  drawn = False
  updates = False
  pattern: Any = PerMatrix()
  kinds: tuple[str, ...] = ()
  calibrated = True

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

  def start(self, array):
    """While training: the memory before the first step, float32 of the array's shape."""

  def remembered(self, memory, values, gradient):
    """The memory after a step that found these weights and this gradient."""
    return memory

  def at(self, moment):
    """Scores, float32 of the array's shape and of either sign, after a step (`sparse_updates.Moment`)."""
    raise NotImplementedError

  def score(self, model, spaces, batches, key):
    """{space: (*lead, size)}, larger where more is lost, of `dimensions.Space`s. Query heads are scored; the score of a
    key-value head is the sum of theirs."""
    raise NotImplementedError


@config
class Magnitude(Score):
  """|w|: no data is asked for. What all scores of entries fall back to where there is nothing to go by. Of groups, the
  Euclidean norm of all weights that would be removed (group magnitude, as in LLM-Pruner, arXiv 2305.11627)."""
  in_training = True
  kinds = SIZES
  calibrated = False

  def of(self, w_OI, found): return jnp.abs(w_OI)
  def at(self, moment): return jnp.abs(moment.values).astype(jnp.float32)

  def score(self, model, spaces, batches, key):
    import numpy as np

    from efficient_lm.compression import importance
    squares = importance.of_weights(model, lambda _, weight: weight.materialize() ** 2, spaces)
    return {space: np.sqrt(importance.summed(model, space, squares, importance.touched(model, space))) for space in spaces}


@config
class Random(Score):
  """By chance, by the key of the stage, or of the array and the step of a training: what any other score has to beat."""
  drawn = True
  in_training = True
  kinds = SIZES
  calibrated = False

  def of(self, w_OI, found): return jax.random.uniform(found['key'], w_OI.shape)
  def at(self, moment): return jax.random.uniform(moment.key, moment.values.shape)

  def score(self, model, spaces, batches, key):
    import numpy as np
    keys = jax.random.split(key, len(spaces))
    return {space: np.asarray(jax.random.uniform(one, (*space.lead, space.size))) for one, space in zip(keys, spaces)}


@config
class Snip(Score):
  """|w * g| with the gradient g of the mean loss over all calibration tokens: the connection sensitivity of SNIP (Lee et al.
  2019, arXiv 1810.02340, eq. 4). Of a model that is trained well, g is near zero, and mostly noise: see `Taylor`."""
  gradient = 'mean'

  def of(self, w_OI, found): return jnp.abs(w_OI * found['mean'])


@config
class Taylor(Score):
  """The mean over the calibration batches of (w * g)^2, with the gradient g of a batch's loss: the first-order importance of
  Molchanov et al. 2019 (arXiv 1906.10771, eq. 8), which does not cancel between batches; w^2 times the diagonal of the
  empirical Fisher information. Fewer sequences in a batch make a finer mean.

  Of groups, how much the loss would change: |sum of weight * gradient| over what would be zero, summed over batches
  (LLM-Pruner, arXiv 2305.11627, eq. 3). Over the weights that read an index, or, of experts and layers, those that they
  write with, it is activation * gradient, summed over tokens."""
  gradient = 'mean_square'
  kinds = SIZES

  def of(self, w_OI, found): return jnp.square(w_OI) * found['mean_square']

  def score(self, model, spaces, batches, key):
    from efficient_lm.compression import importance
    return importance.taylor(model, spaces, batches)
