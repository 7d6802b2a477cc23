"""Pruned weights are exactly zero, as many as the schedule says in each matrix, and stay it."""
import functools
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.compression.masks import magnitude_mask
from efficient_lm.compression.rules import Rule
from efficient_lm.compression.sparse_updates import PruneState
from efficient_lm.config import experiment as experiments
from efficient_lm.errors import ConfigError
from efficient_lm.formats import Int
from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.runs import invariants
from efficient_lm.techniques.moe.upcycle import Upcycle
from efficient_lm.techniques.pruning.prune import Prune
from efficient_lm.techniques.pruning.prune_once import PruneOnce
from efficient_lm.techniques.quantization.ptq import Quantize
from efficient_lm.training import trainer
from efficient_lm.training.learner import Learner, assemble, finished, initial_state
from efficient_lm.training.optimizers import AdamW, WarmupStableDecay
from efficient_lm.training.train import Train, Training
from efficient_lm.tree import path_name, select, size
from efficient_lm.weights.masked import Masked
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


@pytest.mark.thinned
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


# ------------------------------------------------------------------ what is promised, however long and wherever

def trained(techniques, steps):
  """What a training of so many steps leaves."""
  optimizer = AdamW(schedule=WarmupStableDecay(peak=1e-2, warmup=0, decay=0)).build(steps)
  learner = assemble(model(), optimizer, techniques, jax.random.key(0), steps)
  state, step = initial_state(learner), trainer.compiled_step(learner)
  for i in range(steps): state, _ = step(state, learner.loss, batch_of(i % 3))
  return finished(state.model, state.opt_state, techniques), learner.notes


@pytest.mark.thinned
@pytest.mark.parametrize('steps', [1, 4, 30])
def test_by_the_end_of_any_training_all_that_was_promised_is_zero(steps):
  pruned, notes = trained((Prune(sparsity=0.5, where=PRUNE.where),), steps)
  assert notes[0].startswith('Prune (50%)')
  found = dict(select(pruned, Masked))
  assert {path for path, _ in select(model(), Weight, PRUNE.where)} == set(found)
  for path, weight in found.items(): assert np.mean(np.asarray(weight.materialize()) == 0) == 0.5, path


@pytest.mark.parametrize('technique, steps, field', [
  (Prune(sparsity=0.5, end=400), 150, 'end'), (Prune(sparsity=0.5, start=0, end=11), 10, 'end'),
  (Prune(sparsity=0.5, start=500), 10, 'start'), (Prune(sparsity=0.5, start=10), 10, 'start'),
  (Prune(sparsity=0.5), 0, 'start'), (Prune(sparsity=0.5, end=1), 100, 'start'),
  (Prune(sparsity=0.5), 1, None), (Prune(sparsity=0.5, end=10), 10, None), (Prune(sparsity=0.0, start=5, end=9), 1, None)],
  ids=repr)
def test_a_training_that_is_too_short_is_refused_before_it_begins(technique, steps, field):
  training = Training(steps=steps, batch_size=8, sequence_length=8)
  assert [name for name, _, _ in technique.check_training(training)] == ([field] if field else [])
  assert [name for name, _, _ in Train(training=training, techniques=(technique,)).check()] == (
    [f'techniques[0].{field}'] if field else [])


@pytest.mark.parametrize('words, refused', [
  (['--config.train.steps=150'], None), (['--config.train.steps=30', '--config.techniques[0].end=20'], None),
  (['--config.train.steps=30', '--config.techniques[0].end=31'], r'techniques\[0\]\.end = 31: must be at most the 30 steps'),
  (['--config.techniques[0].start=500'], r'config\.techniques\[0\]\.start = 500: must be before'),
])
def test_overrides_are_checked_against_each_other(words, refused):
  file = str(pathlib.Path(__file__).parents[3] / 'configs' / 'pruned.py')
  if refused:
    with pytest.raises(ConfigError, match=refused): experiments.load(file, words)
    return
  experiment, _ = experiments.load(file, words)
  start, end = experiment.techniques[0].bounds(experiment.train.steps)
  assert 0 <= start < end <= experiment.train.steps


