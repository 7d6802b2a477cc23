"""Every ordered pair of techniques composes: the loss falls, and what each of the two promises holds afterwards."""
import functools
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.compression.method import RoundToNearest
from efficient_lm.compression.rewriting import without_low_precision
from efficient_lm.compression.rules import Rule
from efficient_lm.errors import ConfigError, IncompatibleError
from efficient_lm.formats import Group, Int, MeanSquaredError, MidRise, Percentile, Ternary
from efficient_lm.models import spec
from efficient_lm.models.moe.layer import MoE
from efficient_lm.models.moe.routing import SoftmaxTopK
from efficient_lm.runs import invariants
from efficient_lm.techniques.distillation.distill import Distill
from efficient_lm.techniques.moe.upcycle import Upcycle
from efficient_lm.techniques.pruning.prune import Prune
from efficient_lm.techniques.pruning.prune_once import PruneOnce
from efficient_lm.techniques.quantization.awq import Awq
from efficient_lm.techniques.quantization.bitnet import BitNet
from efficient_lm.techniques.quantization.convert import Convert
from efficient_lm.techniques.quantization.gptq import Gptq
from efficient_lm.techniques.quantization.low_precision_training import LowPrecisionTraining
from efficient_lm.techniques.quantization.ptq import Quantize
from efficient_lm.techniques.quantization.qat import QuantAware
from efficient_lm.techniques.quantization.rotate import Rotate
from efficient_lm.techniques.quantization.smooth_quant import SmoothQuant
from efficient_lm.techniques.skip_spikes import SkipSpikes
from efficient_lm.training import learner, losses
from efficient_lm.training import optimizers as optim
from efficient_lm.training import trainer as train
from efficient_lm.training.train import Training
from efficient_lm.tree import select
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.low_precision import LowPrecision
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.weight import Dense, Weight

V, D, B, T = 12, 8, 2, 8
REACHED = r'(query|key|value|output|gate|up|down)(/inner)*$'   # the weight, or what another technique wraps in it
PRUNED = r'(query|up)$'
OPTIMIZER = optim.AdamW(schedule=optim.WarmupStableDecay(peak=1e-2, warmup=0, decay=0))
STEPS = 12   # enough for the loss of any of them to be below the first, after what pruning and rounding take


@pytest.fixture(scope='module', autouse=True)
def _quick(quick_compilation):
  """Compiling is nearly all that these tests spend their time on; what they state holds of any program."""


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

  def load(self, mesh=None): return model(7)


TECHNIQUES = {'quant': QuantAware(rules=(Rule(weights=Int(bits=4), activations=Int()),)),
              'distill': Distill(teacher=Teacher()),
              'prune': Prune(sparsity=0.5, start=0, end=2, every=2, where=PRUNED), 'upcycle': Upcycle(num_experts=2),
              'lowprec': LowPrecisionTraining(), 'bitnet': BitNet()}
ROUNDING = ('quant', 'bitnet')   # either rounds what a product reads, and one weight is rounded once
ALL = [tuple(name for name in TECHNIQUES if name != other) for other in ROUNDING]
ORDERS = [*(pair for pair in itertools.permutations(TECHNIQUES, 2) if set(pair) != set(ROUNDING)),
          *ALL, *(tuple(reversed(names)) for names in ALL)]


def batch():
  tokens = np.random.default_rng(0).integers(0, V, (B, T + 1)).astype(np.int32)
  ones = np.ones((B, T), np.int32)
  return {'inputs_BT': tokens[:, :-1], 'targets_BT': tokens[:, 1:], 'weights_BT': ones.astype(np.float32),
          'bytes_BT': ones, 'segments_BT': ones, 'positions_BT': np.tile(np.arange(T, dtype=np.int32), (B, 1))}


def learner_of(techniques):
  return learner.assemble(model(), OPTIMIZER.build(100), techniques, jax.random.key(1))


def after_steps(techniques, count=STEPS):
  """The state after some steps on one batch and the metrics of each."""
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


def assert_ternary(model):
  """Seven weights are three levels times a scale, whatever else is done to them."""
  found = [node for _, weight in select(model, Weight) for node in jax.tree.leaves(weight, is_leaf=is_ternary)
           if is_ternary(node)]
  assert len(found) == 7
  for weight in found:
    matrices = np.asarray(weight.materialize()).reshape(-1, *weight.materialize().shape[-len(weight.axes):])
    assert all(len(np.unique(np.abs(matrix))) <= 2 for matrix in (matrices if 'E' not in weight.axes else matrices[0]))


def is_ternary(node):
  return isinstance(node, FakeQuantized) and isinstance(node.weights.format, Ternary)


def assert_lowered(model, steps):
  """Seven weights in low precision, each of which was multiplied in each step."""
  found = dict(select(model, LowPrecision, REACHED))
  assert len(found) == 7
  for path, weight in found.items(): np.testing.assert_array_equal(weight.counter.get_value(), steps, err_msg=path)


