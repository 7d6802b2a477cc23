"""Every transport on every mesh is the dense oracle: outputs, gradients, what is dropped and what is refused."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from efficient_lm import axes
from efficient_lm.errors import ConfigError
from efficient_lm.formats import Int
from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.models.moe.dispatch import dispatch_experts
from efficient_lm.models.moe.rows import TokenChoice
from efficient_lm.models.transformer import REMAT_POLICIES
from efficient_lm.parallel import sharding
from efficient_lm.tree import rewrite
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Weight

MESHES = [(1, 1, 8, 1), (1, 1, 4, 2), (1, 2, 4, 1), (2, 1, 2, 2), (2, 2, 2, 1), (1, 2, 2, 2)]
ANYWHERE = ['gather', 'a2a', 'ragged_emulated']
SITE = spec.Site(dim=16, depth=2, norm_eps=1e-6)
# Optimising these small programs takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def build(transport='auto', buffer=None, **fields):
  dispatch = routing.Dispatch(transport=transport, buffer=buffer)
  return spec.MoE(num_experts=8, hidden=32, dispatch=dispatch, **fields).build(SITE, rngs=nnx.Rngs(params=0))


def tokens(seed=1, batch=8, length=8):
  return jax.random.normal(jax.random.key(seed), (batch, length, SITE.dim))


def skewed(moe, x_BTD):
  """The same layer and tokens, every token now going to experts 5 and 2."""
  router_DE = moe.router.array.get_value()
  moe = jax.tree.map(jnp.copy, moe)
  moe.router.array.set_value(router_DE.at[0].set(0).at[0, 5].set(20).at[0, 2].set(10))
  return moe, x_BTD.at[..., 0].set(1)


def value_and_grads(moe, x_BTD, oracle: bool):
  """(y, dropped share), gradients of a random linear function of y with respect to layer and tokens."""
  def loss(moe, x_BTD):
    y_BTD, statistics = (moe.oracle(x_BTD), None) if oracle else moe(x_BTD)
    dropped_share = 0. if oracle else statistics.metrics()['dropped_share']
    return jnp.vdot(y_BTD, tokens(2)[:x_BTD.shape[0], :x_BTD.shape[1]]), (y_BTD, dropped_share)
  (_, out), (moe_gradient, x_gradient) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(moe, x_BTD)
  # The 'gradient' of a selection bias is the load violation, which the oracle does not compute.
  if moe_gradient.load_bias is not None: moe_gradient.load_bias.set_value(jnp.zeros(8))
  return out, (moe_gradient, x_gradient)


def sharded(moe, mesh):
  return jax.device_put(moe, sharding.shardings(moe, mesh))


def assert_close(ours, oracle, output=1e-5, gradient=1e-4):
  ((y, _), gradients), ((y_oracle, _), oracle_gradients) = jax.device_get((ours, oracle))
  np.testing.assert_allclose(y, y_oracle, atol=output)
  for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(oracle_gradients), strict=True):
    np.testing.assert_allclose(a, b, atol=gradient * max(np.abs(b).max(), 1e-3))


def cases(moe):
  return [(moe, tokens()), skewed(moe, tokens())]


@functools.cache
def oracle_of_the_default():
  run = jit(functools.partial(value_and_grads, oracle=True))
  return [run(*case) for case in cases(build())]


@pytest.mark.thinned
@pytest.mark.parametrize('sizes, transport', [*itertools.product(MESHES, ANYWHERE), ((8, 1, 1, 1), 'auto')], ids=str)
def test_equals_the_dense_oracle(mesh, sizes, transport):
  run = jit(functools.partial(value_and_grads, oracle=False))
  for (moe, x_BTD), oracle in zip(cases(build(transport)), oracle_of_the_default(), strict=True):
    with mesh(*sizes): ours = run(sharded(moe, jax.sharding.get_mesh()), x_BTD)
    assert_close(ours, oracle)
    assert ours[0][1] == 0


def quantized(moe):
  rounded = lambda _, weight: FakeQuantized(weight, Rounding(Int(bits=4)), Rounding(Int(bits=8)))
  return rewrite(moe, Weight, rounded, where='experts')


SIGMOID = routing.SigmoidTopK(top_k=3, num_groups=4, top_groups=2, scale=2.5)
VARIANTS = {
  'shared, sigmoid in groups, loss-free bias': (dict(
    num_shared=1, router=SIGMOID, balance=(routing.LossFreeBias(),)), lambda moe: moe),
  'experts choose': (dict(router=routing.ExpertChoice(capacity=2.0)), lambda moe: moe),
  'capacity': (dict(capacity=.5), lambda moe: moe),
  'quantized': ({}, quantized),
}


@functools.cache
def oracle_of(variant):
  """What the oracle gives, and what the layer on one device says that it dropped."""
  fields, change = VARIANTS[variant]
  moe = change(build(**fields))
  return (jit(functools.partial(value_and_grads, oracle=True))(moe, tokens()),
          jit(lambda moe, x_BTD: moe(x_BTD)[1].metrics()['dropped_share'])(moe, tokens()))


@pytest.mark.thinned
@pytest.mark.parametrize('sizes, transport', [((1, 2, 2, 2), 'gather'), ((1, 1, 4, 2), 'a2a'),
                                              ((2, 1, 2, 2), 'ragged_emulated')], ids=str)
@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant_equals_its_oracle(mesh, variant, sizes, transport):
  fields, change = VARIANTS[variant]
  moe, (oracle, dropped) = change(build(transport, **fields)), oracle_of(variant)
  with mesh(*sizes):
    ours = jit(functools.partial(value_and_grads, oracle=False))(sharded(moe, jax.sharding.get_mesh()), tokens())
  assert_close(ours, oracle)
  np.testing.assert_allclose(ours[0][1], dropped, rtol=1e-6)
  assert (dropped > 0) == (variant == 'capacity')


def identity(x_MD, sizes_E):
  return jnp.where(jnp.arange(x_MD.shape[0])[:, None] < jnp.sum(sizes_E), x_MD, 0)


@jax.tree_util.register_static
class Identity:
  """Experts that return what they are given."""

  def __call__(self, x_MD, sizes_E):
    return identity(x_MD, sizes_E)


def random_choice(batch=8, length=8, top_k=2):
  expert_BTA = jax.lax.top_k(jax.random.normal(jax.random.key(3), (batch, length, 8)), top_k)[1]
  return TokenChoice(expert_BTA, jnp.full(expert_BTA.shape, 1 / top_k))


def exchange(x_BTD, chosen, **dispatch):
  return dispatch_experts(Identity(), x_BTD, chosen, routing.Dispatch(**dispatch), 8)


def run(x_BTD, chosen, **dispatch):
  return jit(functools.partial(exchange, **dispatch))(x_BTD, chosen)


@pytest.mark.parametrize('transport', ANYWHERE)
def test_combine_after_dispatch_is_the_identity(mesh, transport):
  x_BTD = jnp.round(8 * tokens())   # small integers and gates of a half: sums are exact
  chosen = random_choice()
  with mesh(1, 2, 4, 1): y_BTD, dropped = run(x_BTD, chosen, transport=transport)
  np.testing.assert_array_equal(y_BTD, x_BTD)
  assert dropped == 0


@pytest.mark.thinned
@pytest.mark.parametrize('buffer', [.5, 1.0, 1.25])
@pytest.mark.parametrize('transport', ANYWHERE)
def test_a_full_buffer_drops_what_it_reports(mesh, transport, buffer):
  skew = random_choice()
  skew = TokenChoice(jnp.where(skew.expert_BTA == 7, 0, skew.expert_BTA), jnp.ones(skew.gate_BTA.shape))
  x_BTD = jnp.ones((8, 8, 1))
  with mesh(1, 1, 4, 2): y_BTD, dropped = run(x_BTD, skew, transport=transport, buffer=buffer)
  np.testing.assert_array_equal(y_BTD, jnp.round(y_BTD))   # a row arrives whole or not at all
  assert dropped == skew.expert_R.size - jnp.sum(y_BTD) > 0
  if buffer == .5: assert dropped >= skew.expert_R.size / 2


@pytest.mark.parametrize('transport', ANYWHERE)
def test_a_large_buffer_is_the_dropless_one(mesh, transport):
  x_BTD, chosen = tokens(), random_choice()
  with mesh(1, 1, 8, 1):
    dropless, large = (run(x_BTD, chosen, transport=transport, buffer=buffer) for buffer in (None, 100.0))
  np.testing.assert_array_equal(dropless[0], large[0])
  assert dropless[1] == large[1] == 0


@pytest.mark.parametrize('transport', ANYWHERE)
def test_a_dropped_row_has_no_gradient(mesh, transport):
  """With unit gates the gradient of sum(y) counts the rows that a token kept, as y does for tokens of one."""
  chosen = random_choice()
  chosen = TokenChoice(chosen.expert_BTA // 4, jnp.ones(chosen.gate_BTA.shape))
  x_BTD = jnp.ones((8, 8, 1))
  total = lambda x_BTD: jnp.sum(exchange(x_BTD, chosen, transport=transport, buffer=.75)[0])
  with mesh(1, 1, 4, 2):
    y_BTD, dropped = run(x_BTD, chosen, transport=transport, buffer=.75)
    gradient_BTD = jit(jax.grad(total))(x_BTD)
  np.testing.assert_array_equal(gradient_BTD, y_BTD)
  assert dropped > 0


def test_ragged_on_cpu_is_refused(mesh):
  moe, x_BTD = build('ragged'), tokens()
  with pytest.raises(ConfigError, match="'ragged': does not exist on cpu"): jax.eval_shape(moe, x_BTD)
  for sizes in [(8, 1, 1, 1), (1, 1, 8, 1)]:
    with mesh(*sizes), pytest.raises(ConfigError, match="'ragged': does not exist on cpu"): jax.eval_shape(moe, x_BTD)


@pytest.mark.parametrize('sizes, batch, num_experts, message', [
  ((1, 1, 8, 1), 6, 8, 'batch = 6: must be a multiple of .* = 8'),
  ((2, 1, 4, 1), 8, 6, 'num_experts = 6: must be a multiple of expert = 4')])
def test_sizes_that_do_not_divide_are_refused(mesh, sizes, batch, num_experts, message):
  x_BTD, chosen = tokens(batch=batch), random_choice(batch=batch)
  with mesh(*sizes), pytest.raises(ConfigError, match=message):
    dispatch_experts(Identity(), x_BTD, chosen, routing.Dispatch(), num_experts)


@pytest.mark.parametrize('transport', ['ragged', 'auto'])
def test_ragged_lowers_for_tpu(transport):
  """Not run, but lowered, forward and backward: on a TPU whose expert axis is as long as top_k, 'auto' is 'ragged'."""
  device = AbstractDevice(device_kind='TPU v5', num_cores=1, platform='tpu')
  mesh = AbstractMesh((1, 2, 4, 1), axes.MESH, (AxisType.Auto,) * 4, abstract_device=device)
  moe, x_BTD = build(transport), tokens()
  with jax.sharding.use_abstract_mesh(mesh):
    lowered = jax.jit(functools.partial(value_and_grads, oracle=False)).trace(moe, x_BTD).lower(
      lowering_platforms=('tpu',))
  assert lowered.as_text().count('@ragged_all_to_all') >= 4   # there and back, forward and backward


def exchanges(jaxpr) -> int:
  """How many all_to_all a jaxpr holds, those of its inner ones included."""
  inner = [value for equation in jaxpr.eqns for value in jax.tree.leaves(
    list(equation.params.values()), is_leaf=lambda value: hasattr(value, 'eqns'))]
  return (sum(equation.primitive.name == 'all_to_all' for equation in jaxpr.eqns)
          + sum(exchanges(getattr(value, 'jaxpr', value)) for value in inner if hasattr(value, 'eqns')))


def test_saving_what_was_transported_moves_no_token_twice(mesh):
  x_BTD, moe = tokens(), build('a2a')
  def moved(policy):
    loss = jax.checkpoint(lambda moe, x_BTD: jnp.sum(jnp.sin(moe(x_BTD)[0])), policy=REMAT_POLICIES[policy])
    with mesh(1, 1, 4, 2): return exchanges(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(moe, x_BTD).jaxpr)
  # Out and back, in the forward and in the backward pass.
  assert moved('transport') == 4
  assert moved('full') > 4


def test_experts_travel_in_the_dtype_that_they_multiply_in(mesh):
  """Gathered over 'fsdp' in bfloat16, not as the optimizer's float32; rounded weights keep their float32 grid."""
  moe, x_BTD = build(), tokens().astype(jnp.bfloat16)
  rounded = rewrite(moe, Weight, lambda _, weight: FakeQuantized(weight, Rounding(Int(bits=8))), 'experts')
  with mesh(1, 2, 4, 1):
    for layer, dtype in ((moe, jnp.bfloat16), (rounded, jnp.float32)):
      jaxpr = jax.make_jaxpr(lambda layer, x: layer(x)[0])(layer, x_BTD)
      map_ = next(equation for equation in jaxpr.eqns if equation.primitive.name == 'shard_map')
      entering = [variable.aval for variable in map_.invars]
      assert [aval.dtype for aval in entering if aval.shape in ((8, 16, 32), (8, 32, 16))] == [dtype] * 3
