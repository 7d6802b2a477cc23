"""The mixture layer on one device: its equalities with dense layers, its balancing and its metrics."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.models.moe.layer import LoadBias, tap

pytestmark = pytest.mark.usefixtures('quick_unless_long')

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
    y_BTD, statistics = moe(x_BTD)
    return jnp.sum(y_BTD), statistics.metrics()
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
  chosen = moe.route(moe.router.contract('BTD,DE->BTE', tokens()))
  rows_BE = jnp.sum(chosen.visits(8), 1)
  dropped = jnp.sum(jnp.maximum(rows_BE - 2, 0))
  statistics = forward(moe, tokens())[1]
  assert statistics.dropped == dropped > 0
  np.testing.assert_allclose(statistics.metrics()['dropped_share'], dropped / chosen.expert_R.size)


BALANCE = (routing.LoadBalance(), routing.RouterZ())
# Every way in which a token can find its experts.
KINDS = {
  'softmax': dict(balance=BALANCE),
  'sigmoid in groups, biased': dict(router=routing.SigmoidTopK(top_k=3, num_groups=4, top_groups=2), num_shared=1,
                                    balance=(*BALANCE, routing.LossFreeBias())),
  'capacity': dict(capacity=.75, balance=(*BALANCE, routing.LossFreeBias())),
  'experts choose': dict(router=routing.ExpertChoice(capacity=1.5), balance=BALANCE),
}
each_kind = pytest.mark.parametrize('kind', KINDS)


@functools.cache
def layer_of(kind):
  moe = build(**KINDS[kind])
  if moe.load_bias is not None: moe.load_bias.set_value(jnp.linspace(-.1, .1, 8))
  return moe


@jit
def slopes(moe, x_BTD, segments_BT=None):
  """y_BTD, the statistics, and the gradient of a loss of the tokens that are not padding plus the balancing losses."""
  real_BT = jnp.ones(x_BTD.shape[:2]) if segments_BT is None else segments_BT > 0
  def loss(moe):
    y_BTD, statistics = moe(x_BTD, segments_BT)
    return jnp.sum(jnp.sin(y_BTD) * real_BT[..., None]) + sum(statistics.losses().values()), (y_BTD, statistics)
  gradient, (y_BTD, statistics) = jax.grad(loss, has_aux=True)(moe)
  return y_BTD, statistics, gradient


@pytest.mark.thinned
@pytest.mark.parametrize('kind, length', [*((kind, 11) for kind in KINDS), ('capacity', 3)])
def test_padding_is_routed_nowhere_and_counts_for_nothing(kind, length):
  """Outputs, statistics (loads, balancing sums, entropy, rows dropped), steps of a load bias and gradients are those of the
  text alone, whatever stands in the padding. Sums are those of the same numbers, with zeros among them."""
  moe, x_BTD = layer_of(kind), tokens(length=16)
  segments_BT = np.broadcast_to(np.arange(16) < length, (4, 16)).astype(np.int32)
  y_BTD, statistics, gradient = slopes(moe, x_BTD[:, :length])
  padded, padded_statistics, padded_gradient = slopes(moe, x_BTD, segments_BT)
  np.testing.assert_allclose(padded[:, :length], y_BTD, atol=1e-5)
  for name in ('rows_E', 'num_tokens', 'dropped'):
    np.testing.assert_array_equal(getattr(padded_statistics, name), getattr(statistics, name), err_msg=name)
  if moe.load_bias is not None:
    np.testing.assert_array_equal(padded_gradient.load_bias.get_value(), gradient.load_bias.get_value())
  ours, wanted = (padded_statistics, padded_gradient), (statistics, gradient)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
  assert statistics.num_tokens == 4 * length and (statistics.dropped > 0) == (kind == 'capacity')


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 15), max_size=3, unique=True), st.integers(0, 99))
def test_a_document_of_a_packed_row_is_read_as_if_alone_though_experts_have_a_capacity(cuts, seed):
  """No other document of its row takes room from it: neither its tokens nor its length count."""
  moe, bounds = layer_of('capacity'), [0, *sorted(cuts), 16]
  segments_BT = np.repeat(np.arange(1, len(bounds)), np.diff(bounds))[None].repeat(4, 0)
  x_BTD = tokens(seed, length=16)
  packed, _, _ = slopes(moe, x_BTD, segments_BT)
  number = seed % (len(bounds) - 1)
  begin, end = bounds[number:number + 2]
  alone_BTD = jnp.roll(x_BTD, -begin, 1)
  alone, _, _ = slopes(moe, alone_BTD, np.broadcast_to(np.arange(16) < end - begin, (4, 16)).astype(np.int32))
  np.testing.assert_allclose(alone[:, :end - begin], packed[:, begin:end], atol=1e-5)


@each_kind
@pytest.mark.parametrize('logits', [[-45.] * 8, [-90.] * 8, [-1e4] * 8, [1e4, *[0.] * 7], [1e4, *[-1e4] * 7],
                                    [-10. ** i for i in range(-3, 5)]], ids=str)
def test_a_router_of_extreme_logits_has_finite_gates_losses_and_gradients(kind, logits):
  moe = jax.tree.map(jnp.copy, layer_of(kind))
  moe.router.array.set_value(moe.router.array.get_value().at[0].set(jnp.array(logits)))
  if moe.load_bias is not None: moe.load_bias.set_value(jnp.arange(8.))   # chooses experts of no probability
  found = slopes(moe, tokens().at[..., 0].set(1))
  assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(found))
  entropy = found[1].metrics()['router_entropy']
  assert 0 <= entropy <= np.log(8) * (1 + 1e-6)


def test_what_is_reported_for_the_log_only_has_no_gradient():
  """Of the entropy it would be infinite where a probability is 0."""
  moe = jax.tree.map(jnp.copy, layer_of('softmax'))
  moe.router.array.set_value(moe.router.array.get_value().at[0, 0].set(1e4))
  def reported(moe):
    found = moe(tokens())[1]
    return found.entropy + found.dropped + found.num_tokens + jnp.sum(found.rows_E)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(jit(jax.grad(reported))(moe)))


def test_router_computes_in_float32():
  moe = build()
  exact, half = forward(moe, tokens())[1], forward(moe, tokens().astype(jnp.bfloat16))
  assert half[0].dtype == jnp.bfloat16
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((exact, half[1])))
  np.testing.assert_allclose(exact.losses()['router_z'], half[1].losses()['router_z'], rtol=.02)


def test_metrics_of_a_collapsed_router():
  moe = build()
  moe.router.array.set_value(jnp.zeros((16, 8)).at[0, 5].set(50).at[0, 2].set(50))
  metrics = forward(moe, tokens().at[..., 0].set(1))[1].metrics()
  np.testing.assert_array_equal(metrics['load_E'], [0, 0, 4, 0, 0, 4, 0, 0])
  assert metrics['max_violation'] == 3 and metrics['dead_experts'] == 6 and metrics['dropped_share'] == 0
  np.testing.assert_allclose(metrics['router_entropy'], np.log(2), rtol=1e-5)


def test_terms_are_independent():
  losses = lambda *balance: set(forward(build(balance=balance), tokens())[1].losses())
  assert losses() == set() and losses(routing.RouterZ()) == {'router_z'}
  assert losses(routing.LoadBalance(), routing.LossFreeBias()) == {'load_balance'}
  assert build().load_bias is None


def test_tap_replaces_the_gradient():
  gradient = jax.grad(lambda bias, scale: jnp.sum(scale * tap(jnp.ones(3), bias, jnp.array([1., -2.]))))
  for scale in (0., 1., jnp.nan): np.testing.assert_array_equal(gradient(jnp.zeros(2), scale), [1, -2])


def test_gradient_of_the_load_bias_is_the_load_violation():
  moe = build(balance=(routing.LossFreeBias(rate=.25),))
  gradients, metrics = jit(gradient_of_sum)(moe, tokens())
  # Times E, and times the mean of 4 * 16 * 2 rows over 8 experts.
  np.testing.assert_array_equal(gradients.load_bias.get_value(), 8 * 16 * (metrics['load_E'] - 1))
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
      return jnp.mean(outputs.logits_BTV ** 2) + jnp.sum(outputs.aux[0].losses()['load_balance']), outputs.aux[0]
    return jax.grad(loss, has_aux=True)(model)

  gradient, statistics = gradients(model)
  layer = gradient.stacks[0].blocks.mlp
  assert statistics.losses()['load_balance'].shape == (3,) and statistics.load_E.shape == (3, 8)
  np.testing.assert_array_equal(layer.load_bias.get_value(), 8 * 4 * (statistics.load_E - 1))
  assert layer.load_bias.get_metadata()['rate'] == .5
  assert jnp.all(jnp.any(layer.router.array.get_value() != 0, (1, 2)))


def test_a_module_does_not_change_with_its_config():
  config = spec.MoE(num_experts=8, hidden=32, router=routing.SoftmaxTopK(top_k=2))
  moe = config.build(SITE, rngs=nnx.Rngs(params=0))
  config.router.top_k = 4
  assert moe.active_experts == 2
