"""Specs refuse each wrong field by name, and describe a model completely."""
import copy
import re

import jax
import pytest
from flax import nnx

from efficient_lm.models import spec
from efficient_lm.models.moe import routing

GOOD = {
  spec.Rope: {}, spec.SwiGLU: dict(hidden=8),
  spec.GroupedQuery: dict(num_heads=4, num_kv_heads=2, head_dim=8),
  spec.Latent: dict(num_heads=2, query_rank=None, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=4),
  spec.MoE: dict(num_experts=4, hidden=8),
  spec.Stack: dict(num_layers=2, attention=None, mlp=None),
  spec.Repeated: dict(num_repeats=2, layers=(None,)), spec.Learned: dict(length=4),
  spec.Ends: {}, spec.Gated: dict(hidden=8), spec.Plain: dict(hidden=8, activation='relu'),
  spec.Transformer: dict(vocab_size=16, dim=8, stacks=(None,)),
}
BAD = [
  (spec.Rope, 'theta', 0.0), (spec.Rope, 'layout', 'whole'),
  (spec.GroupedQuery, 'num_heads', 0), (spec.GroupedQuery, 'num_kv_heads', 3), (spec.GroupedQuery, 'num_kv_heads', 0),
  (spec.GroupedQuery, 'head_dim', 7), (spec.GroupedQuery, 'qk_norm', 'D'), (spec.GroupedQuery, 'window', 0),
  (spec.Latent, 'query_rank', 0), (spec.Latent, 'kv_rank', 0), (spec.Latent, 'rope_dim', 3),
  (spec.Latent, 'value_dim', -1), (spec.SwiGLU, 'hidden', 0),
  (spec.MoE, 'num_experts', 0), (spec.MoE, 'num_shared', -1), (spec.MoE, 'capacity', 0.0),
  (spec.GroupedQuery, 'biases', ('gate',)), (spec.GroupedQuery, 'biases', ('key', 'key')),
  (spec.GroupedQuery, 'softcap', 0.0), (spec.GroupedQuery, 'scale', -1.0), (spec.Learned, 'length', 0),
  (spec.Gated, 'hidden', 0), (spec.Gated, 'activation', 'tanh'), (spec.Gated, 'biases', ('router',)),
  (spec.Plain, 'activation', 'swish'), (spec.Plain, 'biases', ('gate',)),
  (spec.MoE, 'shared', spec.MoE(num_experts=2, hidden=8)),
  (spec.Repeated, 'num_repeats', 0), (spec.Repeated, 'layers', ()), (spec.Repeated, 'remat', 'some'),
  (spec.Ends, 'softcap', 0.0), (spec.Ends, 'embed_scale', 0.0),
  (spec.Stack, 'num_layers', 0), (spec.Stack, 'unroll', 0), (spec.Stack, 'remat', 'some'),
  (spec.Transformer, 'vocab_size', 0), (spec.Transformer, 'stacks', ()), (spec.Transformer, 'norm_eps', 0.0),
  (spec.Transformer, 'dtype', 'int8'),
]


@pytest.mark.parametrize('kind', GOOD)
def test_a_good_spec_has_no_problems(kind):
  assert list(kind(**GOOD[kind]).check()) == []


@pytest.mark.parametrize('kind, field, value', BAD)
def test_a_wrong_field_is_named_with_its_value_and_a_remedy(kind, field, value):
  problems = list(kind(**{**GOOD[kind], field: value}).check())
  assert [(name, found) for name, found, _ in problems if name == field] == [(field, value)]
  assert all(fix.startswith('must ') for name, _, fix in problems if name == field)


def moe_model():
  attention = spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=4)
  mixture = spec.MoE(num_experts=4, hidden=8, balance=(routing.LossFreeBias(), routing.LoadBalance()))
  return spec.Transformer(vocab_size=16, dim=8, stacks=(spec.Stack(num_layers=1, attention=attention, mlp=mixture),))


def abstract(described):
  return jax.eval_shape(lambda: described.build(rngs=nnx.Rngs(0)))


def test_equal_specs_build_models_of_equal_structure():
  """Static parts compare by value, so two such models share one compiled function."""
  assert jax.tree.structure(abstract(moe_model())) == jax.tree.structure(abstract(moe_model()))


def test_a_model_does_not_change_with_the_spec_that_it_was_built_from():
  described = moe_model()
  model = abstract(described)
  before = copy.deepcopy(jax.tree.structure(abstract(moe_model())))
  mixture = described.stacks[0].mlp
  mixture.router.top_k, mixture.balance[1].weight, mixture.dispatch.transport = 3, 7.0, 'a2a'
  assert jax.tree.structure(model) == before
  assert jax.tree.structure(abstract(described)) != before


@pytest.mark.parametrize('options, caveats', [
  ({}, []), (dict(capacity=1.5), ['^capacity 1.5 drops tokens .* generation reads through a cache and drops none$']),
  (dict(router=routing.ExpertChoice(capacity=2.0), balance=()), ['^expert choice is not causal: ']),
])
def test_a_mixture_says_what_a_user_has_to_know_of_it(options, caveats):
  said = list(spec.MoE(num_experts=4, hidden=8, **options).caveats())
  assert len(said) == len(caveats)
  for line, pattern in zip(said, caveats): assert re.search(pattern, line) and '\n' not in line


@pytest.mark.parametrize('field, options', [
  ('capacity', dict(router=routing.ExpertChoice(capacity=2.0), balance=(), capacity=1.0)),
  ('balance', dict(router=routing.ExpertChoice(capacity=2.0), balance=(routing.LossFreeBias(),))),
  ('balance', dict(balance=(routing.LoadBalance(), routing.LoadBalance(weight=0.1)))),
])
def test_parts_of_a_mixture_that_contradict_each_other_are_refused(field, options):
  assert [problem[0] for problem in spec.MoE(num_experts=4, hidden=8, **options).check()] == [field]
