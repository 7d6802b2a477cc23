"""Optimizers read the letters of what they move; schedules meet their corners."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.training.optimizers import AdamW, Muon, WarmupCosine, WarmupStableDecay
from efficient_lm.training.transforms import descend_rated
from tests.training.parameters import OF_ADAM, SHAPES, VECTORS, values, variables, zeros

PEAK, DECAY = 0.01, 0.5
# A schedule at its peak from the first step on, so that one update shows all.
CONSTANT = WarmupStableDecay(peak=PEAK, warmup=0, decay=0)


@functools.cache
def compiled(kind):
  transformation = descend_rated(kind(schedule=CONSTANT, weight_decay=DECAY, clip=1.0).build(1000))
  return jax.jit(transformation.init), jax.jit(transformation.update)


def first_update(kind, grads, params):
  init, update = compiled(kind)
  return update(grads, init(params), params)


def rates(schedule, steps: int, more: int = 0):
  """What each of the steps of a training takes, the first one first."""
  return np.asarray(jax.vmap(schedule.build(steps))(jnp.arange(steps + more)), np.float64)


@pytest.mark.parametrize('kind', [WarmupCosine, WarmupStableDecay])
@pytest.mark.parametrize('warmup, steps', [(10, 100), (1, 100), (80, 100), (1, 2)])
def test_a_schedule_meets_its_corners(kind, warmup, steps):
  taken = rates(kind(peak=2.0, warmup=warmup, final=0.25), steps, more=50)
  risen = min(warmup, steps // 2)   # a warm-up longer than half the run is cut
  np.testing.assert_allclose(taken[:risen], 2.0 * np.arange(1, risen + 1) / risen, rtol=1e-6)
  np.testing.assert_allclose(taken[steps - 1:], 0.5, rtol=1e-6)


@pytest.mark.parametrize('decay', [0.001, 0.2, 1.0])
def test_warmup_stable_decay_is_flat_until_its_last_share(decay):
  taken = rates(WarmupStableDecay(peak=2.0, warmup=10, decay=decay, final=0.0), 100)
  fall = max(1, min(round(100 * decay), 90))
  np.testing.assert_allclose(taken[9:100 - fall], 2.0)
  np.testing.assert_allclose(taken[100 - fall:], 2.0 * np.arange(fall - 1, -1, -1) / fall, rtol=1e-5)
  assert taken[-1] == 0


def test_without_a_decay_the_rate_stays_at_its_peak():
  np.testing.assert_allclose(rates(WarmupStableDecay(peak=2.0, warmup=10, decay=0), 100)[9:], 2.0)


def test_a_cosine_is_halfway_halfway():
  assert rates(WarmupCosine(peak=2.0, warmup=20, final=0.5), 100)[59] == pytest.approx(1.5)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([WarmupCosine, WarmupStableDecay]), st.integers(0, 80), st.integers(1, 60),
       st.floats(0, 1, width=32, allow_subnormal=False))
def test_the_first_step_moves_the_last_has_the_final_rate_and_none_leaves_the_range(kind, warmup, steps, final):
  """Of a training of one step the first is the last."""
  taken = rates(kind(peak=1.0, warmup=warmup, final=final), steps, more=60 - steps)[:steps]   # one shape for all
  # The cosine is rounded to float32.
  assert abs(taken[-1] - final) <= 1e-6 and taken.min() >= -1e-6 and taken.max() <= 1 + 1e-6
  if steps > 1: assert taken[0] > 1e-4
  if kind is WarmupStableDecay: assert taken[-1] == np.float32(final)
  risen = max(min(warmup, steps // 2) - 1, 0)
  assert np.all(np.diff(taken[:risen + 1]) > 0) and np.all(np.diff(taken[risen:]) <= 1e-6)


@pytest.mark.parametrize('spec, field', [
  (WarmupCosine(peak=0.0), 'peak'), (WarmupCosine(warmup=-1), 'warmup'), (WarmupStableDecay(final=2.0), 'final'),
  (WarmupStableDecay(decay=-0.5), 'decay'), (AdamW(b1=1.0), 'b1'), (AdamW(weight_decay=-1.0), 'weight_decay'),
  (AdamW(clip=0.0), 'clip'), (AdamW(state_bits=16), 'state_bits'), (AdamW(eps=-7.0), 'eps'),
  (AdamW(decay_until=1.5), 'decay_until'), (Muon(beta=-0.1), 'beta'), (Muon(b2=1.0), 'b2'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_a_wrong_field_is_named(spec, field):
  assert [name for name, _, _ in spec.check()] == [field]


@pytest.mark.parametrize('spec', [WarmupCosine(), WarmupStableDecay(), AdamW(), Muon()], ids=lambda s: type(s).__name__)
def test_the_defaults_have_no_problems(spec):
  assert list(spec.check()) == []


@pytest.mark.parametrize('kind', [AdamW, Muon])
def test_weight_decay_shrinks_matrices_and_leaves_norms_and_biases_alone(kind):
  """With no gradient the update is decay alone: of embedding, head and router too, whatever moves them otherwise. A norm of
  heads has two letters and is no matrix all the same."""
  params = variables(0)
  updates, _ = first_update(kind, zeros(params), params)
  for name, update in values(updates).items():
    expected = 0 if name in VECTORS else -PEAK * DECAY * values(params)[name]
    np.testing.assert_allclose(update, expected, rtol=1e-6, atol=0, err_msg=name)


@pytest.mark.parametrize('name', ['matrix', 'router'])
def test_decay_follows_the_schedule_and_is_added_to_the_step(name):
  """Two steps of Muon with decay differ from two without by rate * weight_decay * p each."""
  params, grads, schedule = {name: variables(0)[name]}, {name: variables(1)[name]}, WarmupCosine(peak=PEAK, warmup=2)
  found = {}
  for decay in (0.0, DECAY):
    optimizer = Muon(schedule=schedule, weight_decay=decay).build(10)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(2): updates, state = update(grads, state, params)
    found[decay] = values(updates)[name]
  rate = float(schedule.build(10)(1))
  np.testing.assert_allclose(found[DECAY] - found[0.0], -rate * DECAY * values(params)[name], rtol=1e-3, atol=1e-8)


def test_weight_decay_ends_when_it_is_told_to():
  params = {'matrix': variables(0)['matrix']}
  optimizer = AdamW(schedule=CONSTANT, weight_decay=DECAY, decay_until=0.5).build(4)
  state, update, moved = optimizer.init(params), jax.jit(optimizer.update), []
  for _ in range(4):
    updates, state = update(zeros(params), state, params)
    moved.append(bool(np.any(values(updates)['matrix'])))
  assert moved == [True, True, False, False]


def test_clipping_scales_the_whole_gradient_to_the_norm_and_only_when_it_is_longer():
  """Seen in Adam's first moment, which after one step is (1 - b1) times the clipped gradient."""
  params, grads = variables(0), variables(1)
  norm = np.sqrt(sum(np.sum(g ** 2) for name, g in values(grads).items() if name != 'bias'))
  for length, shrink in ((4, 0.25), (0.25, 1)):
    scaled = jax.tree.map(lambda g: g * np.float32(length / norm), grads)
    moments = values(optax.tree.get(first_update(AdamW, scaled, params)[1], 'mu'))
    for name in SHAPES:
      expected = 0.1 * shrink * values(scaled)[name]
      np.testing.assert_allclose(moments[name], expected, rtol=1e-5, atol=1e-9, err_msg=name)


