"""The mixture layer on one device: its equalities with dense layers, its balancing and its metrics."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.models.moe.layer import LoadBias, tap

SITE = spec.Site(dim=16, depth=2, norm_eps=1e-6)
TOP2 = routing.SoftmaxTopK(top_k=2)


def build(num_experts=8, hidden=32, **fields):
  return spec.MoE(num_experts=num_experts, hidden=hidden, **fields).build(SITE, rngs=nnx.Rngs(params=0))


def tokens(seed=1, batch=4, length=16):
  return jax.random.normal(jax.random.key(seed), (batch, length, SITE.dim))


# Optimising these small programs takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
forward = jit(lambda moe, x_BTD: moe(x_BTD))


def gradient_of_sum(moe, x_BTD):
  """Gradient of sum(y) with respect to the layer, and the layer's metrics."""
  def loss(moe):
    y_BTD, aux = moe(x_BTD)
    return jnp.sum(y_BTD), aux['metrics']
  return jax.grad(loss, has_aux=True)(moe)


def test_one_expert_is_the_feed_forward_layer():
  moe = build(num_experts=1, router=routing.SoftmaxTopK(top_k=1))
  dense = spec.SwiGLU(hidden=32).build(SITE, rngs=nnx.Rngs(params=0))
  for name in ('gate', 'up', 'down'):
    getattr(dense, name).array.set_value(getattr(moe.experts, name).array.get_value()[0])
  np.testing.assert_array_equal(forward(moe, tokens())[0], forward(dense, tokens())[0])


def test_equal_experts_are_one_dense_layer():
  moe = build(router=routing.SoftmaxTopK(top_k=3))
  dense = spec.SwiGLU(hidden=32).build(SITE, rngs=nnx.Rngs(params=0))
  for name in ('gate', 'up', 'down'):
    weight = getattr(dense, name).array.get_value()
    getattr(moe.experts, name).array.set_value(jnp.broadcast_to(weight, (8, *weight.shape)))
  np.testing.assert_allclose(forward(moe, tokens())[0], forward(dense, tokens())[0], atol=1e-6)


@pytest.mark.parametrize('fields', [
  {}, dict(router=routing.SoftmaxTopK(top_k=2, normalize=False)), dict(capacity=.75), dict(num_shared=2),
  dict(router=routing.SigmoidTopK(top_k=3, num_groups=4, top_groups=2, scale=2.5), balance=(routing.LossFreeBias(),)),
  dict(router=routing.ExpertChoice(capacity=2.0)),
], ids=str)
def test_equals_every_expert_on_every_token(fields):
  moe = build(**fields)
  np.testing.assert_allclose(forward(moe, tokens())[0], jit(lambda moe, x_BTD: moe.oracle(x_BTD))(moe, tokens()), atol=1e-6)


def test_a_large_capacity_is_dropless_bit_for_bit():
  dropless, large = forward(build(), tokens()), forward(build(capacity=8.0), tokens())
  jax.tree.map(np.testing.assert_array_equal, dropless, large)


def test_capacity_reports_what_it_drops():
  moe = build(capacity=.5)   # ceil(.5 * 16 tokens * 2 / 8 experts) = 2 rows
  chosen, kept = moe._routing(moe.router.contract('BTD,DE->BTE', tokens()))
  rows_BE = jnp.sum(chosen.visits(8), 1)
  dropped = jnp.sum(jnp.maximum(rows_BE - 2, 0))
  assert jnp.sum(kept.expert_BTA == 8) == dropped > 0
  np.testing.assert_allclose(forward(moe, tokens())[1]['metrics']['dropped_share'], dropped / chosen.expert_R.size)


def test_router_computes_in_float32():
  moe = build()
  exact, half = forward(moe, tokens())[1], forward(moe, tokens().astype(jnp.bfloat16))
  assert half[0].dtype == jnp.bfloat16
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((exact, half[1])))
  np.testing.assert_allclose(exact['losses']['router_z'], half[1]['losses']['router_z'], rtol=.02)


