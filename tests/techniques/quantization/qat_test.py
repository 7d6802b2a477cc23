"""Quantization-aware training reaches what it says it does, by whatever method, and leaves floats where it should."""
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.compression.layerwise import stored
from efficient_lm.compression.rules import Rule
from efficient_lm.config import experiment as experiments
from efficient_lm.errors import ConfigError
from efficient_lm.formats import Int, MidRise, Tensor
from efficient_lm.models import spec
from efficient_lm.techniques.moe.upcycle import Upcycle
from efficient_lm.techniques.pruning.prune import Prune
from efficient_lm.techniques.quantization.qat import LearnedClip, LearnedSteps, QuantAware, StraightThrough, StretchedLevels
from efficient_lm.training import learner as learners
from efficient_lm.training import optimizers as optim
from efficient_lm.training import trainer
from efficient_lm.training.learner import Learner
from efficient_lm.training.losses import Distilled, NextToken, outputs_of
from efficient_lm.training.train import Train, Training
from efficient_lm.tree import rewrite, select
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.learned import ClippedActivation, LearnedStep, Stretched
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.quantizers import Delayed, Rounding
from efficient_lm.weights.rotated import Rotated
from efficient_lm.weights.weight import Dense, Weight

V, D = 24, 16
TOKENS = np.random.default_rng(1).integers(0, V, (2, 6)).astype(np.int32)
A8, A8_STATIC = Int(), Int(scales=Tensor())
# Optimising these small programs takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@functools.cache
def learner(mlp='dense', attention='grouped'):
  """A learner without loss or optimizer: all that this technique touches is the model. Numbers drawn by numpy."""
  attentions = {'grouped': spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8),
                'latent': spec.Latent(num_heads=2, query_rank=6, kv_rank=5, nope_dim=4, rope_dim=4, value_dim=4)}
  stack = spec.Stack(num_layers=2, attention=attentions[attention], mlp={
    'dense': spec.SwiGLU(hidden=24), 'experts': spec.MoE(num_experts=4, hidden=8, num_shared=1)}[mlp])
  described = spec.Transformer(vocab_size=V, dim=D, stacks=(stack,))
  rng = np.random.default_rng(0)
  abstract = jax.eval_shape(lambda: described.build(rngs=nnx.Rngs(0)))
  number = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype)
  return Learner(jax.tree.map(number, abstract), None, None)


def aware(weights=None, activations=None, **more):
  return QuantAware(rules=(Rule(weights=weights, activations=activations),), **more)


def quantized(technique, **kinds):
  return technique(learner(**kinds), jax.random.key(0))


def shapes(technique, **kinds):
  plain = learner(**kinds)
  return jax.eval_shape(lambda: technique(plain, jax.random.key(0)).model)


@jit
def logits_of(model):
  return model(TOKENS).logits_BTV


def test_every_fake_quantized_weight_is_within_half_a_step_of_its_own_and_on_its_grid():
  format = Int(bits=4)
  found = dict(select(quantized(aware(format)).model, FakeQuantized))
  assert len(found) == 7
  for path, weight in found.items():
    layout = Layout.of(weight)
    inner, rounded = (np.asarray(layout.matrix(array)) for array in (weight.inner.materialize(), jit(weight.materialize)()))
    step = np.abs(inner).max(-1, keepdims=True) / 7
    assert np.all(np.abs(rounded - inner) <= step * 0.5001), path
    assert np.abs(rounded - inner).max() > step.min() * 0.25, f'{path} is rounded at all'
    np.testing.assert_allclose(rounded / step, np.round(rounded / step), atol=1e-4, err_msg=path)


@pytest.mark.parametrize('kinds, names', [
  ({}, {'query', 'key', 'value', 'output', 'gate', 'up', 'down'}),
  ({'mlp': 'experts'}, {'query', 'key', 'value', 'output', 'gate', 'up', 'down'}),
  ({'attention': 'latent'}, {'query_down', 'query_nope', 'query_rope', 'latent_down', 'key_rope', 'key_up', 'value_up',
                             'output', 'gate', 'up', 'down'}),
], ids=['dense', 'experts', 'latent'])
def test_every_matrix_of_the_layers_but_routers_is_fake_quantized(kinds, names):
  model = shapes(aware(Int(bits=4)), **kinds)
  assert {path.split('/')[-1] for path, _ in select(model, FakeQuantized)} == names
  plain = {path for path, weight in select(model, Weight) if not isinstance(weight, FakeQuantized)}
  routers = {'stacks/0/blocks/mlp/router'} if 'mlp' in kinds else set()
  assert plain == {'embed', 'own_head'} | routers


