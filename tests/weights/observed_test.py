"""What an observed weight sees is what it multiplies, of each expert by itself, on any mesh; and nothing else changes."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.compression import calibration
from efficient_lm.models.moe.dispatch import dispatch_experts
from efficient_lm.models.moe.layer import MoE
from efficient_lm.models.moe.routing import Dispatch
from efficient_lm.models.moe.rows import TokenChoice
from efficient_lm.training import losses
from efficient_lm.tree import rewrite, select
from efficient_lm.weights import observed
from efficient_lm.weights.observed import Observed
from efficient_lm.weights.weight import Dense, Weight
from tests.compressing import D, batch_of, model_of

ALL = ('gram', 'magnitude', 'square', 'peak', 'count')
E = 4


def expected(x_MK):
  return {'gram': x_MK.T @ x_MK, 'magnitude': np.abs(x_MK).sum(0), 'square': (x_MK ** 2).sum(0),
          'peak': np.abs(x_MK).max(0, initial=0), 'count': np.array([len(x_MK)])}


def assert_statistics(found, wanted):
  assert set(found) == set(wanted)
  for name in found:   # some hundred float32 terms, added in another order
    np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-4 * np.abs(wanted[name]).max(), err_msg=name)


@pytest.mark.parametrize('axes, inputs, shape, equation', [
  ('DF', 'D', (6, 5), 'BTD,DF->BTF'), ('NHD', 'NH', (2, 3, 5), 'BTNH,NHD->BTD')], ids=['one letter', 'two letters'])
def test_the_gradient_of_a_statistic_is_what_the_weight_saw(axes, inputs, shape, equation):
  rng = np.random.default_rng(0)
  weight = Dense(jnp.asarray(rng.normal(size=shape), jnp.float32), axes, inputs)
  x = rng.normal(size=(2, 7, *shape[:len(inputs)])).astype(np.float32)
  watched = Observed(weight, ALL)
  np.testing.assert_array_equal(watched.contract(equation, x), weight.contract(equation, x))
  found = calibration.collect(lambda tree: tree['w'].contract(equation, x), {'w': watched})['w']
  assert_statistics(found, expected(x.reshape(14, -1)))


def test_products_over_other_dims_are_not_observed():
  """As in decoding with a latent cache, where queries are mapped by the keys' weight."""
  weight = Observed(Dense(jnp.ones((3, 2, 4)), 'RNH', 'R'), ALL)
  found = calibration.collect(lambda tree: tree['w'].contract('BTNH,RNH->BTNR', jnp.ones((1, 2, 2, 4))), {'w': weight})['w']
  assert all(np.all(value == 0) for value in found.values())


def test_experts_are_observed_one_by_one_and_rows_past_the_groups_never():
  rng = np.random.default_rng(0)
  weight = Observed(Dense(jnp.asarray(rng.normal(size=(E, 6, 5)), jnp.float32), 'EDF', 'D'), ALL)
  x_MD, sizes_E = rng.normal(size=(20, 6)).astype(np.float32), np.array([3, 0, 9, 2])
  x_MD[14:] = np.nan
  found = calibration.collect(lambda tree: tree['w'].contract_grouped(x_MD, jnp.asarray(sizes_E)), {'w': weight})['w']
  ends = np.cumsum(sizes_E)
  each = [expected(x_MD[end - size:end]) for end, size in zip(ends, sizes_E)]
  assert_statistics(found, {name: np.stack([one[name] for one in each]) for name in ALL})


@functools.cache
def experts():
  return jax.tree.map(lambda leaf: leaf[0], dict(select(model_of(mlp='experts'), MoE))['stacks/0/blocks/mlp'].experts)


def routed():
  rng = np.random.default_rng(5)
  expert_BTA = np.stack([rng.permutation(E)[:2] for _ in range(8 * 5)]).reshape(8, 5, 2).astype(np.int32)
  choice = TokenChoice(jnp.asarray(expert_BTA), jnp.asarray(rng.random((8, 5, 2)), jnp.float32))
  return jnp.asarray(rng.normal(size=(8, 5, D)), jnp.float32), choice


@pytest.mark.parametrize('sizes', [(1, 1, 4, 2), (2, 2, 1, 2)], ids=str)
def test_a_mesh_sees_the_same_as_one_device(mesh, sizes):
  """Experts cut by 'expert', their hidden units by 'tensor', tokens by all the others."""
  x_BTD, choice = routed()
  watched = rewrite(experts(), Weight, lambda _, weight: Observed(weight, ALL))
  dispatch = lambda layer: dispatch_experts(layer, x_BTD, choice, Dispatch(), E)[0]
  run = jax.jit(lambda watched: calibration.collect(dispatch, watched))
  alone = run(watched)
  with mesh(*sizes): spread = run(watched)
  assert set(alone) == {'gate', 'up', 'down'}
  for path in alone: assert_statistics(spread[path], alone[path])
  assert alone['gate']['count'].sum() == 80


def test_the_backward_pass_proper_is_dropped():
  """Counted in the compiled program: with cheap statistics it costs a forward pass, where a gradient costs three."""
  model, batch = model_of(), batch_of()
  forward = lambda model: losses.outputs_of(model, batch).hidden_BTD
  watched = calibration.watch(model, {path: ('peak',) for path, _ in select(model, Weight, 'blocks')})
  collect, gradient = functools.partial(calibration.collect, forward), jax.grad(lambda model: jnp.sum(forward(model)))
  flops = [jax.jit(program).lower(given).compile().cost_analysis()['flops']
           for program, given in ((forward, model), (collect, watched), (gradient, model))]
  assert flops[1] < 1.1 * flops[0] and flops[2] > 2 * flops[0]


def test_peaks_are_joined_by_the_largest_and_all_else_is_added():
  assert observed.joined('peak', np.array([1., 5.]), np.array([3., 2.])).tolist() == [3, 5]
  assert observed.joined('gram', np.array([1., 5.]), np.array([3., 2.])).tolist() == [4, 7]