def as_matrices(name, array):
  """The matrices that an array is a stack of, inputs x outputs."""
  shape, axes, inputs = SHAPES[name]
  letters = axes.replace('E', '')
  stack = array.shape[:array.ndim - len(letters)]
  fan_in = int(np.prod([shape[axes.index(letter) - len(axes)] for letter in inputs]))
  return array.reshape(-1, fan_in, array.size // fan_in // int(np.prod(stack or (1,))))


MATRICES = sorted(set(SHAPES) - VECTORS - OF_ADAM)


@functools.cache
def muon_update():
  updates, _ = first_update(Muon, variables(1), zeros(variables(0)))
  return values(updates)


@pytest.mark.parametrize('name', MATRICES)
def test_muon_gives_every_matrix_singular_values_near_one_constant(name):
  for matrix in as_matrices(name, muon_update()[name]):
    constant = PEAK * 0.2 * np.sqrt(max(matrix.shape))
    singular = np.linalg.svd(matrix, compute_uv=False) / constant
    # Jordan's quintic is not made to converge: after five steps singular values lie between about 0.7 and 1.2.
    assert singular.min() > 0.6 and singular.max() < 1.3


@pytest.mark.parametrize('name', ['layers', 'experts'])
def test_muon_orthogonalises_layers_and_experts_one_by_one(name):
  alone = {'matrix': variables(1)['matrix']}
  stacked = as_matrices(name, muon_update()[name])
  for gradient, update in zip(as_matrices(name, values(variables(1))[name]), stacked, strict=True):
    alone['matrix'].set_value(jnp.asarray(gradient))
    by_itself, _ = first_update(Muon, alone, zeros(alone))
    # Five steps of slope 3.4 make 500 of a rounding of 2**-24; the update's singular values are PEAK * 0.8.
    np.testing.assert_allclose(update, values(by_itself)['matrix'], rtol=0, atol=PEAK * 1e-4)


def test_muon_leaves_vectors_routers_and_all_that_touches_the_vocabulary_to_adam():
  """Adam's first step has one magnitude everywhere: the gradient over its own size."""
  for name in ['embedding', 'head', 'router', 'norm', 'head norm']:
    magnitude = np.abs(muon_update()[name])
    # The smallest entries of the clipped gradient are 1e-6 or so, beside which eps = 1e-8 is a hundredth.
    np.testing.assert_allclose(magnitude, magnitude.max(), rtol=0.02, err_msg=name)
  assert np.ptp(np.abs(muon_update()['matrix'])) > 0.1 * PEAK, 'a matrix does not'
