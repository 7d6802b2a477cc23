"""Optimizers and schedules as a config names them; `transforms` has the gradient transformations that they are made of.

A schedule is a function of the number of steps taken before: 0 at the first one.
"""
import dataclasses
from typing import Any

from efficient_lm.lazy import lazy

optax = lazy('optax')


@dataclasses.dataclass(kw_only=True)
class WarmupCosine:
  """Linear warm-up over `warmup` steps to `peak`, then a cosine down to `final` times the peak, reached by the last step.
  The first step's rate is peak / warmup."""
  peak: float = 1e-3
  warmup: int = 50
  final: float = 0.1

  def check(self): yield from _check_schedule(self)

  def build(self, steps: int):
    warmup = min(self.warmup, steps // 2)
    return _at_next(optax.warmup_cosine_decay_schedule(0.0, self.peak, warmup, max(steps, warmup + 1),
                                                       self.peak * self.final))


@dataclasses.dataclass(kw_only=True)
class WarmupStableDecay:
  """Linear warm-up, a constant `peak`, then a linear fall to `final` times the peak over the last `decay` share of the
  steps (MiniCPM, Hu et al. 2024, section 4). The last step's rate is the final one; with `decay` 0 there is no fall."""
  peak: float = 1e-3
  warmup: int = 50
  decay: float = 0.2
  final: float = 0.0

  def check(self):
    yield from _check_schedule(self)
    if not 0 <= self.decay <= 1: yield 'decay', self.decay, 'must be a share between 0 and 1'

  def build(self, steps: int):
    warmup = min(self.warmup, steps // 2)
    fall = max(1, min(round(steps * self.decay), steps - warmup)) if self.decay else 0
    rise, plateau = optax.linear_schedule(0.0, self.peak, warmup), optax.constant_schedule(self.peak)
    if not fall: return _at_next(optax.join_schedules([rise, plateau], [warmup]))
    decline = optax.linear_schedule(self.peak, self.peak * self.final, fall)
    return _at_next(optax.join_schedules([rise, plateau, decline], [warmup, steps - fall]))


def _at_next(schedule):
  """Of the steps taken, the one under way included: the first step moves, and the last one has the schedule's last rate."""
  return lambda taken: schedule(taken + 1)


def _check_schedule(spec):
  if spec.peak <= 0: yield 'peak', spec.peak, 'must be positive'
  if spec.warmup < 0: yield 'warmup', spec.warmup, 'must be 0 or more steps'
  if not 0 <= spec.final <= 1: yield 'final', spec.final, 'must be a share between 0 and 1'


def _check_optimizer(spec, *betas):
  for field in betas:
    if not 0 <= getattr(spec, field) < 1: yield field, getattr(spec, field), 'must lie in [0, 1)'
  if spec.weight_decay < 0: yield 'weight_decay', spec.weight_decay, 'must be 0 or more'
  if spec.clip <= 0: yield 'clip', spec.clip, 'must be positive (float("inf") never clips)'


@dataclasses.dataclass(kw_only=True)
class AdamW:
  """Adam with decoupled weight decay on matrices (Loshchilov and Hutter 2019) after clipping to global norm `clip`. Weights
  decay during the first `decay_until` share of the steps. With `state_bits` 8 the moments of large arrays take a byte a
  number (Dettmers et al. 2022; see `moments`), a quarter of 32."""
  schedule: Any = dataclasses.field(default_factory=WarmupCosine)
  weight_decay: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  clip: float = dataclasses.field(default=1.0, metadata={'infinite': True})
  decay_until: float = 1.0
  state_bits: int = 32

  def check(self):
    yield from _check_optimizer(self, 'b1', 'b2')
    if not self.eps > 0: yield 'eps', self.eps, 'must be positive'
    if not 0 <= self.decay_until <= 1: yield 'decay_until', self.decay_until, 'must be a share between 0 and 1'
    if self.state_bits not in (8, 32): yield 'state_bits', self.state_bits, 'must be 32 or 8'

  def build(self, steps: int):
    from efficient_lm.training import moments, transforms
    by_moments = moments.scale_by_adam8 if self.state_bits == 8 else optax.scale_by_adam
    last = round(steps * self.decay_until)
    decay = self.weight_decay if self.decay_until == 1 else lambda step: self.weight_decay * (step < last)
    adam = optax.chain(by_moments(self.b1, self.b2, self.eps), optax.add_decayed_weights(decay, transforms.matrices),
                       optax.scale_by_learning_rate(self.schedule.build(steps)))
    return optax.chain(optax.clip_by_global_norm(self.clip), adam)


@dataclasses.dataclass(kw_only=True)
class Muon:
  """Momentum orthogonalised by Newton-Schulz on the matrices of the layers (Jordan 2024), each expert's and layer's by
  itself; AdamW on embedding, head, routers and vectors. As in Liu et al. 2025 (arXiv 2502.16982, section 2.2) the update is
  scaled to the size of AdamW's, so that one learning rate and one weight decay serve both, and what AdamW moves decays too:
  every matrix. Two things differ from the authors' code. It decays norms, which do not decay here, as with `AdamW`; and it
  has Muon move every matrix but embedding and head, so routers as well."""
  schedule: Any = dataclasses.field(default_factory=WarmupCosine)
  weight_decay: float = 0.1
  beta: float = 0.95
  b1: float = 0.9
  b2: float = 0.95
  clip: float = dataclasses.field(default=1.0, metadata={'infinite': True})

  def check(self): yield from _check_optimizer(self, 'beta', 'b1', 'b2')

  def build(self, steps: int):
    from efficient_lm.training import transforms
    schedule = self.schedule.build(steps)
    muon = optax.contrib.muon(
      schedule, beta=self.beta, weight_decay=self.weight_decay, adam_b1=self.b1, adam_b2=self.b2,
      muon_weight_dimension_numbers=transforms.orthogonalized, consistent_rms=0.2)
    others = transforms.decayed(self.weight_decay, schedule, transforms.matrices_of_adam)
    return optax.chain(optax.clip_by_global_norm(self.clip), muon, others)
