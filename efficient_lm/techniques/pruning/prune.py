"""Pruning during training: a growing share of zeros, exact, and masks that stay."""
import dataclasses
from typing import Any

from efficient_lm.compression.gradual import Cubic
from efficient_lm.compression.rules import LAYERS, check_pattern
from efficient_lm.compression.scores import ByMagnitude
from efficient_lm.compression.structures import Unstructured
from efficient_lm.models.added import added


@dataclasses.dataclass(kw_only=True)
class Prune:
  """Sets the smallest weights of each matrix (of each layer, of each expert) to zero, a share that grows with the cubic
  schedule of Zhu and Gupta 2017 (eq. 1) from 0 at step `start` to `sparsity` at step `end`; the mask is drawn anew
  every `every` steps, for the last time at `end`, and holds in between and from there on, also in all that follows: what is
  left are Masked weights. None: a tenth and two thirds of the training's steps. `sparsity` 0 changes nothing.

  Which go first is said by a `score` (`compression.scores`), what goes together, and how much of each matrix, by a
  `structure` (`compression.structures`), how fast by a `schedule` (`compression.gradual`). What is gone stays so: masks that
  move are `SparseTraining`'s."""
  sparsity: float
  start: int | None = None
  end: int | None = None
  every: int = 10
  where: str = LAYERS
  score: Any = added(make=ByMagnitude)
  structure: Any = added(make=Unstructured)
  schedule: Any = added(make=Cubic)

  touches = 'model'

  def check(self):
    yield from check_pattern(self, 'where')
    if not 0 <= self.sparsity < 1: yield 'sparsity', self.sparsity, 'must be a share of at least 0 and below 1'
    yield from self.structure.check_sparsity(self.sparsity)
    if self.start is not None and self.start < 0: yield 'start', self.start, 'must be 0 or more steps'
    if self.every < 1: yield 'every', self.every, 'must be at least 1 step'
    if None not in (self.start, self.end) and self.end <= self.start:
      yield 'end', self.end, f'must be after start = {self.start}'

  def check_training(self, training):
    """Pruning that would not be complete by the end of the training."""
    if self.sparsity == 0: return
    start, end = self.bounds(training.steps)
    if self.end is not None and end > training.steps:
      yield 'end', self.end, f'must be at most the {training.steps} steps of the training: pruning would not be complete'
    elif start >= (last := min(end, training.steps)):
      yield 'start', self.start, f'must be before the pruning ends, at step {last} of {training.steps}'

  def bounds(self, steps: int) -> tuple[int, int]:
    """Where the pruning starts and ends in a training of so many steps."""
    start = steps // 10 if self.start is None else self.start
    return start, max(steps * 2 // 3, start + 1) if self.end is None else self.end

  def __call__(self, learner, key):
    from efficient_lm.compression import coverage, masks, rewriting, sparse_updates
    if self.sparsity == 0:
      rewriting.apply_where(learner.model, self.where, lambda path, weight: weight)   # refuses what finds nothing
      return learner
    number = masks.next_number(learner.model)

    def tagged(path, weight):
      rewriting.require_trainable(weight)
      self.structure.fits(weight)
      return masks.tagged(weight, number, self.structure.pattern)
    what = f'{self.structure.name}, {self.sparsity:.0%}' if self.structure.name else f'{self.sparsity:.0%}'
    note = coverage.coverage(learner.model, self.where).describe(f'Prune ({what})')
    optimizer = sparse_updates.masked_updates(learner.optimizer, Shrinking(self, *self.bounds(learner.steps)),
                                              self.structure, self.sparsity, number, key)
    return learner.replace(model=rewriting.apply_where(learner.model, self.where, tagged), optimizer=optimizer,
                           notes=(*learner.notes, note))

  def finish(self, model, opt_state):
    """The model with the masks as part of its weights."""
    from efficient_lm.compression import masks
    return masks.masked(model, opt_state)

  def share(self, step, start: int, end: int):
    """Share of zeros after `step` steps: of the cubic schedule s * (1 - (1 - t)^3), t from 0 to 1 between start and end."""
    return self.sparsity * self.schedule.ramp(step, start, end)

  def redraws(self, step, start: int, end: int):
    """Whether the mask is drawn anew after `step` steps."""
    return self.schedule.due(step, start, end, self.every)


@dataclasses.dataclass(frozen=True)
class Shrinking:
  """The method of `Prune` (see `compression.sparse_updates`): live weights become ever fewer."""
  prune: Prune
  start: int
  end: int

  from_start = sparse_gradients = grows = keeps_dense = False

  @property
  def score(self): return self.prune.score

  def due(self, step):
    """Whether the mask is drawn anew after `step` updates."""
    return self.prune.redraws(step, self.start, self.end)

  def draw(self, moment):
    """The new mask."""
    from efficient_lm.compression.sparse_updates import shrunk
    return shrunk(moment, self.score.of(moment), self.prune.schedule.ramp(moment.step, self.start, self.end))
