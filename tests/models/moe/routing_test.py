"""Routers choose what their papers say; balancing terms mean what their docstrings say."""
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.errors import ConfigError
from efficient_lm.models.moe import routing

LOGITS_BTE = jnp.log(jnp.array([[[.1, .2, .3, .4], [.7, .1, .1, .1], [.2, .4, .3, .1]]]))
ROUTERS = [routing.SoftmaxTopK(top_k=2), routing.SoftmaxTopK(top_k=2, normalize=False), routing.SigmoidTopK(top_k=2),
           routing.SigmoidTopK(top_k=3, num_groups=4, top_groups=2, scale=2.5)]


def random_logits(num_experts=8, shape=(2, 16)):
  return jax.random.normal(jax.random.key(0), (*shape, num_experts))


def load(chosen, num_experts=8):
  rows_E = chosen.rows_by_expert(num_experts)
  return rows_E / jnp.mean(rows_E)


def loss_of(term, logits_BTE, probs_BTE, load_E):
  """A balancing term over tokens none of which is padding."""
  real_BT = jnp.ones(probs_BTE.shape[:2])
  return term.loss(term.sums(logits_BTE, probs_BTE, real_BT), load_E, real_BT.size)


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


def test_a_group_scores_as_its_two_best_experts():
  # The best single expert (0) is in a group that scores .9 + .1; the other group scores .6 + .6 and wins.
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


@st.composite
def far_logits(draw):
  """(2, 3, 8) float32: probabilities that underflow, sigmoids that are 0 or 1, ties, and logits that are neither."""
  spread, middle = draw(st.sampled_from([0, 1, 30, 1e3])), draw(st.sampled_from([0, -45, -90, -1e4, 1e4]))
  logits_BTE = middle + spread * np.random.default_rng(draw(st.integers(0, 99))).normal(size=(2, 3, 8))
  if draw(st.booleans()): logits_BTE[..., draw(st.integers(0, 7))] = draw(st.sampled_from([1e4, -1e4]))
  return logits_BTE.astype(np.float32)


# The biases of a layer that has not been trained, and such as choose the experts that are the least likely.
BIASES = st.sampled_from([np.zeros(8), np.arange(8.) * 10, -np.arange(8.) * 10, np.eye(8)[3]]).map(np.float32)
WEIGHT_BTA = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0, compiler_options={'xla_backend_optimization_level': 0})
def weighted_gates(router, logits_BTE, bias_E=None):
  """The routing, and the gradient of the sum of its gates with weights of their own."""
  def total(logits_BTE):
    chosen = router(logits_BTE, bias_E)
    return jnp.sum(chosen.gate_BTA * WEIGHT_BTA[..., :router.top_k]), chosen
  slope_BTE, chosen = jax.grad(total, has_aux=True)(logits_BTE)
  return chosen, slope_BTE


def exact_gates(router, logits_BTE, expert_BTA):
  """Gates of the chosen experts and the same gradient by their equations, in float64."""
  logits_BTE, w_BTA = logits_BTE.astype(np.float64), WEIGHT_BTA[..., :router.top_k]
  sigmoid = isinstance(router, routing.SigmoidTopK)
  log_score_BTE = -np.logaddexp(0, -logits_BTE) if sigmoid else logits_BTE
  score_slope_BTE = np.exp(-np.logaddexp(0, logits_BTE)) if sigmoid else np.ones_like(logits_BTE)
  take = lambda x_BTE: np.take_along_axis(x_BTE, expert_BTA, -1)
  soft = lambda x: (p := np.exp(x - x.max(-1, keepdims=True))) / p.sum(-1, keepdims=True)
  slope_BTE = np.zeros_like(logits_BTE)
  if getattr(router, 'normalize', True):
    gate_BTA = soft(take(log_score_BTE))
    slope_BTA = gate_BTA * (w_BTA - np.sum(gate_BTA * w_BTA, -1, keepdims=True))
    np.put_along_axis(slope_BTE, expert_BTA, slope_BTA, -1)
  else:
    probs_BTE = soft(log_score_BTE)
    gate_BTA = take(probs_BTE)
    np.put_along_axis(slope_BTE, expert_BTA, gate_BTA * w_BTA, -1)
    slope_BTE -= probs_BTE * np.sum(gate_BTA * w_BTA, -1, keepdims=True)
  scale = getattr(router, 'scale', 1.0)
  return gate_BTA * scale, slope_BTE * score_slope_BTE * scale


