"""Sparse training: masks that move, or that hold from the first step on."""
import dataclasses
import math
from typing import Any

from efficient_lm.compression.gradual import Periodic
from efficient_lm.compression.rules import LAYERS, check_pattern
from efficient_lm.compression.scores import AtRandom, ByMagnitude
from efficient_lm.compression.structures import Unstructured
from efficient_lm.lazy import lazy

jax, jnp = lazy('jax'), lazy('jax.numpy')


class Method:
  """What methods have in common (see `compression.sparse_updates`): by default a mask that is drawn once, and stays."""
  score = ByMagnitude()
  from_start, sparse_gradients, grows, keeps_dense = False, True, False, False

  def check_steps(self, steps: int):
    """Problems in a training of so many steps."""
    return ()

  def within(self, steps: int) -> 'Method':
    """The method with its times in a training of so many steps."""
    return self

  def due(self, step):
    """Whether the mask is drawn anew after `step` updates."""
    return jnp.zeros((), bool)

  def draw(self, moment):
    """The new mask."""
    return moment.keep


@dataclasses.dataclass(kw_only=True)
class StaticMask(Method):
  """One mask from the first step to the last, drawn by `first`: what other methods have to beat."""
  first: Any = dataclasses.field(default_factory=AtRandom)

  from_start = True

  def check(self):
    if self.first.remembers: yield 'first', self.first, 'must be a score without gradients: AtRandom() or ByMagnitude()'


