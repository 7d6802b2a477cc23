"""A step far outside of what came before leaves no trace; nothing else is changed by looking."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_lm.techniques import SkipSpikes
from efficient_lm.training.learner import Learner
from efficient_lm.training.transforms import guarded, spikes_in
from tests.training.parameters import assert_same_bits

PARAMS = {'w': jnp.zeros(3)}


def optimizer(**settings):
  made = SkipSpikes(**settings)(Learner(None, None, optax.adam(0.1)), jax.random.key(0))
  assert made.notes[0].startswith('SkipSpikes')
  return guarded(made.optimizer)


def run(chosen, steps):
  """Parameters, state, and how many had been refused after each of these (loss, gradient)."""
  update = jax.jit(chosen.update)
  params, state, refused = PARAMS, chosen.init(PARAMS), []
  for loss, gradient in steps:
    updates, state = update({'w': jnp.full(3, gradient)}, state, params, loss=jnp.float32(loss))
    params = optax.apply_updates(params, updates)
    refused.append(int(spikes_in(state)['spikes']))
  return params, state, refused


def calm(count, seed=0):
  rng = np.random.default_rng(seed)
  return [(float(rng.uniform(1, 2)), float(rng.uniform(0.5, 1))) for _ in range(count)]


@pytest.mark.parametrize('spike', [(30.0, 0.7), (1.5, 50.0)], ids=['loss', 'gradient'])
def test_a_spike_is_as_if_it_never_was(spike):
  before, after = calm(20), calm(10, 1)
  chosen = optimizer(factor=5.0, window=8)
  with_it, state, refused = run(chosen, [*before, spike, *after])
  without, other, none = run(chosen, [*before, *after])
  assert_same_bits(with_it, without)
  assert_same_bits(state.inner.inner, other.inner.inner)
  assert refused[-1] == 1 and refused[20] == 1 and refused[19] == 0 and none[-1] == 0


def test_where_nothing_stands_out_it_changes_nothing_bit_for_bit():
  plain = guarded(optax.adam(0.1))
  params, state = PARAMS, plain.init(PARAMS)
  for loss, gradient in calm(30):
    updates, state = jax.jit(plain.update)({'w': jnp.full(3, gradient)}, state, params, loss=jnp.float32(loss))
    params = optax.apply_updates(params, updates)
  assert_same_bits(run(optimizer(window=8), calm(30))[0], params)
  assert spikes_in(state) == {}, 'a run that does not ask for it logs nothing of it'


def test_nothing_is_refused_before_half_of_the_window_has_been_seen():
  assert run(optimizer(window=8), [*calm(3), (99.0, 99.0)])[2][-1] == 0
  assert run(optimizer(window=8), [*calm(4), (99.0, 99.0)])[2][-1] == 1


def test_a_rise_that_lasts_is_accepted_after_half_of_the_window():
  refused = run(optimizer(factor=3.0, window=8), [*calm(20), *[(50.0, 0.7)] * 20])[2]
  assert 3 <= refused[-1] <= 5 and refused[-1] == refused[-10]


def test_what_is_not_finite_is_left_to_the_guard():
  _, state, refused = run(optimizer(window=8), [*calm(20), (np.nan, 1.0), (1.0, np.inf)])
  assert refused[-1] == 0 and int(state.skipped) == 2
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)), 'it can be saved'


def test_a_gradient_that_was_zero_is_nothing_to_compare_with():
  assert run(optimizer(window=4), [*[(1.0, 0.0)] * 8, (1.0, 1.0)])[2][-1] == 0


@pytest.mark.parametrize('settings', [{'factor': 1.0}, {'factor': float('nan')}, {'factor': float('inf')}, {'window': 1},
                                      {'window': 2.5}, {'window': 10 ** 9}])
def test_settings_that_make_no_sense_are_refused(settings):
  assert [field for field, _, _ in SkipSpikes(**settings).check()] == list(settings)
  assert not list(SkipSpikes().check())