def assert_pruned(model):
  """Half of each matrix, of each expert too, is exactly zero, and nothing else is."""
  for path, weight in select(model, Weight):
    array = np.asarray(next(select(weight, Dense))[1].materialize())
    zeros = np.mean(array == 0, (-2, -1)) if 'mlp' in path else np.mean(array == 0)
    expected = 0.5 if re.search(PRUNED, path) else 0
    np.testing.assert_array_equal(zeros, expected, err_msg=path)


@pytest.mark.thinned
@pytest.mark.parametrize('names', ORDERS, ids='-'.join)
def test_techniques_compose_in_every_order(names):
  state, rows = after_steps([TECHNIQUES[name] for name in names])
  assert all(np.isfinite(row['loss']) and row['skipped'] == 0 for row in rows)
  assert rows[-1]['loss'] < rows[0]['loss'], 'it learns'
  assert ('teacher_kl' in rows[0]) == ('distill' in names)
  assert bool(dict(select(state.model, MoE))) == ('upcycle' in names)
  if 'quant' in names: assert_quantized(state.model)
  elif 'bitnet' not in names: assert not dict(select(state.model, FakeQuantized))
  if 'bitnet' in names: assert_ternary(state.model)
  if 'prune' in names: assert_pruned(state.model)
  # Fake quantization around it multiplies in its place.
  if 'lowprec' in names: assert_lowered(state.model, STEPS)


@pytest.mark.parametrize('names', list(itertools.product(TECHNIQUES, repeat=2)), ids='-'.join)
def test_what_does_not_compose_is_refused_in_one_line_whatever_stands_between(names):
  """Two nested roundings of one weight, the same technique twice included; others may be used twice."""
  refused = {('quant', 'quant'), ('quant', 'bitnet'), ('bitnet', 'quant'), ('bitnet', 'bitnet')}
  if names in refused:
    for between in ((), ('lowprec',), ('prune',)):
      listed = [names[0], *between, names[1]]
      with pytest.raises(ConfigError, match=rf'techniques\[{len(listed) - 1}\] = .* is trained as float32, fake-quantized'):
        learner_of([TECHNIQUES[name] for name in listed])
  elif names[0] != names[1]: learner_of([TECHNIQUES[name] for name in names])


@pytest.mark.thinned
@pytest.mark.parametrize('names', ORDERS, ids='-'.join)
def test_what_composes_is_known_by_its_shapes_alone(names):
  """A plan or a restored checkpoint asks for them, without drawing a number or stepping."""
  techniques = [TECHNIQUES[name] for name in names]
  made = learner_of(techniques)
  state = jax.eval_shape(lambda: learner.starting_state(made))
  after, metrics = jax.eval_shape(functools.partial(train.train_step, optimizer=made.optimizer), state, made.loss, batch())
  assert jax.tree.structure(after) == jax.tree.structure(state)
  shapes = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
  assert shapes(after) == shapes(state) and metrics['loss'].shape == ()

  training = Training(steps=100, batch_size=B, sequence_length=T, optimizer=OPTIMIZER)
  left = jax.eval_shape(lambda state: learner.finished(state.model, state.opt_state, techniques), after)
  for known, wanted in ((learner.trained_shapes, after.model), (learner.abstract_result, left)):
    found = jax.eval_shape(lambda: known(model(), training, techniques))
    assert jax.tree.structure(found) == jax.tree.structure(wanted) and shapes(found) == shapes(wanted)


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


def test_a_guard_against_spikes_refuses_none_where_there_are_none_and_leaves_zeros_exact_before_and_after_pruning():
  prune, left = TECHNIQUES['prune'], []
  for techniques in ([prune, SkipSpikes()], [SkipSpikes(), prune]):
    state, rows = after_steps(techniques, 3)
    assert [row['spikes'] for row in rows] == [0] * 3
    left.append(jax.tree.leaves(learner.finished(state.model, state.opt_state, techniques)))
  for one, other in zip(*left, strict=True):
    np.testing.assert_array_equal(one == 0, other == 0)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)   # other programs, other orders of sums
  assert any((leaf == 0).mean() >= 0.4 for leaf in left[0])


def test_each_technique_is_reported_in_the_order_of_the_list():
  for names in ORDERS[-4:]:
    notes = learner_of([TECHNIQUES[name] for name in names]).notes
    assert [note.split()[0].rstrip(':').lower() for note in notes] == [
      {'quant': 'quantaware', 'lowprec': 'lowprecisiontraining'}.get(name, name) for name in names]


# ------------------------------------------------------------------ stages, after what techniques have trained