@dataclasses.dataclass(kw_only=True)
class RigL(StaticMask):
  """Every `every` steps before `end` the smallest of the live weights go, and those that are not, of the largest gradient,
  come in their place, from zero: a share of the live ones that falls from `share` to 0 along a cosine (Evci et al. 2020,
  arXiv 1911.11134, algorithm 1). None: three quarters of the training's steps. Unlike there, the step at which masks move is
  taken too. The first mask is drawn by `first`."""
  share: float = 0.3
  every: int = 20
  end: int | None = None

  grows = True

  def check(self):
    yield from super().check()
    if not 0 <= self.share <= 1: yield 'share', self.share, 'must be a share between 0 and 1'
    if self.every < 1: yield 'every', self.every, 'must be at least 1 step'
    if self.end is not None and self.end < 1: yield 'end', self.end, 'must be at least 1 step'

  def check_steps(self, steps: int):
    if self.end is not None and self.end > steps:
      yield 'end', self.end, f'must be at most the {steps} steps of the training'
    elif self.share and self.every >= (end := self.within(steps).end):
      yield 'every', self.every, f'must be below the step at which masks come to rest, {end}: they would never move'

  def within(self, steps: int):
    return dataclasses.replace(self, end=max(1, steps * 3 // 4)) if self.end is None else self

  def due(self, step): return (step % self.every == 0) & (step < self.end) & (self.share > 0)

  def draw(self, moment):
    from efficient_lm.compression.sparse_updates import exchanged
    return exchanged(moment, self.share_at(moment.step), self.growth(moment))

  def share_at(self, step):
    """Of the live weights, how many are exchanged after `step` steps."""
    return self.share / 2 * (1 + jnp.cos(math.pi * step / self.end))

  def growth(self, moment):
    """Scores by which weights come back, the highest first."""
    return jnp.abs(moment.gradient).astype(jnp.float32)


@dataclasses.dataclass(kw_only=True)
class SET(RigL):
  """As `RigL`, of which it is the model: the share stays the same, and weights come back at random (Mocanu et al. 2018,
  arXiv 1707.04780). No gradient of what is not there is needed."""

  def share_at(self, step): return self.share
  def growth(self, moment): return jax.random.uniform(moment.key, moment.values.shape)


@dataclasses.dataclass(kw_only=True)
class AcDc(Method):
  """Dense until `start`, then sparse and dense in turn, `every` steps each, and sparse from `end` on (Peste et al. 2021,
  arXiv 2106.12379, algorithm 1). A sparse phase begins with the largest magnitudes; in the dense one after it all weights
  are trained, those that were not there from zero. None: a tenth, a twentieth and 85 % of the training's steps."""
  start: int | None = None
  every: int | None = None
  end: int | None = None

  grows = True

  def check(self):
    for field in ('start', 'every', 'end'):
      value = getattr(self, field)
      if value is not None and value < 1: yield field, value, 'must be at least 1 step'

  def check_steps(self, steps: int):
    own = self.within(steps)
    if own.end > steps:
      yield 'end', own.end, f'must be at most the {steps} steps of the training: it would not end sparse'
    elif own.start + 2 * own.every > own.end:
      yield 'every', own.every, f'must leave time for a sparse and a dense phase between steps {own.start} and {own.end}'

  def within(self, steps: int):
    own = dict(start=max(1, steps // 10), every=max(1, steps // 20), end=steps * 85 // 100)
    return dataclasses.replace(self, **{name: value for name, value in own.items() if getattr(self, name) is None})

  def due(self, step):
    turns = (step >= self.start) & ((step - self.start) % self.every == 0) & (step <= self.end)
    return turns | (step == self.end)

  def draw(self, moment):
    from efficient_lm.compression.sparse_updates import shrunk
    sparse = ((moment.step - self.start) // self.every % 2 == 0) | (moment.step >= self.end)
    return shrunk(moment, self.score.of(moment), 1.) | ~sparse


@dataclasses.dataclass(kw_only=True)
class StraightThroughMask(Method):
  """The model is the largest weights; the others are kept beside and go on to be trained, by the gradient that they have
  at zero, and come back as what they have become. Masks are drawn every `every` steps from `start` to `end` by `score`,
  which sees all weights, of the share that `schedule` says. None: a tenth and two thirds of the training's steps. It takes a
  second copy of the weights, in the optimizer's state.

  Bengio et al. 2013 (arXiv 1308.3432) is the estimator; with N:M it is Zhou et al. 2021 (arXiv 2102.04010) without their
  decay, with ByMovement Sanh et al. 2020 (arXiv 2005.07683)."""
  start: int | None = None
  end: int | None = None
  every: int = 10
  score: Any = dataclasses.field(default_factory=ByMagnitude)
  schedule: Any = dataclasses.field(default_factory=Periodic)

  sparse_gradients, grows, keeps_dense = False, True, True

  def check(self):
    if self.start is not None and self.start < 0: yield 'start', self.start, 'must be 0 or more steps'
    if self.every < 1: yield 'every', self.every, 'must be at least 1 step'

  def check_steps(self, steps: int):
    own = self.within(steps)
    if own.end > steps:
      yield 'end', own.end, f'must be at most the {steps} steps of the training: it would not end sparse'
    elif own.start >= own.end: yield 'start', own.start, f'must be before the last mask is drawn, at step {own.end}'

  def within(self, steps: int):
    own = dict(start=steps // 10, end=max(steps * 2 // 3, 1))
    return dataclasses.replace(self, **{name: value for name, value in own.items() if getattr(self, name) is None})

  def due(self, step): return self.schedule.due(step, self.start, self.end, self.every)

  def draw(self, moment):
    from efficient_lm.compression.sparse_updates import shrunk
    ramp = self.schedule.ramp(moment.step, self.start, self.end)
    return shrunk(moment, self.score.of(moment), ramp, free=True)


@dataclasses.dataclass(kw_only=True)
class SparseTraining:
  """Trains the weights whose path matches `where` with a share of `sparsity` of zeros, as `method` says: StaticMask, RigL,
  SET, AcDc or StraightThroughMask. Zeros are exact after every step, of each matrix floor(share * its weights); what goes
  together, and the share of each matrix, says `structure` (`compression.structures`). Masks end as Masked weights.
  `sparsity` 0 changes nothing."""
  sparsity: float
  method: Any = dataclasses.field(default_factory=RigL)
  structure: Any = dataclasses.field(default_factory=Unstructured)
  where: str = LAYERS

  touches = 'model'

  def check(self):
    yield from check_pattern(self, 'where')
    if not 0 <= self.sparsity < 1: yield 'sparsity', self.sparsity, 'must be a share of at least 0 and below 1'
    yield from self.structure.check_sparsity(self.sparsity)
    if isinstance(self.method, RigL) and self.structure.pattern is not None:
      name = type(self.method).__name__
      yield 'structure', self.structure, f'{name}(…) exchanges weights of a matrix, which {self.structure.name} does not ' \
                                         'let it: choose Unstructured(), WeightBlocks(…), or StraightThroughMask(…)'

  def check_training(self, training):
    """A method that would not come to its end in the training."""
    if self.sparsity == 0: return
    for field, value, fix in self.method.check_steps(training.steps): yield f'method.{field}', value, fix

  def __call__(self, learner, key):
    from efficient_lm.compression import coverage, masks, rewriting, sparse_updates
    if self.sparsity == 0:
      rewriting.apply_where(learner.model, self.where, lambda path, weight: weight)   # refuses what finds nothing
      return learner
    method, number = self.method.within(learner.steps), masks.next_number(learner.model)
    what = ', '.join(filter(None, (type(method).__name__, self.structure.name, f'{self.sparsity:.0%}')))
    note = coverage.coverage(learner.model, self.where).describe(f'SparseTraining ({what})')

    def tagged(path, weight):
      rewriting.require_trainable(weight)
      self.structure.fits(weight)
      if method.grows: masks.require_whole(weight)
      return masks.tagged(weight, number, self.structure.pattern)
    model = rewriting.apply_where(learner.model, self.where, tagged)
    if method.from_start: model = masks.started(model, self.structure, self.sparsity, number, method.first, key)
    optimizer = sparse_updates.masked_updates(learner.optimizer, method, self.structure, self.sparsity, number, key)
    return learner.replace(model=model, optimizer=optimizer, notes=(*learner.notes, note))

  def finish(self, model, opt_state):
    """The model with the masks as part of its weights."""
    from efficient_lm.compression import masks
    return masks.masked(model, opt_state)