@pytest.mark.parametrize('router', ROUTERS, ids=str)
@settings(deadline=None, max_examples=40)
@given(far_logits(), st.none() | BIASES)
def test_gates_and_their_gradient_are_exact_however_far_apart_logits_are(router, logits_BTE, bias_E):
  """To the rounding of float32: of logarithms beside 1, and of exponentials of up to 8 of them."""
  chosen, slope_BTE = weighted_gates(router, logits_BTE, bias_E)
  gate_BTA, exact_slope_BTE = exact_gates(router, logits_BTE, chosen.expert_BTA)
  np.testing.assert_allclose(chosen.gate_BTA, gate_BTA, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(slope_BTE, exact_slope_BTE, rtol=1e-5, atol=3e-6)
  if not getattr(router, 'normalize', True): return
  np.testing.assert_allclose(jnp.sum(chosen.gate_BTA, -1), getattr(router, 'scale', 1.0), rtol=1e-6)


@pytest.mark.parametrize('router', ROUTERS, ids=str)
@settings(deadline=None, max_examples=20)
@given(far_logits())
def test_a_bias_of_zero_changes_no_choice_and_the_likeliest_are_chosen(router, logits_BTE):
  """Also where all probabilities are 0, or all sigmoids 1, in float32."""
  plain, biased = (weighted_gates(router, logits_BTE, bias_E)[0] for bias_E in (None, np.zeros(8, np.float32)))
  jax.tree.map(np.testing.assert_array_equal, plain, biased)
  left_BTE = np.where(plain.visits(8), -np.inf, logits_BTE)
  if getattr(router, 'num_groups', 1) > 1:
    sums = np.logaddexp.reduce(-np.logaddexp(0, -logits_BTE.astype(np.float64)).reshape(2, 3, 4, 2), -1)
    # Groups whose sums differ by a rounding may stand for each other.
    best = sums >= np.sort(sums, -1)[..., -2:-1] - 1e-4 * np.abs(sums).max()
    assert np.all(np.take_along_axis(best, np.asarray(plain.expert_BTA) // 2, -1))
    left_BTE = np.where(np.repeat(np.any(plain.visits(8).reshape(2, 3, 4, 2), -1), 2, -1), left_BTE, -np.inf)
  assert np.all(left_BTE.max(-1) <= np.take_along_axis(logits_BTE, np.asarray(plain.expert_BTA), -1).min(-1))


@pytest.mark.parametrize('router', [*ROUTERS, routing.ExpertChoice(capacity=2.0)], ids=str)
@settings(deadline=None, max_examples=20)
@given(far_logits())
def test_probabilities_are_those_of_their_equation_and_sum_to_one(router, logits_BTE):
  probs_BTE = router.probs(logits_BTE)
  log_score = logits_BTE.astype(np.float64)
  if isinstance(router, routing.SigmoidTopK): log_score = -np.logaddexp(0, -log_score)
  exact = np.exp(log_score - np.logaddexp.reduce(log_score, -1, keepdims=True))
  np.testing.assert_allclose(probs_BTE, exact, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(jnp.sum(probs_BTE, -1), 1, rtol=1e-6)


def test_experts_choose_their_best_tokens_of_each_sequence():
  chosen = routing.ExpertChoice(capacity=4 / 3)(LOGITS_BTE)   # ceil(4/3 * 3 tokens / 4 experts) = 1 token
  np.testing.assert_array_equal(chosen.token_BEC, [[[1], [2], [0], [0]]])
  np.testing.assert_allclose(chosen.gate_BEC, [[[.7], [.4], [.3], [.4]]], rtol=1e-6)


@pytest.mark.parametrize('capacity', [1.0, 1.7, 8.0])
def test_an_expert_accepts_its_share_of_the_tokens_that_are_not_padding(capacity):
  """What stands behind a text changes neither how many are chosen nor which."""
  logits_BTE, lengths_B = random_logits(), np.array([16, 5])
  padded = routing.ExpertChoice(capacity=capacity)(logits_BTE, None, np.arange(16) < lengths_B[:, None])
  for row, length in enumerate(lengths_B):
    alone = routing.ExpertChoice(capacity=capacity)(logits_BTE[row:row + 1, :length])
    np.testing.assert_array_equal(padded.visits(8)[row, :length], alone.visits(8)[0])
    np.testing.assert_array_equal(padded.dense_gates(8)[row, :length], alone.dense_gates(8)[0])
    assert not padded.visits(8)[row, length:].any()


def test_expert_choice_is_not_causal():
  logits_BTE = random_logits()
  router = routing.ExpertChoice(capacity=1.0)
  before = router(logits_BTE).visits(8)[:, 0]
  after = router(logits_BTE.at[:, 1:].add(-5 * jax.nn.one_hot(3, 8))).visits(8)[:, 0]
  assert jnp.any(before != after)


def test_capacity_is_causal_and_first_come_first_served():
  chosen = routing.SoftmaxTopK(top_k=1)(jnp.zeros((2, 5, 3)))   # ties: all tokens to expert 0
  np.testing.assert_array_equal(chosen.capped([2] * 6, 3).expert_BTA[..., 0], [[0, 0, 3, 3, 3]] * 2)
  chosen = routing.SoftmaxTopK(top_k=2)(random_logits())
  short = routing.SoftmaxTopK(top_k=2)(random_logits()[:, :9])
  np.testing.assert_array_equal(chosen.capped([3] * 17, 8).expert_BTA[:, :9], short.capped([3] * 17, 8).expert_BTA)


@pytest.mark.parametrize('top_k', [1, 2, 4, 8])
def test_balanced_routing_costs_exactly_the_weight(top_k):
  cyclic_TE = jnp.stack([jnp.roll(jnp.arange(8.0), shift) for shift in range(8)])
  probs_BTE = jnp.full((2, 8, 8), 1 / 8)
  load_E = load(routing.SoftmaxTopK(top_k=top_k)(jnp.stack([cyclic_TE, -cyclic_TE])))
  np.testing.assert_array_equal(load_E, 1)
  assert loss_of(routing.LoadBalance(weight=1.0), None, probs_BTE, load_E) == {'load_balance': 1}


def test_collapse_to_one_expert_costs_num_experts_times_the_weight():
  logits_BTE = jnp.zeros((2, 8, 4)).at[..., 1].set(100.0)
  router = routing.SoftmaxTopK(top_k=1)
  losses = loss_of(routing.LoadBalance(weight=.5), logits_BTE, router.probs(logits_BTE), load(router(logits_BTE), 4))
  assert losses == {'load_balance': 4 * .5}


def test_load_balance_pulls_probability_off_the_loaded_expert():
  logits_BTE = random_logits()
  router = routing.SoftmaxTopK(top_k=2)
  load_E = load(router(logits_BTE))
  loss = lambda logits: loss_of(routing.LoadBalance(), logits, router.probs(logits), load_E)['load_balance']
  gradient_E = jnp.sum(jax.grad(loss)(logits_BTE), (0, 1))
  assert gradient_E[jnp.argmax(load_E)] > 0 > gradient_E[jnp.argmin(load_E)]


def test_router_z_of_equal_logits():
  logits_BTE = jnp.full((2, 3, 4), 5.0)
  losses = loss_of(routing.RouterZ(weight=1.0), logits_BTE, logits_BTE, None)
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
  problems = list(value.check()) + list(value.check_experts(8) if hasattr(value, 'check_experts') else [])
  assert field in [problem[0] for problem in problems]


@pytest.mark.parametrize('value', [*ROUTERS, routing.ExpertChoice(capacity=2.0), routing.LoadBalance(),
                                   routing.RouterZ(), routing.LossFreeBias(), routing.Dispatch()], ids=str)
def test_defaults_have_no_problems(value):
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


@pytest.mark.parametrize('router', ROUTERS, ids=str)
def test_skipping_leaves_out_gates_below_a_part_of_the_largest_and_keeps_their_sum(router):
  logits = random_logits()
  plain, skipping = router(logits), routing.Skipping(inner=router, beta=0.85)(logits)
  gates, left = np.asarray(plain.gate_BTA), np.asarray(skipping.gate_BTA)
  skipped = gates < 0.85 * gates.max(-1, keepdims=True)
  assert skipped.any() and not skipped.all()
  np.testing.assert_array_equal(skipping.expert_BTA, np.where(skipped, 8, plain.expert_BTA))
  assert (left[skipped] == 0).all()
  np.testing.assert_allclose(left.sum(-1), gates.sum(-1), rtol=1e-5)
  np.testing.assert_allclose(left / left.max(-1, keepdims=True), np.where(skipped, 0, gates) / gates.max(-1, keepdims=True),
                             rtol=1e-5)
