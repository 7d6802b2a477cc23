"""Sparse training of whole models: what was promised of zeros holds through every step, technique, device and resumption."""
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.compression.rules import Rule
from efficient_lm.config import fields
from efficient_lm.errors import ConfigError, IncompatibleError
from efficient_lm.formats import Int
from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.parallel.sharding import shardings
from efficient_lm.runs.checkpoint import Checkpoints
from efficient_lm.techniques import (
  SET,
  AcDc,
  Blocks,
  Distill,
  Erk,
  Movement,
  NofM,
  Prune,
  PruneOnce,
  QuantAware,
  Random,
  RigL,
  Saliency,
  SkipSpikes,
  SparseTraining,
  StaticMask,
  StraightThroughMask,
  Upcycle,
)
from efficient_lm.training import trainer
from efficient_lm.training.learner import assemble, finished, initial_state, starting_state
from efficient_lm.training.optimizers import AdamW, Muon, WarmupStableDecay
from efficient_lm.training.train import Train, Training
from efficient_lm.tree import select
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.weight import Dense, Weight

pytestmark = pytest.mark.usefixtures('quick_compilation')

V, D, B, T, E, LAYERS, STEPS = 16, 8, 4, 6, 3, 2, 8
WHERE = r'stacks/.*/(query|down)$'
METHODS = {'static': StaticMask(), 'rigl': RigL(every=2, end=STEPS), 'set': SET(every=2, end=STEPS),
           'ac/dc': AcDc(start=1, every=2, end=5), 'straight-through': StraightThroughMask(start=0, end=4, every=2)}


@functools.cache
def model(kind='mixture', seed=0):
  """Numbers drawn by numpy, so that nothing is zero to begin with."""
  mlp = spec.SwiGLU(hidden=8)
  if kind == 'mixture': mlp = spec.MoE(num_experts=E, hidden=8, router=routing.SoftmaxTopK(top_k=2))
  stack = spec.Stack(num_layers=LAYERS, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=4), mlp=mlp)
  abstract = jax.eval_shape(lambda: spec.Transformer(vocab_size=V, dim=D, stacks=(stack,)).build(rngs=nnx.Rngs(0)))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype), abstract)


class Teacher:
  """Another model of the same shape."""

  def load(self, mesh=None): return model('dense', 7)


def batch_of(seed=0):
  tokens = np.random.default_rng(seed).integers(0, V, (B, T + 1)).astype(np.int32)
  ones = np.ones((B, T), np.int32)
  return {'inputs_BT': tokens[:, :-1], 'targets_BT': tokens[:, 1:], 'weights_BT': ones.astype(np.float32),
          'bytes_BT': ones, 'segments_BT': ones, 'positions_BT': np.tile(np.arange(T, dtype=np.int32), (B, 1))}


def sparse(method, sparsity=0.5, **more):
  method = METHODS[method] if isinstance(method, str) else method
  return SparseTraining(sparsity=sparsity, method=method, **{'where': WHERE} | more)


def learner_of(*techniques, start=None, optimizer=None):
  optimizer = optimizer or AdamW(schedule=WarmupStableDecay(peak=1e-2, warmup=0, decay=0))
  return assemble(start or model(), optimizer.build(STEPS), techniques, jax.random.key(0), STEPS)


def history(learner, steps=STEPS, accumulate=1):
  """The states on the host, from step 0."""
  state, step = initial_state(learner), trainer.compiled_step(learner, accumulate)
  states = [jax.device_get(state)]
  for i in range(steps):
    state, _ = step(state, learner.loss, batch_of(i % 3))
    states.append(jax.device_get(state))
  return states


@functools.cache
def rigl(): return learner_of(sparse('rigl'))


@functools.cache
def of_rigl(): return history(rigl())


def matrices(model, where=WHERE):
  """(path, matrix) of each layer and expert."""
  for path, weight in select(model, Weight, where):
    dims, array = len(weight.axes.replace('E', '')), np.asarray(next(select(weight, Dense))[1].materialize())
    for matrix in array.reshape(-1, *array.shape[array.ndim - dims:]): yield path, matrix


def masks_of(state):
  """The masks in an optimizer's state, whatever is around them."""
  from efficient_lm.compression.masks import _prune_states
  return [np.asarray(leaf) for one in _prune_states(state.opt_state) for leaf in jax.tree.leaves(one.keep)]


