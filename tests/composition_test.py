"""Every ordered pair of techniques composes: it learns, and what each of the two promises holds afterwards."""
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm import learner, optim, train
from efficient_lm.formats import Int
from efficient_lm.low_precision import LowPrecision
from efficient_lm.models import spec
from efficient_lm.models.moe import MoE
from efficient_lm.models.routing import SoftmaxTopK
from efficient_lm.quantized import FakeQuantized
from efficient_lm.rules import Rule
from efficient_lm.techniques.distill import Distill
from efficient_lm.techniques.low_precision import LowPrecisionTraining
from efficient_lm.techniques.prune import Prune
from efficient_lm.techniques.quant_aware import QuantAware
from efficient_lm.techniques.upcycle import Upcycle
from efficient_lm.tree import select
from efficient_lm.weights import Dense, Weight

V, D, B, T = 12, 8, 2, 8
REACHED = r'(query|key|value|output|gate|up|down)(/inner)?$'   # the weight, or what another technique wraps in it
PRUNED = r'(query|up)$'   # not all of them: sorts are slow to compile


@pytest.fixture(scope='module', autouse=True)
def _quick_compilation():
  """Compiling is nearly all that these tests spend their time on; what they state holds of any program."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@functools.cache
def model(seed=0):
  """One layer whose numbers are drawn by numpy, so that nothing is zero to begin with."""
  attention = spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=4)
  stack = spec.Stack(num_layers=1, attention=attention, mlp=spec.SwiGLU(hidden=8))
  rng = np.random.default_rng(seed)
  abstract = jax.eval_shape(lambda: spec.Transformer(vocab_size=V, dim=D, stacks=(stack,)).build(rngs=nnx.Rngs(0)))
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype), abstract)


class Teacher:
  """Another model of the same shape."""

  def load(self): return model(7)


TECHNIQUES = {'quant': QuantAware(rules=(Rule(weights=Int(bits=4), activations=Int()),)),
              'distill': Distill(teacher=Teacher()),
              'prune': Prune(sparsity=0.5, start=0, end=2, every=2, where=PRUNED), 'upcycle': Upcycle(num_experts=2),
              'lowprec': LowPrecisionTraining()}
ORDERS = [*itertools.permutations(TECHNIQUES, 2), tuple(TECHNIQUES), tuple(reversed(TECHNIQUES))]


def batch():
  tokens = np.random.default_rng(0).integers(0, V, (B, T + 1)).astype(np.int32)
  ones = np.ones((B, T), np.int32)
  return {'inputs_BT': tokens[:, :-1], 'targets_BT': tokens[:, 1:], 'weights_BT': ones.astype(np.float32),
          'bytes_BT': ones, 'segments_BT': ones, 'positions_BT': np.tile(np.arange(T, dtype=np.int32), (B, 1))}


def learner_of(techniques):
  schedule = optim.WarmupStableDecay(peak=1e-3, warmup=0, decay=0)
  return learner.assemble(model(), optim.AdamW(schedule=schedule).build(100), techniques, jax.random.key(1))


def after_steps(techniques, count=2):
  """The state after some steps and the metrics of each."""
  made = learner_of(techniques)
  state, step, rows = learner.initial_state(made), train.compiled_step(made), []
  for _ in range(count):
    state, metrics = step(state, made.loss, batch())
    rows.append(train.scalars(metrics))
  return state, rows


@functools.cache
def plain():
  return after_steps((), 4)


def assert_quantized(model):
  assert len(dict(select(model, FakeQuantized, REACHED))) == 7
  assert not dict(select(model, FakeQuantized, '(embed|own_head|router)$'))


def assert_lowered(model, steps):
  """Seven weights in low precision, each of which was multiplied in each step."""
  found = dict(select(model, LowPrecision, REACHED))
  assert len(found) == 7
  for path, weight in found.items(): np.testing.assert_array_equal(weight.clock.get_value(), steps, err_msg=path)


def assert_pruned(model):
  """Half of each matrix, of each expert too, is exactly zero, and nothing else is."""
  for path, weight in select(model, Weight):
    array = np.asarray(next(select(weight, Dense))[1].materialize())
    zeros = np.mean(array == 0, (-2, -1)) if 'mlp' in path else np.mean(array == 0)
    expected = 0.5 if re.search(PRUNED, path) else 0
    np.testing.assert_array_equal(zeros, expected, err_msg=path)


@pytest.mark.parametrize('names', ORDERS, ids='-'.join)
def test_techniques_compose_in_every_order(names):
  state, rows = after_steps([TECHNIQUES[name] for name in names])
  assert all(np.isfinite(row['loss']) and row['skipped'] == 0 for row in rows)
  assert rows[1]['cross_entropy'] != rows[0]['cross_entropy'], 'it moves'
  assert ('teacher_kl' in rows[0]) == ('distill' in names)
  assert bool(dict(select(state.model, MoE))) == ('upcycle' in names)
  if 'quant' in names: assert_quantized(state.model)
  else: assert not dict(select(state.model, FakeQuantized))
  if 'prune' in names: assert_pruned(state.model)
  # Fake quantization around it multiplies in its place.
  if 'lowprec' in names: assert_lowered(state.model, 2)


@pytest.mark.parametrize('names', ORDERS, ids='-'.join)
def test_what_composes_is_known_by_its_shapes_alone(names):
  """A plan or a restored checkpoint asks for them, without drawing a number or stepping."""
  techniques = [TECHNIQUES[name] for name in names]
  made = learner_of(techniques)
  state = jax.eval_shape(lambda: learner.initial_state(made))
  after, metrics = jax.eval_shape(functools.partial(train.train_step, optimizer=made.optimizer), state, made.loss, batch())
  assert jax.tree.structure(after) == jax.tree.structure(state)
  shapes = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
  assert shapes(after) == shapes(state) and metrics['loss'].shape == ()

  def rebuilt():
    bare = learner.Learner(model(), None, None)
    for technique in techniques:
      if technique.touches == 'model': bare = technique(bare, jax.random.key(0))
    return bare.model
  only_model = jax.eval_shape(rebuilt)
  assert jax.tree.structure(only_model) == jax.tree.structure(made.model) and shapes(only_model) == shapes(made.model)


@pytest.mark.parametrize('neutral', [
  QuantAware(rules=(Rule(),)), Prune(sparsity=0.0, start=0, end=1), Distill(teacher=Teacher(), weight=0.0),
  Upcycle(num_experts=1, router=SoftmaxTopK(top_k=1)), LowPrecisionTraining(forward=None, dgrad=None, wgrad=None),
], ids=lambda technique: type(technique).__name__)
def test_a_neutral_setting_changes_nothing_bit_for_bit(neutral):
  state, rows = after_steps([neutral], 4)
  assert rows == plain()[1]
  assert jax.tree.structure(state) == jax.tree.structure(plain()[0])
  for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(plain()[0]), strict=True):
    np.testing.assert_array_equal(got, wanted)


def test_each_technique_is_reported_in_the_order_of_the_list():
  for names in ORDERS[-2:]:
    notes = learner_of([TECHNIQUES[name] for name in names]).notes
    assert [note.split()[0].rstrip(':').lower() for note in notes] == [
      {'quant': 'quantaware', 'lowprec': 'lowprecisiontraining'}.get(name, name) for name in names]
