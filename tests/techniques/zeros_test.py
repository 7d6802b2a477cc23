"""What is pruned stays zero in every stage that follows, or the stage says that it gives the zeros up."""
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Group, Int, MidRise
from efficient_lm.runs import invariants
from efficient_lm.techniques import (
  Awq,
  Convert,
  GivingUp,
  Gptq,
  NofM,
  Prune,
  PruneOnce,
  QuantAware,
  Quantize,
  Rotate,
  RoundToNearest,
  Rule,
  SmoothQuant,
  SparseGpt,
  Unroll,
)
from efficient_lm.training import learner, trainer
from efficient_lm.training.optimizers import AdamW
from efficient_lm.tree import select
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.weight import Weight
from tests.compressing import Context, T, abstractly, assert_structure, batch_of, model_of

pytestmark = pytest.mark.usefixtures('quick_compilation')

INT3, MID_RISE = Int(bits=3, scales=Group(size=8)), MidRise(scales=Group(size=8))
METHODS = {'rtn': RoundToNearest(), 'gptq': Gptq(block=16), 'awq': Awq(grid=3, clips=2)}


def quantize(method='rtn', format=INT3):
  return Quantize(rules=(Rule(weights=format),), method=METHODS[method], sequences=8, least_tokens=1)


def trained(technique):
  """The model after two steps with a technique."""
  made = learner.assemble(model_of(), AdamW().build(2), (technique,), jax.random.key(0), steps=2)
  ones = np.ones((8, T), np.int32)
  state, step = learner.initial_state(made), trainer.compiled_step(made)
  for seed in range(2):
    batch = batch_of(seed) | {'weights_BT': ones.astype(np.float32), 'bytes_BT': ones}
    state, _ = step(state, made.loss, batch)
  return learner.finished(state.model, state.opt_state, (technique,))


@functools.cache
def pruned(how):
  """A model of which half is zero."""
  if how == 'in training': return trained(Prune(sparsity=0.5, where=r'(query|output|up|down)$'))
  two_of_four = PruneOnce(pattern=NofM(n=2, m=4), score=SparseGpt(block=8), sequences=8, least_tokens=1)
  stage = two_of_four if how == '2:4' else PruneOnce(sparsity=0.5)
  return stage(model_of(mlp='experts' if how == 'experts' else 'dense'), Context())[0]


def masks(model):
  """Where the weights of a model are promised to be zero, by path."""
  return {path: np.asarray(weight.keep.get_value()) for path, weight in select(model, Masked)}


def assert_zeros(model, keep):
  """Every pruned entry is zero, exactly, and there are as many as there were."""
  weights = dict(select(model, Weight))
  for path, mask in keep.items():
    array = np.asarray(weights[path].materialize())
    assert np.sum((array == 0) & ~mask) == np.sum(~mask) >= mask.size // 2 - 1, path


def assert_two_of_four(model, paths):
  for path, weight in select(model, Weight):
    if path not in paths: continue
    matrix_OI = np.asarray(Layout.of(weight).matrix(weight.materialize()))
    groups = matrix_OI.reshape(*matrix_OI.shape[:-1], -1, 4)
    assert np.all(np.sum(groups != 0, -1) <= 2), path


@pytest.mark.thinned
@pytest.mark.parametrize('stage', [
  *map(quantize, METHODS), quantize('rtn', MID_RISE), quantize('gptq', MID_RISE), SmoothQuant(sequences=8)],
  ids=lambda stage: f'{type(stage).__name__} {type(stage.method).__name__} {stage.rules[0].weights.element}'
  if isinstance(stage, Quantize) else type(stage).__name__)
@pytest.mark.parametrize('how', ['at once', '2:4', 'in training', 'experts'])
def test_every_zero_is_kept_and_the_run_is_satisfied(how, stage):
  """A grid without a zero, too: there the mask stays around what is stored."""
  model = pruned(how)
  keep, promised = masks(model), invariants.read(model)
  assert len(keep) >= 4
  after, _ = stage(model, Context())
  assert_zeros(after, keep)
  if how == '2:4': assert_two_of_four(after, keep)
  assert invariants.check(promised, after, stage) == []
  assert_structure(abstractly(stage, model), after)
  weights = dict(select(after, Weight))
  stored = {path for path in keep if isinstance(getattr(weights[path], 'inner', weights[path]), Quantized)}
  assert stored == (set(keep) if isinstance(stage, Quantize) else set())


def test_stage_by_stage_the_zeros_are_the_same():
  """Pruned, smoothed, taken apart, stored: counted after each."""
  model, keep = pruned('2:4'), masks(pruned('2:4'))
  for stage in (SmoothQuant(sequences=8), quantize('gptq')):
    model, _ = stage(model, Context())
    assert_zeros(model, keep)
  model, _ = Unroll()(model, Context())
  apart = {path.replace('blocks/', f'blocks/{i}/'): mask[i] for path, mask in keep.items() for i in range(2)}
  assert_zeros(model, apart)
  assert_two_of_four(model, apart)


@pytest.mark.parametrize('format', [INT3, MID_RISE], ids=['int3', 'mid-rise'])
def test_quantization_aware_training_of_a_pruned_model_stores_its_zeros(format):
  technique = QuantAware(rules=(Rule(weights=format),))
  made = learner.assemble(pruned('2:4'), AdamW().build(2), (technique,), jax.random.key(0), steps=2)
  aware = learner.finished(made.model, made.optimizer.init(nnx.state(made.model, nnx.Param)), (technique,))
  stored, _ = Convert()(aware, Context())
  for model in (aware, stored):
    assert_zeros(model, masks(pruned('2:4')))
    assert_two_of_four(model, masks(pruned('2:4')))
  assert invariants.check(invariants.read(aware), stored, Convert()) == []


def test_a_rotation_leaves_no_zero_and_has_to_say_so():
  model = pruned('2:4')
  rotated, _ = Rotate()(model, Context())
  weights = dict(select(rotated, Weight))
  assert not any(np.any(np.asarray(weights[path].materialize())[~mask] == 0) for path, mask in masks(model).items()
                 if path.endswith(('query', 'output', 'gate', 'up')))
  with pytest.raises(IncompatibleError, match=r'has lost its zeros .* in Rotate: if that is meant, write GivingUp'):
    invariants.check(invariants.read(model), rotated, Rotate())
  stage = GivingUp(stage=Rotate(), lost=('zeros', 'pattern'))
  notes = invariants.check(invariants.read(model), stage(model, Context())[0], stage)
  assert [note.split(' of ')[0] for note in notes] == ['Rotate has given up the zeros', 'Rotate has given up the pattern']