def test_half_of_each_matrix_of_each_layer_and_expert_is_masked_after_every_step_and_the_masks_move():
  states = of_rigl()
  for state in states:
    assert [mask.shape for mask in masks_of(state)] == [(LAYERS, 8, 2, 4), (LAYERS, E, 8, 8)]
    for mask in masks_of(state):
      of_matrix = mask.reshape(-1, 64)
      np.testing.assert_array_equal(of_matrix.sum(-1), 32)
    assert len(list(matrices(state.model))) == LAYERS * (1 + E)
    for path, matrix in matrices(state.model): assert np.sum(matrix == 0) >= 32, path
  differ = lambda one, other: any(np.any(a != b) for a, b in zip(masks_of(one), masks_of(other), strict=True))
  moved = [differ(*pair) for pair in itertools.pairwise(states)]
  assert moved == [False, True, False, True, False, True, False, False], 'every second step before the end'
  left = finished(states[-1].model, states[-1].opt_state, (sparse('rigl'),))
  for _, weight in select(left, Masked): np.testing.assert_array_equal(weight.materialize() != 0, weight.keep.get_value())
  assert len(dict(select(left, Masked))) == 2


MOVEMENT = StraightThroughMask(start=0, end=6, every=2, score=Movement())   # all that a state can carry


@pytest.mark.parametrize('method', ['rigl', MOVEMENT], ids=['rigl', 'movement'])
def test_a_training_that_is_resumed_from_what_was_saved_goes_on_bit_for_bit(method, tmp_path):
  """Through the drawing of a mask, by a learner that was made of shapes."""
  technique = sparse(method)
  states = of_rigl() if method == 'rigl' else history(learner_of(technique), 5)
  resumed = learner_of(technique, start=jax.eval_shape(model))
  checkpoints = Checkpoints(tmp_path / 'checkpoints')
  checkpoints.save(3, jax.tree.map(jnp.array, states[3]), wait=True)
  shapes = jax.eval_shape(lambda model: starting_state(resumed.replace(model=model)), resumed.model)
  state, step = checkpoints.restore(shapes), trainer.compiled_step(resumed)
  checkpoints.close()
  for i in (3, 4): state, _ = step(state, resumed.loss, batch_of(i % 3))
  assert jax.tree.structure(state) == jax.tree.structure(states[5])
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(states[5]), strict=True): np.testing.assert_array_equal(a, b)


def test_a_refused_step_counts_for_nothing():
  learner, states = rigl(), of_rigl()
  step, state = trainer.compiled_step(learner), jax.tree.map(jnp.array, states[1])   # the next accepted one exchanges
  state, _ = step(state, learner.loss, batch_of() | {'weights_BT': np.full((B, T), np.nan, np.float32)})
  state, _ = step(state, learner.loss, batch_of(1))
  for a, b in zip(jax.tree.leaves(state.model), jax.tree.leaves(states[2].model), strict=True):
    np.testing.assert_array_equal(a, b)


def test_gradients_of_microbatches_exchange_as_many():
  for state in history(rigl(), 3, accumulate=2):
    for mask in masks_of(state): np.testing.assert_array_equal(mask.reshape(-1, 64).sum(-1), 32)


@pytest.mark.thinned
@pytest.mark.parametrize('method', ['rigl', 'ac/dc', 'straight-through'])
def test_eight_devices_draw_the_masks_of_one_bit_for_bit(method, mesh):
  """Of the same gradients. (Those of several devices differ in the order of sums.)"""
  learner = learner_of(sparse(method))
  params = nnx.state(learner.model, nnx.Param)
  grads = [jax.tree.map(lambda p, i=i: jnp.asarray(np.random.default_rng(i).normal(size=p.shape), p.dtype), params)
           for i in range(4)]

  def run(place):
    update = jax.jit(functools.partial(learner.optimizer.update, loss=1.0))
    now, state = place(params), jax.jit(learner.optimizer.init)(place(params))
    for gradient in grads:
      updates, state = update(place(gradient), state, now)
      now = jax.tree.map(jnp.add, now, updates)
    return jax.device_get([[leaf for leaf in jax.tree.leaves(state) if leaf.dtype == bool], now])

  alone = run(lambda tree: tree)
  with mesh(1, 2, 1, 4):
    shared = run(lambda tree: jax.device_put(tree, shardings(tree, jax.sharding.get_mesh())))
  assert len(alone[0]) == 2
  for a, b in zip(alone[0], shared[0], strict=True): np.testing.assert_array_equal(a, b)
  for a, b in zip(jax.tree.leaves(alone[1]), jax.tree.leaves(shared[1]), strict=True):
    np.testing.assert_array_equal(a == 0, b == 0)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)   # the gradient norm is a sum over devices


