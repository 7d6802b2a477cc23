"""Routers choose what their papers say; balancing terms mean what their docstrings say."""
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.models.moe import routing

LOGITS_BTE = jnp.log(jnp.array([[[.1, .2, .3, .4], [.7, .1, .1, .1], [.2, .4, .3, .1]]]))
ROUTERS = [routing.SoftmaxTopK(top_k=2), routing.SoftmaxTopK(top_k=2, normalize=False), routing.SigmoidTopK(top_k=2),
           routing.SigmoidTopK(top_k=3, num_groups=4, top_groups=2, scale=2.5)]


def random_logits(num_experts=8, shape=(2, 16)):
  return jax.random.normal(jax.random.key(0), (*shape, num_experts))


def test_softmax_takes_the_largest_and_renormalises():
  chosen = routing.SoftmaxTopK(top_k=2)(LOGITS_BTE)
  np.testing.assert_array_equal(chosen.expert_BTA, [[[3, 2], [0, 1], [1, 2]]])
  np.testing.assert_allclose(chosen.gate_BTA, [[[4 / 7, 3 / 7], [7 / 8, 1 / 8], [4 / 7, 3 / 7]]], rtol=1e-6)


def test_softmax_without_normalisation_gives_the_probabilities():
  chosen = routing.SoftmaxTopK(top_k=2, normalize=False)(LOGITS_BTE)
  np.testing.assert_allclose(chosen.gate_BTA, [[[.4, .3], [.7, .1], [.4, .3]]], rtol=1e-6)


def test_sigmoid_gates_sum_to_the_scale():
  chosen = routing.SigmoidTopK(top_k=3, scale=2.5)(random_logits())
  np.testing.assert_allclose(jnp.sum(chosen.gate_BTA, -1), 2.5, rtol=1e-6)


def test_a_group_is_worth_its_two_best_experts():
  # The best single expert (0) sits in a group worth .9 + .1; the other group is worth .6 + .6 and wins.
  score = jnp.array([.9, .1, .1, .6, .6, .1])
  chosen = routing.SigmoidTopK(top_k=2, num_groups=2, top_groups=1)(jnp.log(score / (1 - score))[None, None])
  np.testing.assert_array_equal(jnp.sort(chosen.expert_BTA[0, 0]), [3, 4])


