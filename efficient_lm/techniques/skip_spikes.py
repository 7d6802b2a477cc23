"""Steps that would throw a training off its course are not taken."""
import dataclasses
import math


@dataclasses.dataclass(kw_only=True)
class SkipSpikes:
  """Refuses a step whose loss or gradient norm exceeds `factor` times its median over the last `window` steps, once half of
  these have been seen, and counts it (`spikes` in the log), after Chowdhery et al. 2022 (section 5.1), who went back and
  skipped the batches by hand. Refused steps leave no trace in parameters and optimizer. What was refused enters the median,
  so that a rise which lasts is accepted after half of `window`. Where several techniques change the optimizer, it guards
  those before it."""
  factor: float = 5.0
  window: int = 128

  touches = 'optimizer'

  def check(self):
    if not (isinstance(self.factor, (int, float)) and 1 < self.factor < math.inf):
      yield 'factor', self.factor, 'must be a number above 1'
    if not (isinstance(self.window, int) and 2 <= self.window <= 65_536):
      yield 'window', self.window, 'must be a whole number of steps, from 2 to 65536'

  def __call__(self, learner, key):
    from efficient_lm.training.transforms import without_spikes
    note = f'SkipSpikes: loss or gradient norm above {self.factor:g} times the median of {self.window} steps'
    return learner.replace(optimizer=without_spikes(learner.optimizer, self.factor, self.window),
                           notes=(*learner.notes, note))
