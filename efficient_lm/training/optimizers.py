"""Optimizers and schedules as a config names them, and the transformations that every run wraps around them.

Everything is an optax gradient transformation over the trees of Variables that a model's parameters are; the letters of
a Variable (`axes`, `inputs`) say what is a matrix, what decays, and which dimensions Muon orthogonalises.
"""
import dataclasses
from typing import Any, NamedTuple

from efficient_lm.lazy import lazy

jax = lazy('jax')
jnp = lazy('jax.numpy')
optax = lazy('optax')
axes = lazy('efficient_lm.axes')
moments = lazy('efficient_lm.training.moments')


@dataclasses.dataclass(kw_only=True)
class WarmupCosine:
  """Linear warm-up over `warmup` steps to `peak`, then a cosine down to `final` times the peak at the last step."""
  peak: float = 1e-3
  warmup: int = 50
  final: float = 0.1

  def check(self): yield from _check_schedule(self)

  def build(self, steps: int):
    warmup = min(self.warmup, steps // 2)
    return optax.warmup_cosine_decay_schedule(0.0, self.peak, warmup, max(steps, warmup + 1), self.peak * self.final)


@dataclasses.dataclass(kw_only=True)
class WarmupStableDecay:
  """Linear warm-up, a constant `peak`, then a linear fall to `final` times the peak over the last `decay` share of the
  steps (MiniCPM, Hu et al. 2024, section 4)."""
  peak: float = 1e-3
  warmup: int = 50
  decay: float = 0.2
  final: float = 0.0

  def check(self):
    yield from _check_schedule(self)
    if not 0 <= self.decay <= 1: yield 'decay', self.decay, 'must be a share between 0 and 1'

  def build(self, steps: int):
    warmup = min(self.warmup, steps // 2)
    fall = max(1, min(round(steps * self.decay), steps - warmup))
    return optax.join_schedules(
      [optax.linear_schedule(0.0, self.peak, warmup), optax.constant_schedule(self.peak),
       optax.linear_schedule(self.peak, self.peak * self.final, fall)], [warmup, steps - fall])


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
  clip: float = 1.0
  decay_until: float = 1.0
  state_bits: int = 32

  def check(self):
    yield from _check_optimizer(self, 'b1', 'b2')
    if not self.eps > 0: yield 'eps', self.eps, 'must be positive'
    if not 0 <= self.decay_until <= 1: yield 'decay_until', self.decay_until, 'must be a share between 0 and 1'
    if self.state_bits not in (8, 32): yield 'state_bits', self.state_bits, 'must be 32 or 8'

  def build(self, steps: int):
    by_moments = moments.scale_by_adam8 if self.state_bits == 8 else optax.scale_by_adam
    last = round(steps * self.decay_until)
    decay = self.weight_decay if self.decay_until == 1 else lambda step: self.weight_decay * (step < last)
    adam = optax.chain(by_moments(self.b1, self.b2, self.eps), optax.add_decayed_weights(decay, matrices),
                       optax.scale_by_learning_rate(self.schedule.build(steps)))
    return optax.chain(optax.clip_by_global_norm(self.clip), adam)


@dataclasses.dataclass(kw_only=True)
class Muon:
  """Momentum orthogonalised by Newton-Schulz on the matrices of the layers (Jordan 2024), each expert's and layer's by
  itself; AdamW on embedding, head and vectors. The update's size matches AdamW's (Liu et al. 2025, section 2.2), so the
  same peak learning rate serves both."""
  schedule: Any = dataclasses.field(default_factory=WarmupCosine)
  weight_decay: float = 0.1
  beta: float = 0.95
  b1: float = 0.9
  b2: float = 0.95
  clip: float = 1.0

  def check(self): yield from _check_optimizer(self, 'beta', 'b1', 'b2')

  def build(self, steps: int):
    muon = optax.contrib.muon(
      self.schedule.build(steps), beta=self.beta, weight_decay=self.weight_decay, adam_b1=self.b1, adam_b2=self.b2,
      muon_weight_dimension_numbers=orthogonalized, consistent_rms=0.2)
    return optax.chain(optax.clip_by_global_norm(self.clip), muon)


def _by_variable(function, tree, *rest):
  """Maps function(metadata, array, ...) over arrays, with the metadata of the Variable that each belongs to."""
  def visit(variable, *others):
    metadata = variable.get_metadata() if axes.is_variable(variable) else {}
    return jax.tree.map(lambda *arrays: function(metadata, *arrays), variable, *others)
  return jax.tree.map(visit, tree, *rest, is_leaf=axes.is_variable)


def matrices(params):
  """True for arrays that multiply, so have `inputs`: what weight decay applies to. Norm scales, those with a head
  dimension too, and biases are left alone."""
  return _by_variable(lambda metadata, _: bool(metadata.get('inputs')), params)


def orthogonalized(params):
  """Muon's reduction and output dimensions of each array; None, so AdamW, for vectors and all that touches the vocab."""
  def numbers(metadata, _):
    letters, inputs = metadata.get('axes', ''), metadata.get('inputs', '')
    outputs = ''.join(letter for letter in letters if letter not in inputs + 'E')
    if len(letters) < 2 or 'V' in letters or not inputs or not outputs: return None
    return optax.contrib.MuonDimensionNumbers(axes.dims(letters, inputs), axes.dims(letters, outputs))
  return _by_variable(numbers, params)


def global_norm(grads):
  """L2 norm of the gradients, those left out that are a balancing signal and not a slope (see `descend_rated`)."""
  return optax.tree.norm(_by_variable(lambda metadata, g: g * ('rate' not in metadata), grads))


def descend_rated(inner):
  """Variables that carry a `rate` step by -rate * sign(gradient), past clipping, moments and decay; the rest by `inner`.

  The load bias of a router (Wang et al. 2024, arXiv:2408.15664) is one: its 'gradient' is the load violation.
  """
  def update(grads, state, params=None, **extra):
    slopes = _by_variable(lambda metadata, g: jnp.zeros_like(g) if 'rate' in metadata else g, grads)
    updates, state = inner.update(slopes, state, params, **extra)
    step = lambda metadata, g, u: -metadata['rate'] * jnp.sign(g) if 'rate' in metadata else u
    return _by_variable(step, grads, updates), state
  inner = optax.with_extra_args_support(inner)
  return optax.GradientTransformationExtraArgs(inner.init, update)


class GuardState(NamedTuple):
  """inner: the guarded optimizer's state; skipped: steps refused so far; in_a_row: since the last accepted one;
  grad_norm: of the last accepted step, so that the state stays finite and can be saved."""
  inner: Any
  skipped: Any
  in_a_row: Any
  grad_norm: Any


def guarded(inner):
  """Refuses a step whose loss or gradient norm is not finite: parameters and optimizer state stay bit for bit.

  The optimizer is handed zeros in place of a refused gradient, so nothing non-finite is ever computed with.
  """
  inner = optax.with_extra_args_support(inner)
  def init(params):
    zero = jnp.zeros((), jnp.int32)
    return GuardState(inner.init(params), zero, zero, jnp.zeros(()))
  def update(grads, state, params=None, *, loss, **extra):
    norm = global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
    keep = lambda new, old: jnp.where(finite, new, old)
    updates, new = inner.update(jax.tree.map(lambda g: jnp.where(finite, g, 0), grads), state.inner, params, **extra)
    updates = jax.tree.map(lambda u: jnp.where(finite, u, 0), updates)
    refused = (~finite).astype(jnp.int32)
    return updates, GuardState(jax.tree.map(keep, new, state.inner), state.skipped + refused,
                               (state.in_a_row + 1) * refused, jnp.where(finite, norm, state.grad_norm))
  return optax.GradientTransformationExtraArgs(init, update)
