"""Shares of parameters and FLOPs agree with counts by hand, and large weights left out are named."""
import jax
import pytest
from flax import nnx

from efficient_lm.compression.coverage import LARGE, active_share, coverage
from efficient_lm.formats import Int
from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.tree import rewrite
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Weight

V, D, F, H, E, A = 32, 16, 24, 4, 4, 1
ATTENTION, MLP, EXPERT = 2 * D * 2 * H + 2 * D * H, 3 * D * F, 3 * D * 8


def abstract(mlp=None, **changes):
  stack = spec.Stack(num_layers=2, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=H),
                     mlp=mlp or spec.SwiGLU(hidden=F))
  described = spec.Transformer(**{**dict(vocab_size=V, dim=D, stacks=(stack,)), **changes})
  return jax.eval_shape(lambda: described.build(rngs=nnx.Rngs(0)))


def mixture():
  return spec.MoE(num_experts=E, hidden=8, router=routing.SoftmaxTopK(top_k=A))


def test_shares_by_hand():
  found = coverage(abstract(), 'mlp/')
  assert found.parameters == pytest.approx(2 * MLP / (2 * V * D + D + 2 * (ATTENTION + MLP + 2 * D)))
  assert found.flops == pytest.approx(2 * MLP / (V * D + 2 * (ATTENTION + MLP)))


def test_everything_selected_is_all_flops_and_all_parameters_but_norms():
  found = coverage(abstract(), '')
  assert found.flops == 1 and found.left == ()
  assert 1 - found.parameters == pytest.approx(5 * D / (2 * V * D + D + 2 * (ATTENTION + MLP + 2 * D)))


def test_nothing_selected_is_nothing():
  found = coverage(abstract(), 'nowhere')
  assert (found.parameters, found.flops) == (0, 0)


def test_an_embedding_costs_a_product_only_where_it_is_the_head_too():
  assert coverage(abstract(), '^embed').flops == 0
  assert coverage(abstract(tied=True), '^embed').flops == pytest.approx(V * D / (V * D + 2 * (ATTENTION + MLP)))


def test_of_the_experts_a_token_pays_for_those_it_visits():
  found, model = coverage(abstract(mixture()), 'experts/'), abstract(mixture())
  active = 2 * A * EXPERT
  assert found.flops == pytest.approx(active / (V * D + 2 * (ATTENTION + D * E) + active))
  assert active_share(model, 'stacks/0/blocks/mlp/experts/up') == A / E
  assert active_share(model, 'stacks/0/blocks/mlp/router') == 1


def test_large_weights_left_out_are_named_and_small_ones_are_not():
  model = abstract(mixture(), vocab_size=512)
  assert 2 * D * E < LARGE * 2 * 512 * D, 'the routers are less than a hundredth of this model'
  assert coverage(model, r'stacks/.*/(query|key|value|output|gate|up|down)$').left == ('embed', 'own_head')
  assert 'stacks/0/blocks/mlp/experts/up' in coverage(model, 'attention/').left


def test_the_line_for_the_report_says_who_how_much_and_what_is_left():
  line = coverage(abstract(), 'stacks/').describe('Rounding')
  assert line.startswith('Rounding reaches ') and line.endswith('left as they are: embed, own_head')
  assert 'left' not in coverage(abstract(), '').describe('Rounding')


def test_it_counts_wrapped_weights_as_it_counts_plain_ones():
  rounded = lambda _, weight: FakeQuantized(weight, Rounding(Int(bits=4)))
  wrapped = jax.eval_shape(lambda model: rewrite(model, Weight, rounded), abstract(mixture()))
  assert coverage(wrapped, 'mlp/') == coverage(abstract(mixture()), 'mlp/')