@pytest.mark.parametrize('kind', ['dense', 'mixture'])
def test_n_of_every_m_lie_along_the_contraction_of_every_einsum(kind):
  technique = sparse('straight-through', where=r'stacks/.*/(query|key|value|output|gate|up|down)$', pattern=NofM(n=2, m=4))
  learner = learner_of(technique, start=model(kind), optimizer=Muon())
  state = history(learner, 5)[-1]
  left = dict(select(finished(state.model, state.opt_state, (technique,)), Masked))
  assert len(left) == 7
  inputs = {path.rpartition('/')[2]: (weight.axes, weight.inputs) for path, weight in left.items()}
  assert inputs['query'] == ('DNH', 'D') and inputs['output'] == ('NHD', 'NH')
  assert inputs['down'] == (('FD', 'F') if kind == 'dense' else ('EFD', 'F'))
  for path, weight in left.items():
    assert str(weight.pattern) == '2:4' and all(one.held_by(weight) for one in weight.invariants()), path
    assert float(jnp.mean(weight.materialize() == 0)) == 0.5, path
    by_input = np.moveaxis(np.asarray(weight.materialize()), [weight.axes.index(letter) - len(weight.axes)
                                                              for letter in weight.inputs], range(-len(weight.inputs), 0))
    groups = by_input.reshape(-1, 4)   # the inputs last, however the array lies
    np.testing.assert_array_equal((groups != 0).sum(-1), 2, err_msg=path)


# ------------------------------------------------------------------ with others

OTHERS = {'QAT': QuantAware(rules=(Rule(weights=Int(bits=4), activations=Int()),)), 'teacher': Distill(teacher=Teacher()),
          'upcycling': Upcycle(num_experts=2), 'spikes': SkipSpikes()}
PAIRS = [(method, other, first) for first in (True, False) for method in METHODS for other in OTHERS]


@pytest.mark.thinned
@pytest.mark.parametrize('method, other, first', PAIRS)
def test_each_method_composes_in_both_orders(method, other, first):
  techniques = [sparse(method), OTHERS[other]]
  if not first: techniques.reverse()
  learner = learner_of(*techniques, start=model('dense'))
  states = history(learner, 5)
  for state in states[2:]:
    for path, matrix in matrices(state.model):
      assert np.sum(matrix == 0) >= 32 or method == 'ac/dc', path
  left = finished(states[-1].model, states[-1].opt_state, techniques)
  zeros = [one for _, weight in select(left, Weight) for one in weight.invariants() if one.kind == 'zeros']
  assert len(zeros) == 2 and all(float(jnp.mean(one.keep)) == 0.5 for one in zeros)
  assert not any(weight.pruned for _, weight in select(left, Weight))


def test_two_methods_in_one_training_each_have_their_own_weights():
  first, second = sparse('rigl', where='query$'), sparse('straight-through', where='down$')
  states = history(learner_of(first, second), 4)
  left = finished(states[-1].model, states[-1].opt_state, (first, second))
  assert {path.rpartition('/')[2] for path, _ in select(left, Masked)} == {'query', 'down'}
  with pytest.raises(ConfigError, match='is pruned by another technique of the same training'):
    learner_of(sparse('rigl'), Prune(sparsity=0.5))


def test_budgets_by_erdos_renyi_are_kept_over_all_and_neither_embedding_nor_router_is_in_them():
  technique = SparseTraining(sparsity=0.8, method=StaticMask(), allocation=Erk())
  learner = learner_of(technique)
  found = list(matrices(learner.model, r'stacks/.*/(query|key|value|output|gate|up|down)$'))
  share = sum(np.sum(matrix == 0) for _, matrix in found) / sum(matrix.size for _, matrix in found)
  assert 0.8 - len(found) / sum(matrix.size for _, matrix in found) <= share <= 0.8   # each is rounded down
  shares = {path.rpartition('/')[2]: np.mean(matrix == 0) for path, matrix in found}
  assert shares['key'] < shares['query'] and len(dict(select(learner.model, Weight))) == 7 + 3
  for _, weight in select(learner.model, Weight, 'embed|own_head|router'): assert np.all(weight.materialize() != 0)


