"""Scores by the gradients that a training has anyway, of which the lowest weights go."""
import dataclasses

from efficient_lm.compression.scores import Score
from efficient_lm.lazy import lazy

jnp = lazy('jax.numpy')


class TrainingScore(Score):
  """One that remembers gradients of steps."""
  of_entries = False
  in_training = True
  remembers = True

  def start(self, array): return jnp.zeros(array.shape, jnp.float32)
  def at(self, moment): return moment.memory


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Saliency(TrainingScore):
  """|w * gradient|, by how much the loss changes without it in first order (Mozer and Smolensky 1989; `Snip` is that before
  training): the running mean, of which each step keeps `decay`; 0 is the step under way alone."""
  decay: float = 0.9

  def check(self):
    if not 0 <= self.decay < 1: yield 'decay', self.decay, 'must lie in [0, 1): 0 is the step under way alone'

  def remembered(self, memory, values, gradient):
    return self.decay * memory + (1 - self.decay) * jnp.abs(values * gradient).astype(jnp.float32)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Movement(TrainingScore):
  """The sum of -w * gradient over all steps: weights that training moves away from zero stay, whatever their size (Sanh et
  al. 2020, arXiv 2005.07683, eq. 3; their hard version, without a learning rate of its own, which changes no order). Weights
  that are under a mask are scored too only where they are kept: `SparseTraining(method=StraightThroughMask(…))`."""

  def remembered(self, memory, values, gradient): return memory - (values * gradient).astype(jnp.float32)
