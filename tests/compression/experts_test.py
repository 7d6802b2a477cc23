"""Experts that are copies of a dense layer: the same numbers, whatever kind its weights are, and the same promises."""
import jax
import numpy as np
import pytest

from efficient_lm.compression import experts
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Int, MidRise
from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.models.transformer import unrolled
from efficient_lm.runs import invariants
from efficient_lm.tree import rewrite, select
from efficient_lm.weights.fake_quantized import Normalized, fake_quantized
from efficient_lm.weights.low_precision import low_precision
from efficient_lm.weights.quantized import round_to_nearest
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Weight
from tests.compressing import assert_the_same, family, masked_once, model_of

pytestmark = pytest.mark.usefixtures('quick_compilation')

E = 3
MIXTURE = lambda hidden: spec.MoE(num_experts=E, hidden=hidden, router=routing.SoftmaxTopK(top_k=2))
DENSE = {
  'float': lambda weight: weight, 'masked': lambda weight: masked_once(weight, 0.5),
  'QAT': lambda weight: fake_quantized(weight, Rounding(Int(bits=4)), Rounding(Int())),
  'QAT of masked': lambda weight: fake_quantized(masked_once(weight, 0.5), Rounding(MidRise())),
  'BitNet': lambda weight: Normalized(fake_quantized(weight, Rounding(Int(bits=2)), Rounding(Int()))),
  'low precision': lambda weight: low_precision(weight, dict(forward='int8', dgrad='int8', wgrad='int8')),
}


def dense_of(kind, model=None):
  return rewrite(model or model_of(), Weight, lambda _, weight: DENSE[kind](weight), 'mlp/')


@pytest.mark.parametrize('kind', DENSE)
def test_every_expert_is_the_dense_layer(kind):
  """Weight by weight, in each layer; and what was promised of the layer is promised of the experts, and kept."""
  model = dense_of(kind)
  sparse, paths = experts.upcycled(model, MIXTURE, 'mlp$', jax.random.key(0))
  assert paths == ['stacks/0/blocks/mlp']
  for path, weight in select(model, Weight, 'mlp/'):
    copies = dict(select(sparse, Weight))[path.replace('mlp/', 'mlp/experts/')]
    assert copies.kind == weight.kind and copies.axes == 'E' + weight.axes
    for e in range(E): np.testing.assert_array_equal(copies.materialize()[:, e], weight.materialize(), err_msg=path)
  promised = experts.followed(invariants.read(model), 'mlp$', E)
  assert invariants.check(promised, sparse, None) == []
  assert bool(promised) == (kind not in ('float', 'low precision'))
  assert set(promised) <= {path for path, _ in select(sparse, Weight)}


@pytest.mark.parametrize('name, why', [('pattern', 'is no SwiGLU without biases'), ('plain', 'no FeedForward on a path')])
def test_a_layer_that_is_no_swiglu_without_biases_is_refused_in_a_line(name, why):
  with pytest.raises(IncompatibleError, match=why): experts.upcycled(family(name), MIXTURE, 'mlp$', jax.random.key(0))


def test_with_gates_that_sum_to_one_it_computes_the_same_in_a_stack_and_unrolled():
  for model in (model_of(), unrolled(model_of())):
    sparse, paths = experts.upcycled(model, MIXTURE, 'mlp$', jax.random.key(0))
    assert_the_same(model, sparse)
    assert len(paths) == (1 if model is model_of() else 2)


def test_layers_have_routers_of_their_own():
  sparse, _ = experts.upcycled(model_of(), MIXTURE, 'mlp$', jax.random.key(0))
  router = dict(select(sparse, Weight))['stacks/0/blocks/mlp/router'].materialize()
  assert not np.allclose(router[0], router[1])


@pytest.mark.parametrize('wrap', [lambda weight: weight, lambda weight: low_precision(weight, {'forward': 'int8'})])
def test_what_is_stored_in_few_bits_is_refused_by_name(wrap):
  """Wherever it is nested."""
  stored = rewrite(model_of(), Weight, lambda _, weight: wrap(round_to_nearest(weight, Int())), 'mlp/up$')
  with pytest.raises(IncompatibleError, match='blocks/mlp/up is stored as int8 per channel: training cannot change it'):
    experts.upcycled(stored, MIXTURE, 'mlp$', jax.random.key(0))
  with pytest.raises(IncompatibleError, match='no FeedForward on a path that matches'):
    experts.upcycled(model_of(), MIXTURE, 'blcoks', jax.random.key(0))


def test_promises_of_other_weights_stay_where_they_are():
  promised = {'stacks/0/blocks/attention/query': ('one',), 'stacks/0/blocks/mlp/router': ('other',)}
  assert experts.followed(promised, 'mlp$', E) == promised