def test_a_token_stays_within_its_groups():
  chosen = routing.SigmoidTopK(top_k=4, num_groups=4, top_groups=2)(random_logits(), -2.0 * jnp.ones(8))
  groups = np.asarray(chosen.expert_BTA // 2).reshape(-1, 4)
  assert all(len(set(row)) == 2 for row in groups)


@pytest.mark.parametrize('router', ROUTERS, ids=str)
def test_bias_moves_the_choice_and_not_the_gates(router):
  logits_BTE = random_logits()
  plain, same = router(logits_BTE), router(logits_BTE, jnp.full(8, 3.0))
  np.testing.assert_array_equal(plain.expert_BTA, same.expert_BTA)
  np.testing.assert_array_equal(plain.gate_BTA, same.gate_BTA)
  bias_E = jnp.zeros(8).at[5].set(10.0)
  biased = router(logits_BTE, bias_E)
  assert jnp.all(jnp.any(biased.expert_BTA == 5, -1))
  assert not jnp.any(jax.grad(lambda bias_E: jnp.sum(router(logits_BTE, bias_E).gate_BTA ** 2))(bias_E))


@pytest.mark.parametrize('router', ROUTERS, ids=str)
def test_a_token_visits_different_experts(router):
  expert_BTA = np.sort(np.asarray(router(random_logits()).expert_BTA), -1)
  assert np.all(np.diff(expert_BTA, axis=-1) > 0)


@pytest.mark.parametrize('router', [*ROUTERS, routing.ExpertChoice(capacity=2.0)], ids=str)
def test_probabilities_sum_to_one(router):
  np.testing.assert_allclose(jnp.sum(router.probs(random_logits()), -1), 1, rtol=1e-6)


def test_experts_choose_their_best_tokens_of_each_sequence():
  chosen = routing.ExpertChoice(capacity=4 / 3)(LOGITS_BTE)   # ceil(4/3 * 3 tokens / 4 experts) = 1 token
  np.testing.assert_array_equal(chosen.token_BEC, [[[1], [2], [0], [0]]])
  np.testing.assert_allclose(chosen.gate_BEC, [[[.7], [.4], [.3], [.4]]], rtol=1e-6)


def test_expert_choice_is_not_causal():
  logits_BTE = random_logits()
  router = routing.ExpertChoice(capacity=1.0)
  before = router(logits_BTE).visits(8)[:, 0]
  after = router(logits_BTE.at[:, 1:].add(-5 * jax.nn.one_hot(3, 8))).visits(8)[:, 0]
  assert jnp.any(before != after)


def test_capacity_is_causal_and_first_come_first_served():
  chosen = routing.SoftmaxTopK(top_k=1)(jnp.zeros((2, 5, 3)))   # ties: all tokens to expert 0
  np.testing.assert_array_equal(chosen.capped(2, 3).expert_BTA[..., 0], [[0, 0, 3, 3, 3]] * 2)
  chosen = routing.SoftmaxTopK(top_k=2)(random_logits())
  short = routing.SoftmaxTopK(top_k=2)(random_logits()[:, :9])
  np.testing.assert_array_equal(chosen.capped(3, 8).expert_BTA[:, :9], short.capped(3, 8).expert_BTA)


@pytest.mark.parametrize('top_k', [1, 2, 4, 8])
def test_balanced_routing_costs_exactly_the_weight(top_k):
  cyclic_TE = jnp.stack([jnp.roll(jnp.arange(8.0), shift) for shift in range(8)])
  probs_BTE = jnp.full((2, 8, 8), 1 / 8)
  load_E = routing.SoftmaxTopK(top_k=top_k)(jnp.stack([cyclic_TE, -cyclic_TE])).load(8)
  np.testing.assert_array_equal(load_E, 1)
  assert routing.LoadBalance(weight=1.0)(None, probs_BTE, load_E) == {'load_balance': 1}


def test_collapse_to_one_expert_costs_num_experts_times_the_weight():
  logits_BTE = jnp.zeros((2, 8, 4)).at[..., 1].set(100.0)
  router = routing.SoftmaxTopK(top_k=1)
  losses = routing.LoadBalance(weight=.5)(logits_BTE, router.probs(logits_BTE), router(logits_BTE).load(4))
  assert losses == {'load_balance': 4 * .5}


def test_load_balance_pulls_probability_off_the_loaded_expert():
  logits_BTE = random_logits()
  router = routing.SoftmaxTopK(top_k=2)
  load_E = router(logits_BTE).load(8)
  loss = lambda logits: routing.LoadBalance()(logits, router.probs(logits), load_E)['load_balance']
  gradient_E = jnp.sum(jax.grad(loss)(logits_BTE), (0, 1))
  assert gradient_E[jnp.argmax(load_E)] > 0 > gradient_E[jnp.argmin(load_E)]


def test_router_z_of_equal_logits():
  losses = routing.RouterZ(weight=1.0)(jnp.full((2, 3, 4), 5.0), None, None)
  np.testing.assert_allclose(losses['router_z'], (5 + np.log(4)) ** 2, rtol=1e-6)


@pytest.mark.parametrize('value, field', [
  (routing.SoftmaxTopK(top_k=0), 'top_k'), (routing.SoftmaxTopK(top_k=9), 'top_k'),
  (routing.SigmoidTopK(top_k=2, num_groups=3), 'num_groups'), (routing.SigmoidTopK(top_k=2, top_groups=2), 'top_groups'),
  (routing.SigmoidTopK(top_k=5, num_groups=2), 'top_groups'), (routing.SigmoidTopK(top_k=2, scale=0.0), 'scale'),
  (routing.ExpertChoice(capacity=0.0), 'capacity'), (routing.ExpertChoice(capacity=9.0), 'capacity'),
  (routing.LoadBalance(weight=-1.0), 'weight'), (routing.RouterZ(weight=-1.0), 'weight'),
  (routing.LossFreeBias(rate=0.0), 'rate'), (routing.Dispatch(transport='rdma'), 'transport'),
  (routing.Dispatch(buffer=0.0), 'buffer'),
], ids=str)
def test_checks_name_the_field(value, field):
  complaints = list(value.check()) + list(value.check_experts(8) if hasattr(value, 'check_experts') else [])
  assert field in [complaint[0] for complaint in complaints]


@pytest.mark.parametrize('value', [*ROUTERS, routing.ExpertChoice(capacity=2.0), routing.LoadBalance(),
                                   routing.RouterZ(), routing.LossFreeBias(), routing.Dispatch()], ids=str)
def test_defaults_have_no_complaints(value):
  assert not list(value.check()) + list(value.check_experts(8) if hasattr(value, 'check_experts') else [])


@pytest.mark.parametrize('transport, platform, shards, active, resolved', [
  ('auto', 'cpu', 1, 2, 'local'), ('auto', 'tpu', 1, 2, 'local'), ('auto', 'cpu', 8, 2, 'gather'),
  ('auto', 'tpu', 4, 8, 'gather'), ('auto', 'tpu', 8, 8, 'ragged'), ('auto', 'gpu', 8, 2, 'ragged'),
  ('a2a', 'cpu', 8, 2, 'a2a'), ('gather', 'tpu', 8, 2, 'gather'), ('ragged', 'gpu', 2, 8, 'ragged'),
])
def test_transport(transport, platform, shards, active, resolved):
  assert routing.Dispatch(transport=transport).resolve(platform, shards, active) == resolved


@pytest.mark.parametrize('shards', [1, 8])
def test_a_transport_that_the_platform_lacks_is_refused(shards):
  with pytest.raises(ConfigError, match="'ragged': does not exist on cpu"):
    routing.Dispatch(transport='ragged').resolve('cpu', shards, 2)


def test_a_config_is_read_without_jax():
  code = 'import sys, efficient_lm.models.moe.routing, efficient_lm.config.mesh; assert "jax" not in sys.modules'
  subprocess.run([sys.executable, '-c', code], check=True)