@pytest.mark.parametrize('method, activation_method, kinds', [
  (StraightThrough(), StraightThrough(), (Rounding, Rounding)), (LearnedSteps(), LearnedSteps(), (LearnedStep, LearnedStep)),
  (StretchedLevels(), LearnedClip(), (Stretched, ClippedActivation)),
  (StraightThrough(), LearnedSteps(), (Rounding, LearnedStep)),
], ids=lambda method: getattr(type(method), '__name__', '') if not isinstance(method, tuple) else '')
def test_a_method_decides_what_quantizes(method, activation_method, kinds):
  technique = aware(Int(bits=4), A8_STATIC, method=method, activation_method=activation_method)
  model = shapes(technique, mlp='experts')
  for path, weight in select(model, FakeQuantized):
    assert (type(weight.weights), type(weight.activations)) == kinds
    experts = (4,) if 'experts' in path else ()
    if isinstance(weight.weights, LearnedStep): assert weight.weights.exponent.get_value().shape[:-1] == (2, *experts, 1)
    if isinstance(weight.activations, LearnedStep): assert weight.activations.exponent.get_value().shape == (2, 1, 1)


@jit
def slopes(model):
  return jax.grad(lambda model: jnp.mean(model(TOKENS).logits_BTV ** 2))(model)


def test_the_gradient_is_that_of_the_rounded_numbers_passed_straight_through():
  """As if the model simply held the rounded numbers."""
  model = quantized(aware(Int(bits=4))).model
  hold = lambda _, weight: Dense(jit(weight.materialize)(), weight.axes, weight.inputs)
  by_rounded = rewrite(model, FakeQuantized, hold)
  for a, b in zip(jax.tree.leaves(slopes(model)), jax.tree.leaves(slopes(by_rounded)), strict=True):
    # The same sums in another program.
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max())


def test_activations_are_quantized_by_the_products_themselves():
  weight = dict(select(quantized(aware(None, Int(bits=3))).model, FakeQuantized))['stacks/0/blocks/mlp/up']
  layer = jax.tree.map(lambda a: a[0], weight)
  x = np.random.default_rng(2).normal(size=(2, 3, D)).astype(np.float32)
  step = np.abs(x).max(-1, keepdims=True) / 3
  expected = jnp.einsum('BTD,DF->BTF', np.round(x / step) * step, layer.materialize())
  np.testing.assert_allclose(jit(layer.contract, static_argnums=0)('BTD,DF->BTF', x), expected, rtol=1e-5, atol=1e-5)


def test_fewer_bits_err_more():
  exact = logits_of(learner().model)
  errors = [float(jnp.mean((logits_of(quantized(aware(Int(bits=bits))).model) - exact) ** 2)) for bits in (8, 4, 2)]
  # A bit less is twice the step and four times the squared error: 4 bits less, 256 times; well over 16.
  assert 0 < errors[0] * 16 < errors[1] < errors[2]


def test_rules_without_formats_are_the_float_model_itself():
  assert quantized(aware()) is learner()
  assert quantized(aware(method=LearnedSteps(), start=3)) is learner()


def test_of_two_rules_the_first_that_matches_decides():
  rules = (Rule(where='down$', weights=Int()), Rule(where='(output|value)$'), Rule(weights=Int(bits=4), activations=A8))
  model = shapes(QuantAware(rules=rules))
  found = {path.split('/')[-1]: weight for path, weight in select(model, FakeQuantized)}
  assert set(found) == {'query', 'key', 'gate', 'up', 'down'}
  assert found['down'].weights.format == Int() and found['down'].activations is None
  assert found['up'].weights.format == Int(bits=4) and found['up'].activations.format == A8


def test_the_note_names_the_method_and_the_large_weights_that_stay_float():
  note, = quantized(aware(Int(bits=4))).notes
  assert note.startswith('QuantAware (StraightThrough) reaches ') and note.endswith('left as they are: embed, own_head')
  everything, = QuantAware(rules=(Rule(where='', weights=Int()),))(learner(), None).notes
  assert 'left' not in everything


@pytest.mark.parametrize('weights', [Int(bits=4), None])
def test_a_selector_that_matches_nothing_is_an_error_that_names_what_there_is(weights):
  with pytest.raises(ValueError, match=r"'blcoks' decides nothing: no weight matches; the paths are embed, .*attention/key"):
    QuantAware(rules=(Rule(where='blcoks', weights=weights),))(learner(), None)


