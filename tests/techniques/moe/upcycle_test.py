"""An upcycled model starts from what the dense one knows."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.formats import Int
from efficient_lm.models import spec
from efficient_lm.models.mlp import FeedForward
from efficient_lm.models.moe.layer import MoE
from efficient_lm.models.moe.routing import LossFreeBias, SigmoidTopK, SoftmaxTopK
from efficient_lm.techniques.moe.upcycle import Upcycle
from efficient_lm.training.learner import Learner
from efficient_lm.tree import rewrite, select, size
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Weight

V, D, F, LAYERS, E = 24, 16, 12, 2, 4
TOKENS = np.random.default_rng(1).integers(0, V, (2, 6)).astype(np.int32)


@functools.cache
def learner():
  """A learner without loss or optimizer: all that this technique touches is the model. Numbers drawn by numpy."""
  attention = spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8)
  stack = lambda count: spec.Stack(num_layers=count, attention=attention, mlp=spec.SwiGLU(hidden=F))
  described = spec.Transformer(vocab_size=V, dim=D, stacks=(stack(LAYERS), stack(1)))
  rng = np.random.default_rng(0)
  abstract = jax.eval_shape(lambda: described.build(rngs=nnx.Rngs(0)))
  number = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype)
  return Learner(jax.tree.map(number, abstract), None, None)


@functools.cache
def upcycled(where='mlp$'):
  return Upcycle(num_experts=E, where=where)(learner(), jax.random.key(0))


@jax.jit
def logits_of(model):
  return model(TOKENS).logits_BTV


@pytest.mark.parametrize('router', [SoftmaxTopK(top_k=2), SoftmaxTopK(top_k=1), SigmoidTopK(top_k=3)], ids=str)
def test_it_starts_with_the_logits_of_the_dense_model_where_gates_sum_to_one(router):
  sparse = Upcycle(num_experts=E, router=router)(learner(), jax.random.key(0)).model
  exact = np.asarray(logits_of(learner().model))
  # Gates of sum 1 weigh equal rows: a few float32 roundings a layer, of logits of this size.
  np.testing.assert_allclose(logits_of(sparse), exact, rtol=0, atol=2e-5 * np.abs(exact).max())


def test_gates_that_do_not_sum_to_one_start_elsewhere():
  router = SoftmaxTopK(top_k=2, normalize=False)
  sparse = Upcycle(num_experts=E, router=router)(learner(), jax.random.key(0)).model
  assert np.abs(logits_of(sparse) - logits_of(learner().model)).max() > 1e-2


def test_every_expert_equals_the_dense_layer_bit_for_bit():
  dense, sparse = dict(select(learner().model, FeedForward)), dict(select(upcycled().model, MoE))
  assert dense.keys() == sparse.keys() and len(dense) == 2
  for path, layer in dense.items():
    for name in ('gate', 'up', 'down'):
      array, experts = (getattr(part, name).materialize() for part in (layer, sparse[path].experts))
      assert experts.shape == (array.shape[0], E, *array.shape[1:])
      np.testing.assert_array_equal(experts, np.repeat(np.asarray(array)[:, None], E, 1))
      weight = getattr(sparse[path].experts, name)
      assert weight.axes == 'E' + getattr(layer, name).axes and weight.array.get_metadata()['axes'] == weight.axes


def test_routers_of_layers_and_stacks_are_drawn_each_by_itself():
  routers = [row for _, moe in select(upcycled().model, MoE) for row in np.asarray(moe.router.materialize())]
  assert len(routers) == LAYERS + 1
  assert all(np.abs(a - b).max() > 1e-2 for i, a in enumerate(routers) for b in routers[:i])
  again = Upcycle(num_experts=E)(learner(), jax.random.key(1))
  other = next(select(again.model, MoE))[1].router.materialize()
  assert np.abs(other[0] - routers[0]).max() > 1e-2


def test_only_the_selected_layers_change():
  model = upcycled(where='stacks/1/.*mlp$').model
  assert [path for path, _ in select(model, MoE)] == ['stacks/1/blocks/mlp']
  assert [path for path, _ in select(model, FeedForward)] == ['stacks/0/blocks/mlp']
  rest = lambda model: dict(select(model, Weight, '^(?!stacks/1/blocks/mlp)'))
  before, after = rest(learner().model), rest(model)
  assert before.keys() == after.keys()
  assert all(before[path].materialize() is after[path].materialize() for path in before)


def test_parameters_grow_by_copies_and_routers():
  layers = LAYERS + 1
  assert size(upcycled().model) - size(learner().model) == layers * ((E - 1) * 3 * D * F + D * E)
  biased = Upcycle(num_experts=E, balance=(LossFreeBias(),))(learner(), jax.random.key(0)).model
  assert size(biased) - size(upcycled().model) == layers * E


def test_the_kind_of_each_weight_is_kept():
  model = rewrite(learner().model, Weight, lambda _, weight: FakeQuantized(weight, Rounding(Int(bits=4))), 'mlp/(gate|up)$')
  sparse = Upcycle(num_experts=E)(learner().replace(model=model), jax.random.key(0)).model
  for path, moe in select(sparse, MoE):
    dense = dict(select(model, FeedForward))[path]
    assert isinstance(moe.experts.gate, FakeQuantized) and not isinstance(moe.experts.down, FakeQuantized)
    assert moe.experts.gate.weights.format == Int(bits=4) and moe.experts.gate.axes == 'EDF'
    rounded = np.asarray(jax.jit(dense.gate.materialize)())
    # Each expert is rounded by itself, so as the dense layer was.
    np.testing.assert_allclose(jax.jit(moe.experts.gate.materialize)(), np.repeat(rounded[:, None], E, 1), rtol=1e-6)


def test_one_expert_is_the_dense_model_itself():
  assert Upcycle(num_experts=1, router=SoftmaxTopK(top_k=1))(learner(), jax.random.key(0)) is learner()


@pytest.mark.parametrize('num_experts', [1, E])
def test_a_selector_that_matches_nothing_is_an_error_that_names_what_there_is(num_experts):
  with pytest.raises(ValueError, match="matches 'mpl'; the paths are stacks/0/blocks/mlp, stacks/1/blocks/mlp"):
    Upcycle(num_experts=num_experts, where='mpl')(learner(), jax.random.key(0))


def test_it_says_what_became_of_which_layers():
  assert upcycled().notes == (f'Upcycle: stacks/0/blocks/mlp, stacks/1/blocks/mlp to {E} experts each',)


@pytest.mark.parametrize('technique, field', [
  (Upcycle(num_experts=0), 'num_experts'), (Upcycle(num_experts=2, router=SoftmaxTopK(top_k=3)), 'router.top_k')])
def test_a_wrong_field_is_named(technique, field):
  assert [name for name, _, _ in technique.check()] == [field]
  assert list(Upcycle(num_experts=4).check()) == []
