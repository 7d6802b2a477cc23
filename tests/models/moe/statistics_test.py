"""Statistics add up: of parts of a batch, over layers in a loop or side by side, and over devices."""
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
from efficient_lm.models.moe.statistics import Statistics
from efficient_lm.models.transformer import Stack, unrolled
from efficient_lm.parallel import sharding

B, T, D, E, L = 8, 6, 8, 4, 2
BALANCE = (routing.LoadBalance(weight=.5), routing.RouterZ(weight=.25), routing.LossFreeBias())
MIXTURES = {
  'tokens choose': spec.MoE(num_experts=E, hidden=8, balance=BALANCE, capacity=.5),
  'experts choose': spec.MoE(num_experts=E, hidden=8, balance=BALANCE[:2], router=routing.ExpertChoice(capacity=2.)),
}
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@functools.cache
def stack_of(kind):
  """Two layers of a mixture, as one stack."""
  attention = spec.GroupedQuery(num_heads=1, num_kv_heads=1, head_dim=8)
  described = spec.Stack(num_layers=L, attention=attention, mlp=MIXTURES[kind])
  return jit(lambda: Stack(described, spec.Site(D, L, 1e-6), rngs=nnx.Rngs(0)))()


def layer_of(kind):
  return stack_of(kind).layer(0).mlp


of_layer = jit(lambda moe, x_BTD, segments_BT: moe(x_BTD, segments_BT)[1])


def batch_of(seed):
  """Rows of random lengths, padded, of one or two documents."""
  rng = np.random.default_rng(seed)
  x_BTD = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
  segments_BT = 1 + (np.arange(T) >= rng.integers(1, T + 1, (B, 1)))
  return x_BTD, np.where(np.arange(T) < rng.integers(0, T + 1, (B, 1)), segments_BT, 0).astype(np.int32)


def assert_same(ours, wanted):
  """Counts exactly; sums of float32 in another order to some 2**-24 of each of their terms."""
  for name in ('rows_E', 'num_tokens', 'dropped'):
    np.testing.assert_array_equal(getattr(ours, name), getattr(wanted, name), err_msg=name)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kind', MIXTURES)
@settings(deadline=None, max_examples=8)
@given(st.integers(0, 99), st.sampled_from([1, 2, 4]))
def test_statistics_of_a_batch_are_the_sum_of_those_of_its_parts(kind, seed, parts):
  x_BTD, segments_BT = batch_of(seed)
  whole = of_layer(layer_of(kind), x_BTD, segments_BT)
  of_parts = [of_layer(layer_of(kind), x_BTD[i::parts], segments_BT[i::parts]) for i in range(parts)]
  total = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), of_parts)
  assert_same(total, whole)
  # So do the losses of the parts, once each is told the totals.
  for name, loss in whole.losses().items():
    losses = [part.losses(total.num_tokens, total)[name] for part in of_parts]
    np.testing.assert_allclose(sum(losses), loss, rtol=1e-5)
  for name, value in whole.metrics().items(): np.testing.assert_allclose(total.metrics()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', MIXTURES)
def test_layers_in_a_loop_or_side_by_side_report_what_each_reports_alone(kind):
  x_BTD, segments_BT = batch_of(0)
  positions_BT = np.broadcast_to(np.arange(T), (B, T))
  run = jit(lambda stack, x_BTD: stack(x_BTD, positions_BT, segments_BT)[1])
  (looped,), apart = run(stack_of(kind), x_BTD), run(unrolled([stack_of(kind)])[0], x_BTD)
  assert looped.rows_E.shape == (L, E) and len(apart) == L
  assert_same(looped, jax.tree.map(lambda *layers: jnp.stack(layers), *apart))
  side_by_side = jit(jax.vmap(lambda moe: moe(x_BTD, segments_BT)[1]))(stack_of(kind).blocks.mlp)
  alone = [of_layer(stack_of(kind).layer(i).mlp, x_BTD, segments_BT) for i in range(L)]
  assert_same(side_by_side, jax.tree.map(lambda *layers: jnp.stack(layers), *alone))
  losses = [one.losses()['load_balance'] for one in alone]
  np.testing.assert_allclose(side_by_side.losses()['load_balance'], losses, rtol=1e-5)


@pytest.mark.parametrize('kind', MIXTURES)
def test_devices_report_what_one_device_does(kind, mesh):
  x_BTD, segments_BT = batch_of(1)
  alone = of_layer(layer_of(kind), x_BTD, segments_BT)
  with mesh(1, 2, 2, 2):
    moe = jax.device_put(layer_of(kind), sharding.shardings(layer_of(kind), jax.sharding.get_mesh()))
    assert_same(sharding.wait_on_cpu(of_layer(moe, x_BTD, segments_BT)), alone)


def statistics(**fields):
  """Of four tokens that chose two of four experts each; three layers of them."""
  made = dict(rows_E=[4., 4, 0, 0], num_tokens=4., entropy=2., dropped=2., term_sums=([.5, 1.5, 1, 1], 12., ()))
  return jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 3), Statistics(balance=BALANCE, **{**made, **fields}),
                      is_leaf=lambda node: isinstance(node, list))


def test_losses_and_metrics_by_hand():
  found = statistics()
  np.testing.assert_allclose(found.load_E, [[2, 2, 0, 0]] * 3)
  np.testing.assert_allclose(found.losses()['load_balance'], [.5 * (2 * .5 + 2 * 1.5) / 4] * 3)
  np.testing.assert_allclose(found.losses()['router_z'], [.25 * 12 / 4] * 3)
  wanted = {'max_violation': 1, 'dead_experts': 2, 'router_entropy': .5, 'dropped_share': .25}
  for name, value in wanted.items(): np.testing.assert_allclose(found.metrics()[name], [value] * 3, err_msg=name)


def test_a_part_takes_its_load_and_number_of_tokens_from_the_whole():
  found, whole = statistics(), statistics(rows_E=[4., 4, 8, 0], num_tokens=8.)
  np.testing.assert_allclose(found.losses(8., whole)['load_balance'], [.5 * (.5 + 1.5 + 2 * 1) / 8] * 3)
  np.testing.assert_allclose(found.losses(8.)['router_z'], [.25 * 12 / 8] * 3)


def test_nothing_at_all_costs_nothing():
  empty = jax.tree.map(jnp.zeros_like, statistics())
  assert all(not np.any(value) for value in empty.losses().values())
  assert all(np.all(np.isfinite(value)) for value in empty.metrics().values())


def test_only_a_load_balance_reads_the_load():
  one = lambda *balance: Statistics(None, None, None, None, (), balance).reads_load
  assert one(routing.LoadBalance()) and not one(routing.RouterZ(), routing.LossFreeBias()) and not one()