def test_a_wrong_field_is_named():
  wrong = QuantAware(rules=(), method=LearnedClip(), activation_method=3, start=-1)
  assert [name for name, _, _ in wrong.check()] == ['rules', 'start', 'method', 'activation_method']
  assert list(QuantAware(activation_method=LearnedClip()).check()) == []


@pytest.mark.parametrize('start, steps, refused', [(500, 10, True), (10, 10, True), (9, 10, False), (0, 0, False)])
def test_quantization_that_would_never_begin_is_refused_before_training(start, steps, refused):
  technique, training = aware(Int(bits=4), start=start), Training(steps=steps, batch_size=8, sequence_length=8)
  assert [name for name, _, _ in Train(training=training, techniques=(technique,)).check()] == (
    ['techniques[0].start'] if refused else [])


def test_overrides_are_checked_against_each_other():
  file = str(pathlib.Path(__file__).parents[3] / 'configs' / 'quantized.py')
  words = ['--config.techniques[0].start=500']
  assert experiments.load(file, [*words, '--config.train.steps=501'])[0].techniques[0].start == 500
  with pytest.raises(ConfigError, match=r'techniques\[0\]\.start = 500: must be below the 10 steps of the training'):
    experiments.load(file, [*words, '--config.train.steps=10'])


# Training.

