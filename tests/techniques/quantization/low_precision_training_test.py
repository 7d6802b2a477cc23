"""Low-precision training multiplies in eight bits where it says so, and nowhere else; switched off it is the float model."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.config.mesh import Mesh
from efficient_lm.models import spec
from efficient_lm.parallel import sharding
from efficient_lm.techniques.quantization.low_precision_training import LowPrecisionTraining
from efficient_lm.training import trainer
from efficient_lm.training.learner import Learner, assemble, initial_state
from efficient_lm.training.optimizers import AdamW, WarmupStableDecay
from efficient_lm.tree import select
from efficient_lm.weights.low_precision import LowPrecision
from efficient_lm.weights.step_counter import StepCounter
from efficient_lm.weights.weight import Weight

V, D, B, T = 24, 16, 4, 6
FLOAT8 = dict(forward='float8_e4m3fn', dgrad='float8_e5m2', wgrad='float8_e5m2')


@functools.cache
def learner(mlp='dense'):
  """Of a model whose numbers are drawn by numpy."""
  stack = spec.Stack(num_layers=2, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8), mlp={
    'dense': spec.SwiGLU(hidden=24), 'experts': spec.MoE(num_experts=4, hidden=8, num_shared=1)}[mlp])
  described = spec.Transformer(vocab_size=V, dim=D, stacks=(stack,))
  rng = np.random.default_rng(0)
  abstract = jax.eval_shape(lambda: described.build(rngs=nnx.Rngs(0)))
  return Learner(jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype), abstract), None, None)


def lowered(technique, mlp='dense'):
  return technique(learner(mlp), jax.random.key(0))


def batch(seed=0):
  tokens = np.random.default_rng(seed).integers(0, V, (B, T + 1)).astype(np.int32)
  ones = np.ones((B, T), np.int32)
  return {'inputs_BT': tokens[:, :-1], 'targets_BT': tokens[:, 1:], 'weights_BT': ones.astype(np.float32),
          'bytes_BT': ones, 'segments_BT': ones, 'positions_BT': np.tile(np.arange(T, dtype=np.int32), (B, 1))}


@functools.cache
def compiled(technique_fields=(), mlp='dense', accumulate=1):
  """A learner that trains, and its step as a program."""
  techniques = (LowPrecisionTraining(**dict(technique_fields)),) if technique_fields is not None else ()
  optimizer = AdamW(schedule=WarmupStableDecay(peak=1e-2, warmup=0, decay=0)).build(100)
  made = assemble(learner(mlp).model, optimizer, techniques, jax.random.key(1))
  shapes = jax.eval_shape(lambda: initial_state(made)), made.loss, batch()
  return made, trainer.compiled_step(made, accumulate).lower(*shapes).compile()


@pytest.mark.parametrize('mlp', ['dense', 'experts'])
def test_every_matrix_of_the_layers_but_routers_is_lowered(mlp):
  model = lowered(LowPrecisionTraining(), mlp).model
  names = {path.split('/')[-1] for path, _ in select(model, LowPrecision)}
  assert names == {'query', 'key', 'value', 'output', 'gate', 'up', 'down'}
  plain = {path for path, weight in select(model, Weight) if not isinstance(weight, LowPrecision)}
  assert plain == {'embed', 'own_head'} | ({'stacks/0/blocks/mlp/router'} if mlp == 'experts' else set())


# Seven products in the layers of a dense model, three passes each; a mixture has three for its experts and three for the
# shared one beside four of attention. Layers are one loop, so that each stands in the program once, forward and backward.
@pytest.mark.thinned
@pytest.mark.parametrize('mlp, integers', [('dense', 7 * 3), ('experts', 10 * 3)])
def test_the_train_step_multiplies_integers(mlp, integers):
  program = compiled((), mlp)[1].as_text()
  assert len(re.findall(r'= s32\[[^ ]* dot\(', program)) >= integers


def test_the_plain_step_multiplies_none():
  assert not re.findall(r'= s32\[[^ ]* dot\(', compiled(None)[1].as_text())


def losses(fields, count=12, mlp='dense', accumulate=1):
  made, step = compiled(fields, mlp, accumulate)
  state, found = initial_state(made), []
  for _ in range(count):
    state, metrics = step(state, made.loss, batch())
    found.append(float(metrics['loss']))
  return state, found


@pytest.mark.parametrize('fields', [(), tuple(FLOAT8.items())], ids=['int8', 'float8'])
def test_it_learns_nearly_as_the_float_model_does(fields):
  (_, got), (_, plain) = losses(fields), losses(None)
  assert plain[-1] < plain[0] - 1
  # Rounded sums err by a percent or a few; so, about, does the way down.
  assert got[-1] == pytest.approx(plain[-1], abs=0.1 * (plain[0] - plain[-1])) and got != plain


def test_step_counters_count_steps_also_where_gradients_are_accumulated():
  state, _ = losses((), 3, accumulate=2)
  counters = [counter.get_value() for _, counter in select(state.model, StepCounter)]
  assert len(counters) == 7 and all(np.array_equal(counter, [3, 3]) for counter in counters)


def test_the_same_seed_gives_the_same_losses_bit_for_bit():
  assert losses(())[1] == losses(())[1]


@pytest.mark.parametrize('technique', [LowPrecisionTraining(stochastic=False), LowPrecisionTraining(dgrad=None, wgrad=None)],
                         ids=['to the nearest', 'forward only'])
def test_without_noise_there_is_no_step_counter(technique):
  model = lowered(technique).model
  assert not list(select(model, StepCounter)) and list(select(model, LowPrecision))


def test_switched_off_it_is_the_float_model_itself():
  assert lowered(LowPrecisionTraining(forward=None, dgrad=None, wgrad=None)) is learner('dense')


def test_the_note_says_what_is_computed_in_what_and_what_is_left():
  note, = lowered(LowPrecisionTraining(wgrad=None)).notes
  assert note.startswith('LowPrecisionTraining (forward int8, dgrad int8) reaches ')
  assert note.endswith('left as they are: embed, own_head')


def test_a_head_of_its_own_can_be_reached_and_an_embedding_cannot():
  model = lowered(LowPrecisionTraining(where='own_head')).model
  assert [path for path, _ in select(model, LowPrecision)] == ['own_head']
  with pytest.raises(ValueError, match=r'embed is looked up.*narrow where'): lowered(LowPrecisionTraining(where=''))


@pytest.mark.parametrize('forward', ['int8', None])
def test_a_selector_that_matches_nothing_is_an_error_that_names_what_there_is(forward):
  with pytest.raises(ValueError, match=r"matches 'blcoks'; the paths are embed, .*stacks/0/blocks/attention/key"):
    lowered(LowPrecisionTraining(forward=forward, dgrad=None, wgrad=None, where='blcoks'))


def test_a_wrong_field_is_named():
  problems = list(LowPrecisionTraining(forward='int4', dgrad='fp8', wgrad='int8').check())
  assert [name for name, _, _ in problems] == ['forward', 'dgrad']
  assert problems[0][2] == 'must be one of int8, float8_e4m3fn, float8_e5m2, or None for no rounding'
  assert list(LowPrecisionTraining(**FLOAT8).check()) == []


@pytest.mark.skipif('jax.device_count() != 8', reason='needs eight devices: run the tests on CPU')
def test_experts_on_a_mesh_multiply_what_they_do_on_one_device():
  """Over devices that split tokens and experts: rows, and so their scales, stay whole. Each counter takes one step."""
  made, step = compiled((), 'experts')
  _, metrics = step(initial_state(made), made.loss, batch())
  mesh = Mesh(data=1, fsdp=2, expert=2).build(jax.devices()[:4])
  with jax.set_mesh(mesh):
    state, spread = trainer.compiled_step(made)(initial_state(made, mesh), made.loss, sharding.place(batch(), mesh))
  assert float(spread['loss']) == pytest.approx(float(metrics['loss']), rel=1e-5)
  assert {step for _, counter in select(state.model, StepCounter)
          for step in np.asarray(counter.get_value()).tolist()} == {1.0}
