"""Tokens do without experts whose gates are small beside their largest, and with none to skip nothing changes."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import tree
from efficient_lm.compression import importance
from efficient_lm.errors import IncompatibleError
from efficient_lm.models.moe.layer import MoE
from efficient_lm.models.moe.routing import ExpertChoice, Skipping, SoftmaxTopK
from efficient_lm.runs import structure
from efficient_lm.techniques.moe.skip_experts import SkipExperts
from efficient_lm.techniques.unroll import Unroll
from tests.compressing import Context, abstractly, assert_structure, batch_of, logits_of, model_of

pytestmark = pytest.mark.usefixtures('quick_compilation')


def mixture(): return model_of(mlp='experts')


def routes(model): return [one.route for _, one in tree.select(model, MoE)]


def test_half_of_the_tokens_skip_where_the_threshold_is_the_median():
  skipping, (note,) = SkipExperts(sequences=8)(mixture(), Context())
  (route,) = routes(skipping)
  assert route.inner == SoftmaxTopK(top_k=2) and 0 < route.beta < 1 and '25.0% of them on 128 tokens' in note
  ratios = importance.gate_ratios(mixture(), [batch_of()])['stacks/0/blocks/mlp']
  assert ratios.shape == (2 * 128, 1) and np.mean(ratios < route.beta) == pytest.approx(.5, abs=.01)
  assert not np.allclose(logits_of(skipping), logits_of(mixture()), atol=1e-3)


def test_a_threshold_of_zero_skips_nothing():
  skipping, (note,) = SkipExperts(beta=0.0, sequences=8)(mixture(), Context())
  np.testing.assert_array_equal(logits_of(skipping), logits_of(mixture()))
  assert '0.0% of them' in note


def test_a_threshold_of_one_is_the_first_expert_alone():
  skipping, _ = SkipExperts(beta=1.0, sequences=8)(mixture(), Context())
  def first(_, one):
    one = jax.tree.map(lambda leaf: leaf, one)
    one.route = SoftmaxTopK(top_k=1)
    return one
  np.testing.assert_allclose(logits_of(skipping), logits_of(tree.rewrite(mixture(), MoE, first)), atol=1e-4)


def test_each_layer_apart_has_its_own_threshold_and_it_is_stored():
  apart, _ = SkipExperts(sequences=8)(Unroll()(mixture(), Context())[0], Context())
  assert len({route.beta for route in routes(apart)}) == 2
  assert [one.route for _, one in tree.select(structure.rebuilt(structure.described(apart)), MoE)] == routes(apart)
  again, _ = SkipExperts(beta=.5, sequences=8)(apart, Context())
  assert all(route == Skipping(inner=SoftmaxTopK(top_k=2), beta=.5) for route in routes(again)), 'not one around the other'
  assert_structure(abstractly(SkipExperts(beta=.5), mixture()), SkipExperts(beta=.5, sequences=8)(mixture(), Context())[0])


def test_what_cannot_skip_is_one_line():
  with pytest.raises(IncompatibleError, match='no MoE on a path that matches'): abstractly(SkipExperts(), model_of())
  def choice(_, one):
    one = jax.tree.map(lambda leaf: leaf, one)
    one.route = ExpertChoice(capacity=2)
    return one
  with pytest.raises(IncompatibleError, match='mlp: its experts choose tokens'):
    abstractly(SkipExperts(), tree.rewrite(mixture(), MoE, choice))
  assert [name for name, _, _ in SkipExperts(beta=2., sequences=0, where='(').check()] == ['where', 'beta', 'sequences']
  assert [name for name, _, _ in Skipping(inner=ExpertChoice(capacity=1), beta=-1.).check()] == ['beta', 'inner']
  assert jnp.isfinite(logits_of(mixture())).all()