def test_metrics_of_a_collapsed_router():
  moe = build()
  moe.router.array.set_value(jnp.zeros((16, 8)).at[0, 5].set(50).at[0, 2].set(50))
  metrics = forward(moe, tokens().at[..., 0].set(1))[1]['metrics']
  np.testing.assert_array_equal(metrics['load_E'], [0, 0, 4, 0, 0, 4, 0, 0])
  assert metrics['max_violation'] == 3 and metrics['dead_experts'] == 6 and metrics['dropped_share'] == 0
  np.testing.assert_allclose(metrics['router_entropy'], np.log(2), rtol=1e-5)


def test_terms_are_independent():
  losses = lambda *balance: set(forward(build(balance=balance), tokens())[1]['losses'])
  assert losses() == set() and losses(routing.RouterZ()) == {'router_z'}
  assert losses(routing.LoadBalance(), routing.LossFreeBias()) == {'load_balance'}
  assert build().load_bias is None


def test_tap_replaces_the_gradient():
  gradient = jax.grad(lambda bias, scale: jnp.sum(scale * tap(jnp.ones(3), bias, jnp.array([1., -2.]))))
  for scale in (0., 1., jnp.nan): np.testing.assert_array_equal(gradient(jnp.zeros(2), scale), [1, -2])


def test_gradient_of_the_load_bias_is_the_load_violation():
  moe = build(balance=(routing.LossFreeBias(rate=.25),))
  gradients, metrics = jit(gradient_of_sum)(moe, tokens())
  np.testing.assert_array_equal(gradients.load_bias.get_value(), metrics['load_E'] - 1)
  assert isinstance(gradients.load_bias, LoadBias) and gradients.load_bias.get_metadata()['rate'] == .25


def test_loss_free_bias_balances_a_skewed_router():
  moe = build(balance=(routing.LossFreeBias(rate=.02),))
  moe.router.array.set_value(moe.router.array.get_value() + 1.5 * jnp.eye(16, 8)[0][None, :] * jnp.eye(16)[:, :1])
  x_BTD = tokens().at[..., 0].set(2)

  @jit
  def step(moe):
    gradients, metrics = gradient_of_sum(moe, x_BTD)
    bias = moe.load_bias.get_value() - .02 * jnp.sign(gradients.load_bias.get_value())
    return bias, metrics['max_violation']

  violations = []
  for _ in range(60):
    bias_E, violation = step(moe)
    moe.load_bias.set_value(bias_E)
    violations.append(float(violation))
  assert violations[0] > 2.5 and max(violations[-5:]) < violations[0] / 4


def test_inside_a_transformer_with_scan_and_remat():
  attention = spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8)
  mlp = spec.MoE(num_experts=8, hidden=32, router=TOP2, balance=(routing.LoadBalance(), routing.LossFreeBias(rate=.5)))
  stack = spec.Stack(num_layers=3, attention=attention, mlp=mlp, remat='full')
  config = spec.Transformer(vocab_size=32, dim=16, stacks=(stack,))
  model = jit(lambda: config.build(rngs=nnx.Rngs(params=0)))()
  tokens_BT = jax.random.randint(jax.random.key(1), (2, 8), 0, 32)

  @jit
  def gradients(model):
    def loss(model):
      outputs = model(tokens_BT)
      return jnp.mean(outputs.logits_BTV ** 2) + jnp.sum(outputs.aux[0]['losses']['load_balance']), outputs.aux[0]
    return jax.grad(loss, has_aux=True)(model)

  gradient, aux = gradients(model)
  layer = gradient.stacks[0].blocks.mlp
  assert aux['losses']['load_balance'].shape == (3,) and aux['metrics']['load_E'].shape == (3, 8)
  np.testing.assert_array_equal(layer.load_bias.get_value(), aux['metrics']['load_E'] - 1)
  assert layer.load_bias.get_metadata()['rate'] == .5
  assert jnp.all(jnp.any(layer.router.array.get_value() != 0, (1, 2)))


def test_a_module_does_not_change_with_its_config():
  config = spec.MoE(num_experts=8, hidden=32, router=routing.SoftmaxTopK(top_k=2))
  moe = config.build(SITE, rngs=nnx.Rngs(params=0))
  config.router.top_k = 4
  assert moe.active_experts == 2
