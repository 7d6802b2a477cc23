"""Pruned weights are exactly zero, as many as the schedule says in each matrix, and stay it."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.compression.masks import PruneState, magnitude_mask
from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.techniques.pruning.prune import Prune
from efficient_lm.training import trainer
from efficient_lm.training.learner import assemble, initial_state
from efficient_lm.training.optimizers import AdamW, WarmupStableDecay
from efficient_lm.tree import path_name, select
from efficient_lm.weights.weight import Weight

V, D, B, T, E, LAYERS = 16, 8, 4, 6, 3, 2
PRUNE = Prune(sparsity=0.6, start=1, end=7, every=2, where=r'stacks/.*/(query|gate|down)$')   # each sort costs compiling


@functools.cache
def model():
  """A mixture whose numbers are drawn by numpy, so that nothing is zero to begin with."""
  mlp = spec.MoE(num_experts=E, hidden=8, router=routing.SoftmaxTopK(top_k=2))
  stack = spec.Stack(num_layers=LAYERS, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=4), mlp=mlp)
  rng = np.random.default_rng(0)
  abstract = jax.eval_shape(lambda: spec.Transformer(vocab_size=V, dim=D, stacks=(stack,)).build(rngs=nnx.Rngs(0)))
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype), abstract)


def batch_of(seed=0):
  tokens = np.random.default_rng(seed).integers(0, V, (B, T + 1)).astype(np.int32)
  ones = np.ones((B, T), np.int32)
  return {'inputs_BT': tokens[:, :-1], 'targets_BT': tokens[:, 1:], 'weights_BT': ones.astype(np.float32),
          'bytes_BT': ones, 'segments_BT': ones, 'positions_BT': np.tile(np.arange(T, dtype=np.int32), (B, 1))}


def learner_of(*techniques):
  optimizer = AdamW(schedule=WarmupStableDecay(peak=1e-2, warmup=0, decay=0)).build(1000)
  return assemble(model(), optimizer, techniques, jax.random.key(0))


@functools.cache
def compiled():
  learner = learner_of(PRUNE)
  return learner, trainer.compiled_step(learner)


@functools.cache
def history():
  """The state on the host after each of twelve steps, from step 0."""
  learner, step = compiled()
  state = initial_state(learner)
  states = [jax.device_get(state)]
  for i in range(12):
    state, _ = step(state, learner.loss, batch_of(i % 3))
    states.append(jax.device_get(state))
  return states


def matrices(state):
  """(path, matrix) for each layer's and expert's matrix of the weights that Prune reaches."""
  for path, weight in select(state.model, Weight, PRUNE.where):
    dims = len(weight.axes.replace('E', ''))
    array = np.asarray(weight.materialize())
    for matrix in array.reshape(-1, *array.shape[array.ndim - dims:]): yield path, matrix


def share_at(step):
  """The schedule, written out: of step 0 and of every redrawing since."""
  drawn = max([0] + [s for s in (3, 5, 7) if s <= step])
  t = min(max((drawn - 1) / 6, 0), 1)
  return 0.6 * (1 - (1 - t) ** 3)


@pytest.mark.parametrize('step', range(13))
def test_each_matrix_of_each_layer_and_expert_has_the_scheduled_share_of_exact_zeros(step):
  found = list(matrices(history()[step]))
  assert len(found) == LAYERS * (1 + 2 * E)
  for path, matrix in found:
    assert np.sum(matrix == 0) == np.floor(np.float32(share_at(step)) * matrix.size), path


def test_the_last_share_is_the_sparsity_even_when_the_end_is_between_two_redrawings():
  technique = Prune(sparsity=0.5, start=0, end=5, every=3)
  redrawn = [step for step in range(12) if bool(technique.redraws(step, 0, 5))]
  assert redrawn == [3, 5] and float(technique.share(5, 0, 5)) == 0.5


def test_from_the_end_on_the_mask_holds():
  zeros = [{(path, i): matrix == 0 for i, (path, matrix) in enumerate(matrices(state))} for state in history()]
  for later in zeros[8:]:
    for key in later: np.testing.assert_array_equal(later[key], zeros[7][key])
  moved = [np.any(a != b) for (_, a), (_, b) in zip(matrices(history()[7]), matrices(history()[12]), strict=True)]
  assert all(moved), 'what lives is still trained'


def test_it_is_the_smallest_that_go():
  """At the first redrawing, of what the step would have made of them."""
  for (path, before), (_, after) in zip(matrices(history()[2]), matrices(history()[3]), strict=True):
    gone, stays = np.abs(before[after == 0]), np.abs(before[after != 0])
    # A step of Adam moves each by 0.02 at most, so magnitudes change places only within twice that.
    assert gone.max() <= stays.min() + 0.04, path


def test_what_is_not_selected_is_left_alone():
  pruned_paths = {path for path, _ in select(model(), Weight, PRUNE.where)}
  leaves = jax.tree_util.tree_leaves_with_path(history()[-1].model)
  others = [leaf for path, leaf in leaves if not path_name(path).startswith(tuple(pruned_paths))]
  assert len(others) == 10   # embedding, head, router, three norms, key, value, output, up
  assert all(np.all(leaf != 0) for leaf in others)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 40), st.integers(1, 40), st.floats(0.1, 0.99))
def test_the_schedule_is_cubic_from_start_to_end(start, length, sparsity):
  steps = np.arange(85)
  found = Prune(sparsity=sparsity).share(steps, start, start + length)
  expected = sparsity * (1 - (1 - np.clip((steps - start) / length, 0, 1)) ** 3)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)   # float32 powers


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2 ** 16), st.sampled_from([0.0, 0.1, 0.5, 0.75, 0.99]), st.booleans())
def test_a_mask_takes_the_share_it_is_asked_for_even_among_equals(seed, share, equal):
  values = np.random.default_rng(seed).normal(size=(2, 3, 4, 5)).astype(np.float32)
  if equal: values = np.sign(values)
  keep = np.asarray(mask_of(values, share))
  np.testing.assert_array_equal((~keep).sum((-2, -1)), np.floor(np.float32(share) * 20))
  for value, mask in zip(np.abs(values).reshape(6, 20), keep.reshape(6, 20), strict=True):
    assert mask.all() or value[~mask].max() <= value[mask].min()


mask_of = jax.jit(lambda values, share: magnitude_mask(values, share, 'EDF'))


def test_a_state_that_was_taken_apart_and_put_together_goes_on_alike():
  learner, step = compiled()
  leaves, structure = jax.tree.flatten(history()[4])
  copied = jax.tree.unflatten(structure, [jnp.array(leaf) for leaf in leaves])
  state, _ = step(copied, learner.loss, batch_of(4 % 3))
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(history()[5]), strict=True): np.testing.assert_array_equal(a, b)


def test_the_mask_is_in_the_state_and_counts_accepted_steps():
  prune_state = history()[-1].opt_state.inner
  assert isinstance(prune_state, PruneState) and int(prune_state.step) == 12
  masks = jax.tree.leaves(prune_state.keep)
  assert len(masks) == 3 and all(mask.dtype == bool for mask in masks)


def test_a_refused_step_counts_for_nothing():
  learner, step = compiled()
  state = jax.tree.map(jnp.array, history()[2])   # the next accepted step redraws the masks
  bad = batch_of() | {'weights_BT': np.full((B, T), np.nan, np.float32)}
  state, _ = step(state, learner.loss, bad)
  assert int(state.opt_state.inner.step) == 2
  state, _ = step(state, learner.loss, batch_of(2))
  for a, b in zip(jax.tree.leaves(state.model), jax.tree.leaves(history()[3].model), strict=True):
    np.testing.assert_array_equal(a, b)


def test_sparsity_0_trains_as_if_it_were_not_there():
  plain = learner_of()
  neutral = Prune(sparsity=0.0, start=0, end=1)(plain, jax.random.key(0))
  assert neutral is plain


def test_the_note_tells_the_reach():
  note, = learner_of(Prune(sparsity=0.6, start=0, end=1)).notes
  assert note.startswith('Prune (60%) reaches ') and 'left as they are: embed, own_head, stacks/0/blocks/mlp/router' in note


@pytest.mark.parametrize('sparsity', [0.0, 0.5])
def test_a_selector_that_matches_nothing_is_an_error_that_names_what_there_is(sparsity):
  with pytest.raises(ValueError, match=r"matches 'blcoks'; the paths are embed, .*stacks/0/blocks/attention/key"):
    learner_of(Prune(sparsity=sparsity, start=0, end=1, where='blcoks'))


@pytest.mark.parametrize('field, value', [('sparsity', 1.0), ('sparsity', -0.1), ('start', -1), ('every', 0), ('end', 1)])
def test_a_wrong_field_is_named(field, value):
  settings_of = dict(sparsity=0.5, start=1, end=5) | {field: value}
  assert [name for name, _, _ in Prune(**settings_of).check()] == [field]
