"""Training as a config names it, and as a stage of a run: model in, trained model out."""
import dataclasses
from typing import Any

from efficient_lm.errors import at_least
from efficient_lm.models.added import added
from efficient_lm.training.optimizers import AdamW


@dataclasses.dataclass(kw_only=True)
class Training:
  """How long, on how much at once, and how. `batch_size` counts sequences of a step over all devices, in `accumulate`
  equal parts one after the other; the `every`s count steps. Every `replay_every` steps one is computed twice, to see whether
  both give the same (see `training.replay`); 0: never."""
  steps: int
  batch_size: int
  sequence_length: int
  optimizer: Any = dataclasses.field(default_factory=AdamW)
  accumulate: int = 1
  log_every: int = 10
  eval_every: int = 100
  checkpoint_every: int = 100
  replay_every: int = added(0)

  def check(self):
    yield from at_least(self, steps=0, batch_size=1, sequence_length=2, accumulate=1, log_every=1, eval_every=1,
                         checkpoint_every=1, replay_every=0)
    if self.accumulate > 0 and self.batch_size % self.accumulate:
      yield 'batch_size', self.batch_size, f'must be divisible by accumulate = {self.accumulate}'

  @property
  def tokens_per_step(self) -> int:
    """Of a global batch."""
    return self.batch_size * self.sequence_length


@dataclasses.dataclass(kw_only=True)
class Train:
  """The stage: `training` of what the stage before left, with `techniques` in their order. It saves its state while it goes
  and resumes at its own step; it may be taken up again with more steps."""
  training: Training
  techniques: tuple[Any, ...] = ()

  resumes = True
  across_processes = True   # several processes may perform it together
  # Settings that do not change what comes out, and `steps`, of which there may be more: the run goes on from where it is.
  cosmetic = ('log_every', 'eval_every', 'checkpoint_every', 'replay_every')
  extends = ('steps',)

  def check(self):
    for i, technique in enumerate(self.techniques):
      for field, value, fix in getattr(technique, 'check_training', _no_check)(self.training):
        yield f'techniques[{i}].{field}', value, fix

  def abstract(self, model):
    """The model that comes out, from shapes alone under `jax.eval_shape`."""
    from efficient_lm.training import learner
    return learner.abstract_result(model, self.training, self.techniques)

  def follow(self, invariants: dict[str, tuple]) -> dict[str, tuple]:
    """Where its techniques take what is promised of weights (see `runs.invariants`)."""
    for technique in self.techniques:
      if hasattr(technique, 'follow'): invariants = technique.follow(invariants)
    return invariants

  def __call__(self, model, context):
    """The trained model, and what its techniques have to say. Raises NonFinite, Preempted."""
    from efficient_lm.training import trainer
    return trainer.train(self, model, context)


def _no_check(training):
  yield from ()
