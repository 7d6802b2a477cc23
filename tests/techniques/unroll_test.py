"""Layers apart compute the same, and may have formats of their own."""
import jax
import numpy as np
import pytest

from efficient_lm import tree
from efficient_lm.compression.rules import Rule
from efficient_lm.formats import Group, Int
from efficient_lm.techniques.quantization.gptq import Gptq
from efficient_lm.techniques.quantization.ptq import Quantize
from efficient_lm.techniques.unroll import Unroll
from efficient_lm.training.evaluation import evaluation_sums
from efficient_lm.weights.quantized import Quantized
from tests.compressing import Context, abstractly, assert_structure, assert_the_same, batch_of, model_of

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.mark.parametrize('mlp', ['dense', 'experts'])
def test_it_changes_nothing_but_names(mlp):
  model, notes = Unroll()(model_of(mlp=mlp), Context())
  assert_the_same(model, model_of(mlp=mlp))
  assert_structure(abstractly(Unroll(), model_of(mlp=mlp)), model)
  assert len(notes) == 1


def test_each_layer_gets_the_format_of_its_rule_and_is_evaluated():
  layer = lambda i, bits: Rule(where=f'blocks/{i}/.*(up|down)$', weights=Int(bits=bits, scales=Group(size=8)))
  model, _ = Unroll()(model_of(), Context())
  stored, _ = Quantize(rules=(layer(0, 4), layer(1, 8)), method=Gptq(block=16), sequences=8)(model, Context())
  assert {path: weight.format.bits for path, weight in tree.select(stored, Quantized)} == {
    f'stacks/0/blocks/{i}/mlp/{name}': bits for i, bits in ((0, 4), (1, 8)) for name in ('up', 'down')}
  batch = batch_of() | {'weights_BT': np.ones((8, 16), np.float32), 'bytes_BT': np.ones((8, 16), np.int32)}
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(evaluation_sums(stored, batch)))