FOUR_BITS = Rule(weights=Int(bits=4, scales=Group(size=4)))
METHODS = {'rtn': RoundToNearest(), 'least squares': RoundToNearest(range=MeanSquaredError()),
           'percentile': RoundToNearest(range=Percentile(percent=99)), 'gptq': Gptq(block=8),
           'gptq in order': Gptq(act_order=False, true_sequential=True), 'awq': Awq(grid=4, clips=3)}
ZERO_OR_NONE = {'int4': Int(bits=4, scales=Group(size=4)), 'ternary': Ternary(), 'mid-rise': MidRise()}


def context():
  return types.SimpleNamespace(key=jax.random.key(2), mesh=None, batches=lambda count: itertools.repeat(batch(), count))


def logits(model):
  return losses.outputs_of(model, batch()).logits_BTV


@functools.cache
def trained(*names):
  """What a training with these techniques leaves."""
  techniques = [TECHNIQUES[name] for name in names]
  state, _ = after_steps(techniques)
  return learner.finished(state.model, state.opt_state, techniques)


SMOOTHED = (SmoothQuant(sequences=2), Rotate())


@pytest.mark.thinned
@pytest.mark.parametrize('before, name', [
  *((SMOOTHED, name) for name in TECHNIQUES if name not in ROUNDING), (SMOOTHED[::-1], 'prune')],
  ids=lambda value: value if isinstance(value, str) else '-'.join(type(stage).__name__ for stage in value))
def test_a_float_model_is_smoothed_and_rotated_in_either_order_and_then_stored_in_four_bits(before, name):
  model = trained(name)
  # Products in 8 bits are for training: what has been trained is a float model.
  wanted = logits(without_low_precision(model))
  for stage in before:
    model, _ = stage(model, context())
    # The same float32 sums in other orders.
    np.testing.assert_allclose(logits(without_low_precision(model)), wanted, atol=1e-4 * np.abs(wanted).max())
  stage = Quantize(rules=(FOUR_BITS,), method=Gptq(block=8), sequences=2, least_tokens=1)
  stored, _ = stage(model, context())
  assert len(dict(select(stored, Quantized, REACHED))) == 7
  assert jax.tree.structure(jax.eval_shape(stage.abstract, model)) == jax.tree.structure(stored)
  assert np.isfinite(logits(stored)).all()


@pytest.mark.parametrize('name', ROUNDING)
def test_what_was_trained_in_few_bits_is_stored_so_and_the_rest_may_follow(name):
  model = trained(name)
  for stage in (Quantize(rules=(FOUR_BITS,)), Rotate()):
    with pytest.raises(IncompatibleError, match=r'is trained as float32, fake-quantized to .*: the stage Convert\(\)'):
      stage(model, context())
  stored, _ = Convert()(model, context())
  np.testing.assert_allclose(logits(stored), logits(model), atol=1e-4 * np.abs(logits(model)).max())
  whole, _ = Quantize(rules=(Rule(where='embed', weights=Int()),))(stored, context())
  assert len(dict(select(whole, Quantized))) == 8
  with pytest.raises(IncompatibleError, match=r'is stored as .* already'): Quantize(rules=(FOUR_BITS,))(whole, context())


@pytest.mark.parametrize('name', ROUNDING)
@pytest.mark.parametrize('stage', [
  Quantize(rules=(FOUR_BITS,)), Quantize(rules=(FOUR_BITS,), method=Gptq()), Rotate(), SmoothQuant(sequences=2),
  PruneOnce(sparsity=0.5)], ids=lambda stage: type(stage).__name__)
def test_what_low_precision_is_wrapped_around_is_found_by_every_stage(name, stage):
  """Quantized in training, then multiplied in low precision: none of them takes it for a float weight."""
  with pytest.raises(IncompatibleError, match='is trained as float32, fake-quantized to'):
    stage(trained(name, 'lowprec'), context())


@pytest.mark.thinned
@pytest.mark.parametrize('method, format', [
  *itertools.product(METHODS, ('mid-rise',)), *itertools.product(('rtn', 'gptq'), ('int4', 'ternary'))])
def test_what_was_pruned_is_zero_whatever_quantizes_it(method, format):
  """In a format that has no zero, too: there the mask goes around. (All pairs: compression/layerwise_test.)"""
  method, format, model = METHODS[method], ZERO_OR_NONE[format], trained('prune')
  promised = invariants.read(model)
  assert sorted(path for path in promised if re.search(PRUNED, path)) == sorted(promised)
  stage = Quantize(rules=(Rule(weights=format),), method=method, sequences=2, least_tokens=1)
  stored, _ = stage(model, context())
  assert invariants.check(promised, stored, stage) == []
  for path, weight in select(stored, Weight, PRUNED):
    np.testing.assert_array_less(0.5 - 1e-6, np.mean(np.asarray(weight.materialize()) == 0), err_msg=path)
