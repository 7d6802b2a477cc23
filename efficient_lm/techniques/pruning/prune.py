"""Magnitude pruning during training: a growing share of zeros, exact, and masks that stay."""
import dataclasses

from efficient_lm.compression.rules import LAYERS, check_pattern
from efficient_lm.lazy import lazy

jnp = lazy('jax.numpy')


@dataclasses.dataclass(kw_only=True)
class Prune:
  """Sets the smallest weights of each matrix (of each layer, of each expert) to zero, a share that grows with the cubic
  schedule of Zhu and Gupta 2017 (eq. 1) from 0 at step `start` to `sparsity` at step `end`; the mask is drawn anew
  every `every` steps, for the last time at `end`, and holds in between and from there on, also in all that follows: what is
  left are Masked weights. None: a tenth and two thirds of the training's steps. `sparsity` 0 changes nothing."""
  sparsity: float
  start: int | None = None
  end: int | None = None
  every: int = 10
  where: str = LAYERS

  touches = 'model'

  def check(self):
    yield from check_pattern(self, 'where')
    if not 0 <= self.sparsity < 1: yield 'sparsity', self.sparsity, 'must be a share of at least 0 and below 1'
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
    from efficient_lm.compression import coverage, masks, rewriting
    if self.sparsity == 0:
      rewriting.apply_where(learner.model, self.where, lambda path, weight: weight)   # refuses what finds nothing
      return learner
    number = masks.next_number(learner.model)

    def tagged(path, weight):
      rewriting.require_trainable(weight)
      return masks.tagged(weight, number)
    note = coverage.coverage(learner.model, self.where).describe(f'Prune ({self.sparsity:.0%})')
    start, end = self.bounds(learner.steps)
    optimizer = masks.pruned(learner.optimizer, lambda step: self.share(step, start, end),
                             lambda step: self.redraws(step, start, end), number)
    return learner.replace(model=rewriting.apply_where(learner.model, self.where, tagged), optimizer=optimizer,
                           notes=(*learner.notes, note))

  def finish(self, model, opt_state):
    """The model with the masks as part of its weights."""
    from efficient_lm.compression import masks
    return masks.masked(model, opt_state)

  def share(self, step, start: int, end: int):
    """Share of zeros after `step` steps: s * (1 - (1 - t)^3), t from 0 to 1 between start and end."""
    t = jnp.clip((step - start) / (end - start), 0, 1)
    return self.sparsity * (1 - (1 - t) ** 3)

  def redraws(self, step, start: int, end: int):
    """Whether the mask is drawn anew after `step` steps."""
    due = ((step - start) % self.every == 0) | (step == end)
    return due & (step > start) & (step <= end)