@functools.cache
def dense():
  """As `model`, without experts."""
  attention = spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=4)
  stack = spec.Stack(num_layers=LAYERS, attention=attention, mlp=spec.SwiGLU(hidden=8))
  abstract = jax.eval_shape(lambda: spec.Transformer(vocab_size=V, dim=D, stacks=(stack,)).build(rngs=nnx.Rngs(0)))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), abstract)


@pytest.mark.parametrize('where', [r'mlp/(gate|up|down)$', r'attention$|/up$', r'blocks/mlp/\w+$', r'/query$', 'stacks/'])
@pytest.mark.parametrize('kind, upcycle', [('dense', None), ('mixture', None), ('dense', 'after'), ('dense', 'before')])
def test_note_and_masks_name_the_same_weights(where, kind, upcycle):
  """By full paths, also where the layer is made a mixture afterwards: each copy has the mask of what it is a copy of."""
  start = model() if kind == 'mixture' else dense()
  prune, copies = Prune(sparsity=0.5, where=where), Upcycle(num_experts=2)
  techniques = {None: (prune,), 'after': (prune, copies), 'before': (copies, prune)}[upcycle]
  before = Upcycle(num_experts=2)(Learner(start, None, None), jax.random.key(0)).model if upcycle == 'before' else start
  named = {path: weight.shape for path, weight in select(before, Weight, where)}
  made_of = lambda: assemble(start, AdamW().build(10), techniques, jax.random.key(0), 10)
  if not named:   # a mixture has no mlp/gate: its experts do
    with pytest.raises(ConfigError, match='no Weight on a path that matches'): made_of()
    return
  made = made_of()
  note = next(note for note in made.notes if note.startswith('Prune'))
  share = sum(map(math.prod, named.values())) / size(before)
  assert f'reaches {share:.1%} of parameters' in note
  assert not set(note.partition('left as they are: ')[2].split(', ')) & set(named)
  expected = named
  if upcycle == 'after': expected = {path.replace('blocks/mlp/', 'blocks/mlp/experts/') for path in named}
  after = jax.eval_shape(lambda: finished(made.model, made.optimizer.init(nnx.state(made.model, nnx.Param)), techniques))
  assert {path for path, _ in select(after, Masked)} == set(expected)


def test_a_stored_model_and_a_second_pruning_of_the_same_weights_are_refused():
  stored, _ = Quantize(rules=(Rule(where='query$', weights=Int()),))(model(), types.SimpleNamespace(mesh=None))
  with pytest.raises(ConfigError, match='attention/query is stored as int8 per channel: training cannot change it'):
    assemble(stored, AdamW().build(10), (PRUNE,), jax.random.key(0), 10)
  with pytest.raises(ConfigError, match='is pruned by another technique of the same training'): learner_of(PRUNE, PRUNE)


def test_copies_of_pruned_weights_promise_their_zeros():
  """An upcycling that follows in a stage of its own: the run knows where the zeros are to be found."""
  pruned, _ = PruneOnce(sparsity=0.5)(dense(), None)
  stage = Train(training=Training(steps=1, batch_size=8, sequence_length=8), techniques=(Upcycle(num_experts=2),))
  mixture = Upcycle(num_experts=2)(Learner(pruned, None, None), jax.random.key(0)).model
  assert invariants.check(invariants.read(pruned), mixture, stage) == []
  followed = stage.follow(invariants.read(pruned))
  assert 'stacks/0/blocks/mlp/experts/up' in followed and 'stacks/0/blocks/mlp/up' not in followed
  experts_LEDF = np.asarray(dict(select(mixture, Weight))['stacks/0/blocks/mlp/experts/up'].materialize())
  assert np.all(np.mean(experts_LEDF == 0, (-2, -1)) == 0.5)
