"""A model's structure as JSON is all that is needed to know its shapes: of every kind of layer and of weight."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.errors import CheckpointError
from efficient_lm.formats import Group, Int
from efficient_lm.models import zoo
from efficient_lm.models.transformer import unrolled
from efficient_lm.runs import structure
from efficient_lm.techniques import (
  BitNet,
  Gptq,
  LearnedSteps,
  LowPrecisionTraining,
  NofM,
  Pack,
  PruneOnce,
  QuantAware,
  Quantize,
  Rotate,
  Rule,
)
from efficient_lm.training.learner import Learner
from tests.compressing import Context, model_of


def technique(made):
  return lambda model: made(Learner(model, None, None), jax.random.key(0)).model


def stage(made):
  return lambda model: made(model, Context())[0]


INT4 = Int(bits=4, scales=Group(size=4))
CHANGES = {
  'plain': lambda model: model, 'unrolled': unrolled,
  'quantized': stage(Quantize(rules=(Rule(weights=INT4, activations=Int()), Rule(where='embed', weights=Int())))),
  'masked': stage(PruneOnce(sparsity=0.5)), 'two of four': stage(PruneOnce(pattern=NofM())),
  'two of four, stored': stage(Quantize(rules=(Rule(weights=INT4),), method=Gptq(pattern=NofM()), sequences=8)),
  'packed': lambda model: stage(Pack())(stage(PruneOnce(pattern=NofM()))(model)),
  'rotated': stage(Rotate()), 'bitnet': technique(BitNet()), 'in low precision': technique(LowPrecisionTraining()),
  'delayed': technique(QuantAware(rules=(Rule(weights=INT4),), start=3)),
  'learned': technique(QuantAware(rules=(Rule(weights=INT4),), method=LearnedSteps())),
}


def through_json(model):
  return structure.rebuilt(json.loads(json.dumps(structure.described(model), allow_nan=False)))


def assert_alike(model, again):
  assert jax.tree.structure(again) == jax.tree.structure(jax.eval_shape(lambda: model))
  for leaf, shape in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
    assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)


@pytest.mark.thinned
@pytest.mark.parametrize('mlp', ['dense', 'experts'])
@pytest.mark.parametrize('name', CHANGES)
def test_a_model_is_the_same_tree_after_a_trip_through_json(name, mlp):
  model = CHANGES[name](model_of(mlp=mlp))
  assert_alike(model, through_json(model))
  assert structure.described(through_json(model)) == structure.described(model), 'of shapes as of arrays'


@pytest.mark.parametrize('spec', [zoo.olmoe_1b_7b, zoo.deepseek_v3], ids=lambda make: make.__name__)
def test_published_shapes_are_too(spec):
  model = jax.eval_shape(lambda: spec().build(rngs=nnx.Rngs(0)))
  assert jax.tree.structure(through_json(model)) == jax.tree.structure(model)


def test_what_is_rebuilt_computes_the_same_with_the_same_arrays():
  model = CHANGES['quantized'](model_of())
  again = jax.tree.unflatten(jax.tree.structure(through_json(model)), jax.tree.leaves(model))
  tokens = jnp.arange(16).reshape(2, 8)
  np.testing.assert_array_equal(again(tokens).logits_BTV, model(tokens).logits_BTV)


@pytest.mark.parametrize('damage', [
  {'module': 'Nothing'}, {'module': 'os.system'}, {'variable': 'Param2', 'shape': [], 'dtype': 'int8'},
  {'module': 'mine.py:Own'}])
def test_a_class_that_is_not_at_hand_is_named(damage):
  with pytest.raises(CheckpointError, match=r'give --config=FILE\.py'): structure.rebuilt(damage)


def test_what_cannot_be_described_is_refused_when_it_is_saved():
  model = model_of()
  model = jax.tree.map(lambda leaf: leaf, model)
  model.callback = len
  with pytest.raises(TypeError, match='cannot be described'): structure.described(model)
