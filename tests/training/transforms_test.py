"""Signs move what is rated, norms leave it out, and a bad step is as if it never was."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_lm.training import transforms
from efficient_lm.training.optimizers import AdamW, Muon, WarmupStableDecay
from efficient_lm.training.transforms import descend_rated, guarded
from tests.training.parameters import RATE, assert_same_bits, values, variables

CONSTANT = WarmupStableDecay(peak=0.01, warmup=0, decay=0)


@functools.cache
def compiled(kind):
  transformation = descend_rated(kind(schedule=CONSTANT, weight_decay=0.5, clip=1.0).build(1000))
  return jax.jit(transformation.init), jax.jit(transformation.update)


def first_update(kind, grads, params):
  init, update = compiled(kind)
  return update(grads, init(params), params)


@pytest.mark.parametrize('kind', [AdamW, Muon])
def test_rated_variables_step_by_plus_or_minus_their_rate_exactly(kind):
  params, grads = variables(0), variables(1)
  grads['bias'].set_value(jnp.array([1e-20, -3e5, 0.0]))
  updates, _ = first_update(kind, grads, params)
  np.testing.assert_array_equal(values(updates)['bias'], [-RATE, RATE, 0])


@pytest.mark.parametrize('kind', [AdamW, Muon])
def test_what_rated_variables_receive_moves_nothing_else_and_is_no_part_of_the_norm(kind):
  params, grads, other = variables(0), variables(1), variables(1)
  other['bias'].set_value(other['bias'].get_value() * 1e6)
  (a, state_a), (b, state_b) = (first_update(kind, g, params) for g in (grads, other))
  assert_same_bits({k: v for k, v in a.items() if k != 'bias'}, {k: v for k, v in b.items() if k != 'bias'})
  assert_same_bits(state_a, state_b)
  assert float(transforms.global_norm(grads)) == float(transforms.global_norm(other)) > 0


@functools.cache
def guarded_update():
  transformation = guarded(descend_rated(AdamW(schedule=CONSTANT).build(1000)))
  def step(params, state, grads, loss):
    updates, state = transformation.update(grads, state, params, loss=loss)
    return optax.apply_updates(params, updates), state
  return jax.jit(transformation.init), jax.jit(step)


def poisoned(name, bad):
  grads = variables(7)
  grads[name].set_value(grads[name].get_value().ravel().at[1].set(bad).reshape(grads[name].get_value().shape))
  return grads


@pytest.mark.parametrize('grads, loss', [
  (variables, np.nan), (variables, np.inf),
  (functools.partial(poisoned, 'matrix', np.nan), 1.0), (functools.partial(poisoned, 'norm', -np.inf), 1.0),
  (functools.partial(poisoned, 'bias', np.nan), 1.0),
], ids=['nan loss', 'infinite loss', 'nan gradient', 'infinite gradient', 'nan of a rated variable'])
def test_a_step_that_is_not_finite_leaves_no_trace_but_its_count(grads, loss):
  init, step = guarded_update()
  bad = grads(7) if grads is variables else grads()
  params = variables(0)
  params, state = step(params, init(params), variables(1), 1.0)
  after, refused = step(params, state, bad, loss)
  assert_same_bits(after, params)
  assert_same_bits(refused.inner, state.inner)
  assert (int(refused.skipped), int(refused.in_a_row)) == (1, 1)
  again, refused = step(after, refused, bad, loss)
  assert (int(refused.skipped), int(refused.in_a_row)) == (2, 2)
  # What follows is what follows without the bad steps.
  with_bad, state_with = step(again, refused, variables(2), 2.0)
  without, state_without = step(params, state, variables(2), 2.0)
  assert_same_bits(with_bad, without)
  assert_same_bits(state_with.inner, state_without.inner)
  assert (int(state_with.skipped), int(state_with.in_a_row)) == (2, 0)


def test_the_reported_norm_leaves_balancing_signals_out():
  init, step = guarded_update()
  params, grads = variables(0), variables(1)
  _, state = step(params, init(params), grads, 1.0)
  norm = np.sqrt(sum(np.sum(g ** 2) for name, g in values(grads).items() if name != 'bias'))
  assert float(state.grad_norm) == pytest.approx(norm, rel=1e-5)
