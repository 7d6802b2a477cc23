"""Masks of the largest magnitudes, of a matrix or of every few inputs; and an optimizer under which they hold exactly."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from efficient_lm.compression import masks
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Int, MidRise
from efficient_lm.techniques.pruning.prune import Prune
from efficient_lm.techniques.pruning.prune_once import NofM
from efficient_lm.training.learner import Learner
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.invariants import Pattern
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.low_precision import low_precision
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.rotated import Rotated
from efficient_lm.weights.weight import Dense

mask = jax.jit(masks.magnitude_mask, static_argnames=('share', 'letters'))
LETTERS = [('DF', 'D', (16, 6)), ('NHD', 'NH', (2, 8, 5)), ('EFD', 'F', (3, 8, 5)), ('DNH', 'D', (8, 2, 4))]


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def by_sorting(values, share):
  """The definition: the floor(share * size) smallest magnitudes go, of equal ones the first."""
  order = np.argsort(np.abs(values).reshape(-1), kind='stable')
  keep = np.ones(values.size, bool)
  keep[order[:int(np.floor(np.float32(share) * values.size))]] = False
  return keep.reshape(values.shape)


NUMBERS = st.one_of(st.floats(width=32, allow_nan=False), st.sampled_from([0., -0., 1., -1., 2.**-149, np.inf, -np.inf]))


@given(hnp.arrays(np.float32, (4, 6), elements=NUMBERS), st.sampled_from([0., 0.25, 1 / 3, 0.5, 0.75, 0.99]))
@settings(deadline=None, max_examples=200)
def test_bisecting_bits_is_sorting_bit_for_bit(values, share):
  """Ties, zeros of either sign, subnormal and infinite numbers included."""
  np.testing.assert_array_equal(mask(values, share, 'DF'), by_sorting(values, share))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_of_many_numbers_with_many_ties_as_many_go_as_were_asked_for(dtype):
  values = draw(64, 500).astype(dtype)
  for share in (0.1, 0.5, 0.9):
    keep = np.asarray(mask(values, share, 'DF'))
    np.testing.assert_array_equal(keep, by_sorting(np.asarray(values, np.float32), share))
    assert np.sum(~keep) == np.floor(np.float32(share) * keep.size)


def test_each_layer_and_each_expert_loses_the_same_share():
  values = draw(2, 3, 8, 5) * jnp.array([1., 100., 1e4])[:, None, None]
  keep = np.asarray(mask(values, 0.5, 'EDF'))
  for layer, expert in np.ndindex(2, 3):
    np.testing.assert_array_equal(keep[layer, expert], by_sorting(np.asarray(values[layer, expert]), 0.5))


@pytest.mark.parametrize('axes, inputs, shape', LETTERS)
@pytest.mark.parametrize('n, m', [(2, 4), (1, 4), (1, 2), (3, 4)])
def test_of_every_few_inputs_the_largest_stay(axes, inputs, shape, n, m):
  weight = Dense(draw(2, *shape), axes, inputs)
  layout, keep = Layout.of(weight), masks.pattern_mask(weight, Pattern(n, m))
  size_OI, keep_OI = (np.asarray(layout.matrix(x)).reshape(-1, m) for x in (jnp.abs(weight.materialize()), keep))
  assert np.all(keep_OI.sum(-1) == n)
  assert np.all(np.where(keep_OI, size_OI, np.inf).min(-1) >= np.where(keep_OI, -np.inf, size_OI).max(-1))
  assert Pattern(n, m).held_by(Masked(weight, keep, Pattern(n, m)))


def test_equal_magnitudes_keep_the_first_n_and_no_more():
  keep = masks.pattern_mask(Dense(jnp.ones((8, 3)), 'DF', 'D'), Pattern(2, 4))
  np.testing.assert_array_equal(keep, np.broadcast_to((np.arange(8) % 4 < 2)[:, None], (8, 3)))


def test_a_pattern_that_does_not_divide_the_inputs_is_refused():
  with pytest.raises(IncompatibleError, match='2:4: 4 does not divide 6 inputs'):
    masks.pattern_mask(Dense(draw(6, 4), 'DF', 'D'), Pattern(2, 4))


# ------------------------------------------------------------------ at once

@pytest.mark.parametrize('axes, inputs, shape', LETTERS)
def test_a_mask_that_a_weight_has_stays_in_force(axes, inputs, shape):
  dense = Dense(draw(*shape), axes, inputs)
  once = masks.masked_once(dense, 0.25, None)
  twice = masks.masked_once(once, 0.5, None)
  both = masks.masked_once(twice, None, NofM(n=2, m=4))
  for before, after in ((once, twice), (twice, both)):
    assert all(one.held_by(after) for one in before.invariants())
  assert both.pattern == Pattern(2, 4) and both.pattern.held_by(both)
  assert masks.masked_once(both, 0.6, None).pattern == Pattern(2, 4)
  lowered = low_precision(dense, dict(forward='int8', dgrad=None, wgrad=None))
  assert masks.masked_once(lowered, 0.5, None).product == 'float', 'how gradients were computed is over'


def test_rotated_inputs_are_refused():
  with pytest.raises(IncompatibleError, match='has rotated inputs: prune before rotating'):
    masks.masked_once(Rotated(Dense(draw(8, 4), 'FD', 'F'), 8), 0.5, None)


# ------------------------------------------------------------------ while training

WRAPPED = {
  'float': lambda dense: dense, 'masked before': lambda dense: masks.masked_once(dense, 0.25, None),
  'QAT': lambda dense: FakeQuantized(dense, Rounding(Int(bits=4))),
  'QAT of what was masked': lambda dense: FakeQuantized(masks.masked_once(dense, 0.25, None), Rounding(Int(bits=4))),
  'low precision': lambda dense: low_precision(dense, dict(forward='int8', dgrad='int8', wgrad='int8'), jax.random.key(0)),
}


@pytest.mark.parametrize('kind', WRAPPED)
def test_a_parameter_plus_its_update_is_exactly_zero_where_the_mask_is(kind):
  """After every step, whatever wraps the array; and the masks that training leaves are those."""
  before = {'w': WRAPPED[kind](Dense(draw(8, 6), 'DF', 'D')), 'other': Dense(draw(8, 6, seed=1), 'DF', 'D')}
  prune = Prune(sparsity=0.5, start=0, end=2, every=1, where='^w$')
  made = prune(Learner(before, None, optax.adam(0.1)), jax.random.key(0))
  graph, params, rest = nnx.split(made.model, nnx.Param, ...)
  state = made.optimizer.init(params)
  for i in range(4):
    grads = jax.tree.map(lambda p, i=i: draw(*p.shape, seed=i + 5), params)
    updates, state = made.optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  left = masks.masked(nnx.merge(graph, params, rest), state)
  zeros = np.mean(np.asarray(left['w'].materialize()) == 0)
  assert zeros == 0.5 if 'QAT' not in kind else zeros >= 0.5
  assert not left['w'].pruned and np.all(left['other'].materialize() != 0)
  masks_left = [one for one in left['w'].invariants() if one.kind == 'zeros']
  assert len(masks_left) == 1 and float(jnp.mean(masks_left[0].keep)) == 0.5
  for one in before['w'].invariants():
    if one.kind == 'zeros': assert one.held_by(left['w']), 'an earlier mask holds'


def test_two_techniques_of_one_training_prune_different_arrays():
  model = {'a': masks.tagged(Dense(draw(4, 4), 'DF', 'D'), 0), 'b': Dense(draw(4, 4), 'DF', 'D')}
  assert masks.next_number({'b': model['b']}) == 0 and masks.next_number(model) == 1
  with pytest.raises(IncompatibleError, match='is pruned by another technique'): masks.tagged(model['a'], 1)


def test_a_format_without_a_zero_is_refused():
  with pytest.raises(IncompatibleError, match=r'mid-rise int2 .* has no zero, and what is pruned cannot stay zero'):
    masks.tagged(FakeQuantized(Dense(draw(4, 4), 'DF', 'D'), Rounding(MidRise())), 0)


def test_a_model_of_which_nothing_is_pruned_is_left_itself():
  model = {'a': Dense(draw(4, 4), 'DF', 'D')}
  assert masks.masked(model, optax.EmptyState()) is model
