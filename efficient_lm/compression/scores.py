"""What makes a weight worth keeping: scores, of which the lowest go.

`of(moment)` gives them, float32 of the array's shape (see `sparse_updates.Moment`). One that `remembers` has
a memory of more than the step under way: `start(array)`, and `remembered(memory, values, gradient)` after every step.
"""
import dataclasses

from efficient_lm.lazy import lazy

jax, jnp = lazy('jax'), lazy('jax.numpy')


@dataclasses.dataclass(kw_only=True)
class ByMagnitude:
  """|w|, after the step."""
  remembers = False

  def start(self, array):
    """The memory before the first step, float32 of the array's shape."""

  def remembered(self, memory, values, gradient):
    """The memory after a step that found these weights and this gradient."""
    return memory

  def of(self, moment):
    """The scores."""
    return jnp.abs(moment.values).astype(jnp.float32)


@dataclasses.dataclass(kw_only=True)
class AtRandom(ByMagnitude):
  """Any: the baseline that a score has to beat. Other numbers in each step and each array."""

  def of(self, moment): return jax.random.uniform(moment.key, moment.values.shape)


@dataclasses.dataclass(kw_only=True)
class BySaliency(ByMagnitude):
  """|w * gradient|, by how much the loss changes without it in first order (Mozer and Smolensky 1989; Lee et al. 2019, arXiv
  1810.02340, who prune by it before training), of the step under way, or its running mean, of which each step keeps
  `decay`."""
  decay: float = 0.9

  def check(self):
    if not 0 <= self.decay < 1: yield 'decay', self.decay, 'must lie in [0, 1): 0 is the step under way alone'

  remembers = True

  def start(self, array): return jnp.zeros(array.shape, jnp.float32)

  def remembered(self, memory, values, gradient):
    return self.decay * memory + (1 - self.decay) * jnp.abs(values * gradient).astype(jnp.float32)

  def of(self, moment): return moment.memory


@dataclasses.dataclass(kw_only=True)
class ByMovement(ByMagnitude):
  """The sum of -w * gradient over all steps: weights that training moves away from zero stay, whatever their size (Sanh et
  al. 2020, arXiv 2005.07683, eq. 3; their hard version, without a learning rate of its own, which changes no order). Weights
  that are under a mask are scored too only where they are kept: `SparseTraining(method=StraightThroughMask(…))`."""

  remembers = True

  def start(self, array): return jnp.zeros(array.shape, jnp.float32)

  def remembered(self, memory, values, gradient): return memory - (values * gradient).astype(jnp.float32)

  def of(self, moment): return moment.memory
