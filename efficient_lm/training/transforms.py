"""Gradient transformations, of optimizers and around every run's.

Everything is an optax gradient transformation over the trees of Variables that a model's parameters are; the letters of
a Variable (`axes`, `inputs`) say what is a matrix, what decays, and which dimensions Muon orthogonalises.
"""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efficient_lm import axes
from efficient_lm.tree import is_variable


def by_variable(function, tree, *rest):
  """Maps function(metadata, array, ...) over arrays, with the metadata of the Variable that each belongs to."""
  def visit(variable, *others):
    metadata = variable.get_metadata() if is_variable(variable) else {}
    return jax.tree.map(lambda *arrays: function(metadata, *arrays), variable, *others)
  return jax.tree.map(visit, tree, *rest, is_leaf=is_variable)


def matrices(params):
  """True for arrays that multiply, so have `inputs`: what weight decay applies to. Norm scales, those with a head
  dimension too, and biases are left alone."""
  return by_variable(lambda metadata, _: bool(metadata.get('inputs')), params)


def orthogonalized(params):
  """Muon's reduction and output dimensions of each array; None, so AdamW, for vectors and all that is looked up."""
  return by_variable(lambda metadata, _: _dimension_numbers(metadata), params)


def _dimension_numbers(metadata):
  letters, inputs = metadata.get('axes', ''), metadata.get('inputs', '')
  outputs = ''.join(letter for letter in letters if letter not in inputs + 'E')
  if len(letters) < 2 or set('VT') & set(letters) or not inputs or not outputs: return None
  return optax.contrib.MuonDimensionNumbers(axes.dims(letters, inputs), axes.dims(letters, outputs))


def matrices_of_adam(params):
  """True for the matrices that Muon leaves to AdamW."""
  return by_variable(lambda metadata, _: bool(metadata.get('inputs')) and _dimension_numbers(metadata) is None, params)


def decayed(weight_decay: float, schedule, where):
  """Adds -rate * weight_decay * p to updates that are final otherwise, of the arrays for which where(params) is True."""
  def update(updates, state, params):
    rate = schedule(state.count)
    shrink = lambda chosen, u, p: u - rate * weight_decay * p if chosen else u
    shrunk = jax.tree.map(shrink, where(params), updates, params)
    return shrunk, optax.ScaleByScheduleState(optax.safe_increment(state.count))
  return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update)


def global_norm(grads):
  """L2 norm of the gradients, those left out that are a balancing signal and not a slope (see `descend_rated`)."""
  return optax.tree.norm(by_variable(lambda metadata, g: g * ('rate' not in metadata), grads))


def descend_rated(inner):
  """Variables that carry a `rate` step by -rate * sign(gradient), past clipping, moments and decay; the rest by `inner`.

  The load bias of a router (Wang et al. 2024, arXiv:2408.15664) is one: its 'gradient' is the excess of load.
  """
  def update(grads, state, params=None, **extra):
    slopes = by_variable(lambda metadata, g: jnp.zeros_like(g) if 'rate' in metadata else g, grads)
    updates, state = inner.update(slopes, state, params, **extra)
    step = lambda metadata, g, u: -metadata['rate'] * jnp.sign(g) if 'rate' in metadata else u
    return by_variable(step, grads, updates), state
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
    updates, new = inner.update(jax.tree.map(lambda g: jnp.where(finite, g, 0), grads), state.inner, params,
                                loss=jnp.where(finite, loss, 0), **extra)
    updates = jax.tree.map(lambda u: jnp.where(finite, u, 0), updates)
    refused = (~finite).astype(jnp.int32)
    return updates, GuardState(jax.tree.map(keep, new, state.inner), state.skipped + refused,
                               (state.in_a_row + 1) * refused, jnp.where(finite, norm, state.grad_norm))
  return optax.GradientTransformationExtraArgs(init, update)


class SpikeState(NamedTuple):
  """inner: the optimizer's state; losses_W, norms_W: of the last finite steps, in the order of a ring; seen: how many there
  have been; spikes: steps refused so far."""
  inner: Any
  losses_W: Any
  norms_W: Any
  seen: Any
  spikes: Any


def without_spikes(inner, factor: float, window: int):
  """Refuses a step whose loss or gradient norm exceeds `factor` times its median over the last `window` steps, from the
  moment that half of these have been seen: parameters and the inner state stay bit for bit.

  What was refused enters the window, so a rise that lasts is taken for what it is after half of it.
  """
  inner = optax.with_extra_args_support(inner)
  def init(params):
    zero = jnp.zeros((), jnp.int32)
    return SpikeState(inner.init(params), jnp.zeros(window), jnp.zeros(window), zero, zero)
  def update(grads, state, params=None, *, loss, **extra):
    norm, known = global_norm(grads), jnp.minimum(state.seen, window)
    def is_spike(value, values_W):
      median = _median_of_first(values_W, known)
      return (median > 0) & (value > factor * median)
    refused = (2 * known >= window) & (is_spike(loss, state.losses_W) | is_spike(norm, state.norms_W))
    updates, new = inner.update(grads, state.inner, params, loss=loss, **extra)
    updates = jax.tree.map(lambda u: jnp.where(refused, 0, u), updates)
    kept = jax.tree.map(lambda new, old: jnp.where(refused, old, new), new, state.inner)
    place = state.seen % window
    return updates, SpikeState(kept, state.losses_W.at[place].set(loss), state.norms_W.at[place].set(norm), state.seen + 1,
                               state.spikes + refused)
  return optax.GradientTransformationExtraArgs(init, update)


def _median_of_first(values_W, known):
  """Of the first `known` values, at least one: the lower one of two in the middle."""
  ordered_W = jnp.sort(jnp.where(jnp.arange(len(values_W)) < known, values_W, jnp.inf))
  return ordered_W[jnp.maximum(known - 1, 0) // 2]


def spikes_in(state) -> dict[str, Any]:
  """{'spikes': how many steps have been refused}, of an optimizer's state that has one who counts."""
  counting = lambda node: isinstance(node, SpikeState)
  found = [node.spikes for node in jax.tree.leaves(state, is_leaf=counting) if counting(node)]
  return {'spikes': sum(found)} if found else {}