# ------------------------------------------------------------------ what changes nothing, and what is refused

@pytest.mark.parametrize('method', METHODS)
def test_sparsity_0_trains_as_if_it_were_not_there(method):
  plain = learner_of()
  assert sparse(method, 0.0)(plain, jax.random.key(0)) is plain
  with pytest.raises(IncompatibleError, match="matches 'blcoks'; the paths are embed"):
    sparse(method, 0.0, where='blcoks')(plain, jax.random.key(0))


def test_the_note_tells_method_pattern_share_and_reach():
  note, = learner_of(sparse('set', pattern=Blocks(outputs=2, inputs=2))).notes
  assert note.startswith('SparseTraining (SET, blocks of 2 x 2, 50%) reaches ')
  note, = learner_of(Prune(sparsity=0.5, where=WHERE, pattern=NofM())).notes
  assert note.startswith('Prune (2:4, 50%) reaches ')


@pytest.mark.parametrize('config, problems', [
  (sparse('rigl', 1.0), ['sparsity']), (sparse('rigl', -.1), ['sparsity']), (sparse('rigl', where='('), ['where']),
  (sparse('rigl', pattern=NofM()), ['pattern']), (sparse('static', pattern=NofM(n=1)), ['sparsity']),
  (sparse('static', pattern=NofM()), []), (Prune(sparsity=0.6, pattern=NofM()), ['sparsity']),
  (StaticMask(first=Saliency()), ['first']), (RigL(share=1.5, every=0, end=0), ['share', 'every', 'end']),
  (SET(first=Movement()), ['first']), (AcDc(start=0, every=0, end=0), ['start', 'every', 'end']),
  (StraightThroughMask(start=-1, every=0), ['start', 'every'])], ids=repr)
def test_a_wrong_field_is_named(config, problems):
  assert [field for field, _, _ in config.check()] == problems


@pytest.mark.parametrize('method, steps, field', [
  (RigL(end=11), 10, 'end'), (RigL(), 20, 'every'), (RigL(every=5), 20, None), (RigL(share=0.), 20, None),
  (AcDc(), 2, 'every'), (AcDc(end=11), 10, 'end'), (AcDc(), 40, None), (StaticMask(), 1, None),
  (StraightThroughMask(end=11), 10, 'end'), (StraightThroughMask(start=7), 10, 'start'), (StraightThroughMask(), 3, None)],
  ids=repr)
def test_a_training_that_is_too_short_is_refused_before_it_begins(method, steps, field):
  training = Training(steps=steps, batch_size=8, sequence_length=8)
  technique = SparseTraining(sparsity=0.5, method=method)
  expected = [f'techniques[0].method.{field}'] if field else []
  assert [name for name, _, _ in Train(training=training, techniques=(technique,)).check()] == expected
  assert not list(SparseTraining(sparsity=0., method=method).check_training(training))


@pytest.mark.parametrize('technique, fix', [
  (sparse('rigl', pattern=Blocks(outputs=3)), 'attention/query: blocks of 3 x 16 do not divide 8 outputs x 8 inputs'),
  (Prune(sparsity=2 / 3, pattern=NofM(n=1, m=3)), '1:3: 3 does not divide 8 inputs')])
def test_a_pattern_that_does_not_fit_is_refused_with_the_weight(technique, fix):
  with pytest.raises(ConfigError, match=fix): learner_of(technique)


@pytest.mark.parametrize('method', ['rigl', 'set', 'ac/dc', 'straight-through'])
def test_zeros_of_an_earlier_stage_would_come_back_so_that_is_refused(method):
  pruned, _ = PruneOnce(sparsity=0.25, where=WHERE)(model(), None)
  with pytest.raises(ConfigError, match=r'attention/query is masked already, and a mask that moves would not keep'):
    learner_of(sparse(method), start=pruned)


def test_what_is_stored_of_prune_is_what_always_was_and_the_rest_where_it_is_asked_for():
  stored = fields.to_json(Prune(sparsity=0.5))
  assert list(stored) == ['class', 'sparsity', 'start', 'end', 'every', 'where']
  for config in (Prune(sparsity=0.5), Prune(sparsity=0.5, score=Random(), pattern=Blocks()), sparse('ac/dc'),
                 sparse('straight-through', allocation=Erk())):
    assert fields.from_json(json.loads(json.dumps(fields.to_json(config)))) == config
