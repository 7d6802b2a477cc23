"""Optimizers read the letters of what they move; schedules meet their corners; a bad step is as if it never was."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.training import optimizers as optim
from efficient_lm.training.optimizers import AdamW, Muon, WarmupCosine, WarmupStableDecay, descend_rated, guarded

PEAK, RATE, DECAY = 0.01, 0.125, 0.5
# A schedule at its peak from the first step on, so that one update shows all.
CONSTANT = WarmupStableDecay(peak=PEAK, warmup=0, decay=0)
SHAPES = {   # name: shape, axes, inputs
  'matrix': ((8, 16), 'DF', 'D'), 'layers': ((2, 8, 16), 'DF', 'D'), 'experts': ((2, 3, 8, 16), 'EDF', 'D'),
  'heads': ((8, 2, 6), 'DNH', 'D'), 'merged': ((2, 6, 8), 'NHD', 'NH'), 'embedding': ((12, 8), 'VD', 'D'),
  'head': ((8, 12), 'DV', 'D'), 'norm': ((8,), 'D', ''), 'head norm': ((2, 6), 'NH', ''),
}
VECTORS, VOCABULARY = {'norm', 'head norm', 'bias'}, {'embedding', 'head'}


def variables(seed):
  """One Variable of each kind that models have."""
  rng = np.random.default_rng(seed)
  tree = {name: nnx.Param(jnp.asarray(rng.normal(size=shape), jnp.float32), axes=axes,
                          **(dict(inputs=inputs) if inputs else {})) for name, (shape, axes, inputs) in SHAPES.items()}
  tree['bias'] = nnx.Param(jnp.asarray(rng.normal(size=3), jnp.float32), axes='E', rate=RATE)
  return tree


def values(tree):
  return {name: np.asarray(leaf.get_value()) for name, leaf in tree.items()}


def assert_same_bits(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True): np.testing.assert_array_equal(x, y)


@functools.cache
def compiled(kind):
  transformation = descend_rated(kind(schedule=CONSTANT, weight_decay=DECAY, clip=1.0).build(1000))
  return jax.jit(transformation.init), jax.jit(transformation.update)


def first_update(kind, grads, params):
  init, update = compiled(kind)
  return update(grads, init(params), params)


def zeros(tree):
  return jax.tree.map(np.zeros_like, tree)


@pytest.mark.parametrize('kind', [WarmupCosine, WarmupStableDecay])
@pytest.mark.parametrize('warmup, steps', [(10, 100), (0, 100), (80, 100), (10, 1)])
def test_a_schedule_meets_its_corners(kind, warmup, steps):
  rate = kind(peak=2.0, warmup=warmup, final=0.25).build(steps)
  risen = min(warmup, steps // 2)   # a warm-up longer than half the run is cut
  assert float(rate(risen)) == pytest.approx(2.0)
  if risen:
    assert float(rate(0)) == 0
    assert float(rate(risen // 2)) == pytest.approx(2.0 * (risen // 2) / risen)
  assert float(rate(steps)) == pytest.approx(0.5) == pytest.approx(float(rate(steps + 50)))


@pytest.mark.parametrize('decay', [0.0, 0.2, 1.0])
def test_warmup_stable_decay_is_flat_until_its_last_share(decay):
  rate = WarmupStableDecay(peak=2.0, warmup=10, decay=decay, final=0.0).build(100)
  start = 100 - min(round(100 * decay), 90)
  assert all(float(rate(step)) == pytest.approx(2.0) for step in range(10, start))
  assert float(rate(100)) == 0
  if start < 99: assert float(rate((start + 100) // 2)) == pytest.approx(2.0 * (100 - (start + 100) // 2) / (100 - start))


def test_a_cosine_is_halfway_halfway():
  rate = WarmupCosine(peak=2.0, warmup=20, final=0.5).build(100)
  assert float(rate(60)) == pytest.approx(1.5)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([WarmupCosine, WarmupStableDecay]), st.integers(0, 50), st.integers(1, 60), st.floats(0, 1))
def test_a_schedule_never_leaves_the_range_from_0_to_its_peak_and_falls_after_warm_up(kind, warmup, steps, final):
  rate = kind(peak=1.0, warmup=warmup, final=final).build(steps)
  at = np.asarray(jax.vmap(rate)(jnp.arange(62)))
  # The cosine is rounded to float32.
  assert at.min() >= -1e-6 and at.max() <= 1 + 1e-6
  assert np.all(np.diff(at[min(warmup, steps // 2):]) <= 1e-6)


@pytest.mark.parametrize('spec, field', [
  (WarmupCosine(peak=0.0), 'peak'), (WarmupCosine(warmup=-1), 'warmup'), (WarmupStableDecay(final=2.0), 'final'),
  (WarmupStableDecay(decay=-0.5), 'decay'), (AdamW(b1=1.0), 'b1'), (AdamW(weight_decay=-1.0), 'weight_decay'),
  (AdamW(clip=0.0), 'clip'), (AdamW(state_bits=16), 'state_bits'), (AdamW(eps=-7.0), 'eps'),
  (AdamW(decay_until=1.5), 'decay_until'), (Muon(beta=-0.1), 'beta'), (Muon(b2=1.0), 'b2'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_a_wrong_field_is_named(spec, field):
  assert [name for name, _, _ in spec.check()] == [field]


@pytest.mark.parametrize('spec', [WarmupCosine(), WarmupStableDecay(), AdamW(), Muon()], ids=lambda s: type(s).__name__)
def test_the_defaults_have_no_complaints(spec):
  assert list(spec.check()) == []


@pytest.mark.parametrize('kind, decaying', [(AdamW, set(SHAPES) - VECTORS),
                                            (Muon, set(SHAPES) - VECTORS - VOCABULARY)])
def test_weight_decay_shrinks_matrices_and_leaves_norms_and_biases_alone(kind, decaying):
  """With no gradient the update is decay alone. A norm of heads has two letters and is no matrix all the same."""
  params = variables(0)
  updates, _ = first_update(kind, zeros(params), params)
  for name, update in values(updates).items():
    expected = -PEAK * DECAY * values(params)[name] if name in decaying else 0
    np.testing.assert_allclose(update, expected, rtol=1e-6, atol=0, err_msg=name)


def test_weight_decay_ends_when_it_is_told_to():
  params = variables(0)
  optimizer = AdamW(schedule=CONSTANT, weight_decay=DECAY, decay_until=0.5).build(4)
  state, moved = optimizer.init(params), []
  for _ in range(4):
    updates, state = optimizer.update(zeros(params), state, params)
    moved.append(any(np.any(update) for update in values(updates).values()))
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
  assert float(optim.global_norm(grads)) == float(optim.global_norm(other)) > 0


def as_matrices(name, array):
  """The matrices that an array is a stack of, inputs x outputs."""
  shape, axes, inputs = SHAPES[name]
  letters = axes.replace('E', '')
  stack = array.shape[:array.ndim - len(letters)]
  fan_in = int(np.prod([shape[axes.index(letter) - len(axes)] for letter in inputs]))
  return array.reshape(-1, fan_in, array.size // fan_in // int(np.prod(stack or (1,))))


MATRICES = sorted(set(SHAPES) - VECTORS - VOCABULARY)


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


def test_muon_leaves_vectors_and_all_that_touches_the_vocabulary_to_adam():
  """Adam's first step has one magnitude everywhere: the gradient over its own size."""
  for name in ['embedding', 'head', 'norm', 'head norm']:
    magnitude = np.abs(muon_update()[name])
    # The smallest entries of the clipped gradient are 1e-6 or so, beside which eps = 1e-8 is a hundredth.
    np.testing.assert_allclose(magnitude, magnitude.max(), rtol=0.02, err_msg=name)
  assert np.ptp(np.abs(muon_update()['matrix'])) > 0.1 * PEAK, 'a matrix does not'


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