@pytest.fixture
def quickly():
  """Compiling is nearly all that these tests spend their time on; what they state holds of any program."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def batch():
  ones = np.ones((2, 5), np.int32)
  return {'inputs_BT': TOKENS[:, :-1], 'targets_BT': TOKENS[:, 1:], 'weights_BT': ones.astype(np.float32), 'bytes_BT': ones,
          'segments_BT': ones, 'positions_BT': np.tile(np.arange(5, dtype=np.int32), (2, 1))}


def trained(technique, count, **kinds):
  """The model after each of some steps, and its loss before each."""
  schedule = optim.WarmupStableDecay(peak=1e-2, warmup=0, decay=0)
  optimizer = optim.AdamW(schedule=schedule).build(100)
  made = learners.assemble(learner(**kinds).model, optimizer, (technique,), jax.random.key(1))
  state, step, models, losses = learners.initial_state(made), trainer.compiled_step(made), [], []
  for _ in range(count):
    state, metrics = step(state, made.loss, batch())
    models.append(jax.tree.map(jnp.copy, state.model))
    losses.append(float(metrics['loss']))
  return models, losses


def test_every_step_counter_counts_each_step_and_quantization_starts_when_it_is_told_to(quickly):
  models, losses = trained(aware(Int(bits=2), Int(bits=4), start=2), 4, mlp='experts')
  counters = lambda model: {float(steps) for _, found in select(model, Delayed) for steps in found.counter.get_value()}
  assert [counters(model) for model in models] == [{1.}, {2.}, {3.}, {4.}]
  # Floats learn; the third loss is the first of 2 bits, and costs.
  assert losses[1] < losses[0] and losses[2] > losses[1]
  stored = models[-1].stacks[0].blocks.mlp.experts.down.converted()
  assert isinstance(stored, Quantized) and isinstance(stored.activations, Rounding)


def test_until_its_start_a_product_is_that_of_the_floats_bit_for_bit():
  """Operation by operation, so that no compiler sums in another order because more stands around a product."""
  layer = jax.tree.map(lambda a: a[0], quantized(aware(Int(bits=2), Int(bits=2), start=1)).model.stacks[0].blocks.mlp.up)
  x = np.random.default_rng(2).normal(size=(2, 3, D)).astype(np.float32)
  product = lambda weight: weight.contract('BTD,DF->BTF', x)
  np.testing.assert_array_equal(product(layer), product(layer.inner))
  for delayed in (layer.weights, layer.activations): delayed.counter.set_value(jnp.float32(1))
  at_once = FakeQuantized(layer.inner, Rounding(Int(bits=2)), Rounding(Int(bits=2)))
  np.testing.assert_array_equal(product(layer), product(at_once))


@pytest.mark.thinned
@pytest.mark.parametrize('technique', [
  aware(Int(bits=3), A8_STATIC, method=LearnedSteps(), activation_method=LearnedSteps()),
  aware(MidRise(), Int(bits=4, scales=Tensor()), method=StretchedLevels(), activation_method=LearnedClip()),
], ids=['lsq', 'seq and pact'])
def test_every_method_trains_and_what_it_stores_is_what_it_trained(quickly, technique):
  models, losses = trained(technique, 4)
  assert losses[-1] < losses[0]
  of = lambda model: [learned.exponent.get_value() for _, learned in select(model, LearnedStep)]
  exponents = of(models[0]), of(models[-1])
  # PACT stays where it is as long as it clips nothing.
  assert sum(np.any(a != b) for a, b in zip(*exponents, strict=True)) >= len(exponents[0]) // 2 == 7
  weight = jax.tree.map(lambda a: a[0], models[-1].stacks[0].blocks.mlp.up)
  stored = jax.jit(lambda weight: weight.converted().materialize())(weight)
  np.testing.assert_array_equal(stored, jax.jit(lambda weight: weight.materialize())(weight))


@pytest.mark.parametrize('order', list(itertools.permutations(range(3)))[::3], ids=str)
def test_learned_and_late_quantization_composes_with_experts_and_masks(order):
  """By shapes alone: what trains keeps its structure, and steps of experts that were copied are those of the dense layer."""
  late = aware(Int(bits=3), A8_STATIC, method=LearnedSteps(), activation_method=LearnedSteps(), start=2)
  listed = [late, Upcycle(num_experts=3), Prune(sparsity=0.5, start=0, end=2)]
  plain = learner().model

  def made():
    return learners.assemble(plain, optim.AdamW().build(10), [listed[i] for i in order], jax.random.key(0))
  before = jax.eval_shape(lambda: learners.initial_state(made()))
  step = functools.partial(trainer.train_step, optimizer=made().optimizer)
  after, _ = jax.eval_shape(step, before, NextToken(), batch())
  assert jax.tree.structure(after) == jax.tree.structure(before)
  assert [leaf.shape for leaf in jax.tree.leaves(after)] == [leaf.shape for leaf in jax.tree.leaves(before)]
  up = after.model.stacks[0].blocks.mlp.experts.up
  assert isinstance(up, FakeQuantized) and up.inner.axes == 'EDF'
  shared = order.index(0) < order.index(1)
  assert up.weights.inner.exponent.get_value().shape == ((2, 1, 24) if shared else (2, 3, 1, 24))
  assert up.weights.counter.get_value().shape == (2,)


@pytest.mark.parametrize('first', ['float', 'quantized'])
def test_a_float_teacher_and_a_quantized_student_never_affect_each_other(first):
  """In one process, traced in either order, and in one program: nothing is patched, so nothing leaks."""
  student = quantized(aware(Int(bits=2), A8, method=LearnedSteps())).model
  teacher = learner().model
  run = jit(lambda model: model(TOKENS).logits_BTV)   # not traced before
  models = {'float': teacher, 'quantized': student}
  order = [first, *(name for name in models if name != first)]
  alone = {name: np.asarray(run(models[name])) for name in order}
  again = {name: np.asarray(run(models[name])) for name in reversed(order)}
  for name in models: np.testing.assert_array_equal(alone[name], again[name])
  assert np.abs(alone['float'] - alone['quantized']).max() > 1e-2
  np.testing.assert_array_equal(alone['float'], logits_of(teacher))
  if first == 'quantized': return

  loss = Distilled(NextToken(), teacher, 1.0, 1.0)
  divergence = jit(lambda model: loss(outputs_of(model, batch()), batch())[1]['teacher_kl'])
  assert divergence(student) > 1e-3 and abs(divergence(teacher)) < 1e-6


def test_where_inputs_are_rotated_what_they_are_multiplied_with_is_quantized():
  """As storing it does: the rotated matrix, not the one that it stands for."""
  rotated = Rotated(Dense(jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32), 'DF', 'D'), 8)
  rule = Rule(weights=Int(bits=3))
  aware = QuantAware(rules=(rule,)).rewritten('up', rotated, rule)
  assert isinstance(aware, Rotated) and isinstance(aware.inner, FakeQuantized)
  nearest = stored(rotated, rule, lambda w_OI, _: rule.weights.encode(w_OI, rule.weights.scales_for(w_OI)))
  np.testing.assert_array_equal(aware.inner.materialize(), nearest.inner.materialize())


@pytest.mark.parametrize('method, format', [(LearnedSteps, Int(bits=4)), (StretchedLevels, MidRise())])
def test_learned_grids_begin_with_less_error_than_the_paper_s(method, format):
  weight = Dense(jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32), 'DF', 'D')

  def error(chosen):
    rounded = FakeQuantized(weight, chosen.of_weight(weight, format)).materialize()
    return jnp.mean(jnp.square(rounded - weight.materialize()))
  assert error(method()) < 0.8 * error(method(range=None))
