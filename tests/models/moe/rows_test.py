"""Laying rows out and bringing them home: small integers that one can check by eye, and transposes."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from efficient_lm.models.moe import rows

# Two sequences of two tokens, two of three experts each; E = 3 means dropped.
EXPERT_BTA = jnp.array([[[2, 0], [0, 1]], [[2, 3], [1, 0]]], jnp.int32)
ROUTING = rows.TokenChoice(EXPERT_BTA, jnp.array([[[1., 2.], [3., 4.]], [[5., 6.], [7., 8.]]]))


def test_sort_is_by_expert_and_stable():
  order, slot, sizes = rows.sort_rows(ROUTING.expert_R, 3, 8)
  np.testing.assert_array_equal(order, [1, 2, 7, 3, 6, 0, 4, 5])
  np.testing.assert_array_equal(order[slot], np.arange(8))
  np.testing.assert_array_equal(sizes, [3, 2, 2])


def test_a_number_of_rows_that_is_known_only_later_gives_the_same():
  shape = jax.ShapeDtypeStruct(export.symbolic_shape('rows'), jnp.int32)
  later = export.export(jax.jit(lambda expert_R: rows.sort_rows(expert_R, 3, expert_R.shape[0])))(shape)
  for found, known in zip(later.call(ROUTING.expert_R), rows.sort_rows(ROUTING.expert_R, 3, 8), strict=True):
    np.testing.assert_array_equal(found, known)


def test_rows_without_a_slot_are_dropped():
  order, slot, sizes = rows.sort_rows(ROUTING.expert_R, 3, 4)
  np.testing.assert_array_equal(order, [1, 2, 7, 3])
  np.testing.assert_array_equal(slot, [4, 0, 1, 3, 4, 4, 4, 2])
  np.testing.assert_array_equal(sizes, [3, 1, 0])


def test_slots_without_a_row_are_empty():
  order, slot, _sizes = rows.sort_rows(ROUTING.expert_R, 3, 10)
  np.testing.assert_array_equal(order[8:], 8)
  np.testing.assert_array_equal(ROUTING.spread(jnp.ones((4, 1)), order, slot)[8:], 0)


def test_token_of_each_row():
  np.testing.assert_array_equal(ROUTING.token_R, [0, 0, 1, 1, 2, 2, 3, 3])
  np.testing.assert_array_equal(ROUTING.rows_by_expert(3), [3, 2, 2])


def test_spread_and_combine_by_eye():
  order, slot, _ = rows.sort_rows(ROUTING.expert_R, 3, 8)
  x_MD = jnp.array([[10.], [20.], [30.], [40.]])
  rows_CD = ROUTING.spread(x_MD, order, slot)
  np.testing.assert_array_equal(rows_CD[:, 0], [10, 20, 40, 20, 40, 10, 30, 30])
  # The dropped row (slot 7) is zero when it comes back from experts.
  y_MD = ROUTING.combine(rows_CD.at[7].set(0), order, slot)
  np.testing.assert_array_equal(y_MD[:, 0], [10 * 3, 20 * 7, 30 * 5, 40 * 15])


@pytest.mark.parametrize('slots', [5, 30])
def test_gradients_equal_those_of_plain_indexing(slots):
  key = jax.random.split(jax.random.key(0), 4)
  expert_BTA = jax.random.randint(key[0], (2, 6, 2), 0, 4)
  gate_BTA, x_MD = jax.random.normal(key[1], (2, 6, 2)), jax.random.normal(key[2], (12, 3))
  order, slot, _ = rows.sort_rows(expert_BTA.reshape(-1), 4, slots)
  weight_CD = jax.random.normal(key[3], (slots, 3))

  def ours(x_MD, gate_BTA):
    routing = rows.TokenChoice(expert_BTA, gate_BTA)
    return routing.combine(jnp.sin(routing.spread(x_MD, order, slot) * weight_CD), order, slot)

  def plain(x_MD, gate_BTA):
    row_C = order[:min(slots, 24)]
    y_CD = jnp.sin(x_MD[row_C // 2] * weight_CD[:24]) * gate_BTA.reshape(-1)[row_C][:, None]
    return jnp.zeros_like(x_MD).at[row_C // 2].add(y_CD)

  def value_and_gradients(function):
    y_MD, pull = jax.vjp(function, x_MD, gate_BTA)
    return y_MD, *pull(x_MD)
  for a, b in zip(*(jax.jit(value_and_gradients, static_argnums=0)(f) for f in (ours, plain)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_permute_and_its_inverse():
  order, slot, _ = rows.sort_rows(jnp.array([2, 0, 1, 0]), 3, 4)
  x_CD = jnp.arange(8.0).reshape(4, 2)
  np.testing.assert_array_equal(rows.permute(x_CD, order, slot), x_CD[jnp.array([1, 3, 2, 0])])
  np.testing.assert_array_equal(rows.permute(rows.permute(x_CD, order, slot), slot, order), x_CD)


def test_experts_choice_by_eye():
  # One sequence of three tokens: expert 0 takes tokens 2 and 0, expert 1 takes 2 and 1.
  routing = rows.ExpertsChoice(jnp.array([[[2, 0], [2, 1]]]), jnp.array([[[1., 2.], [3., 4.]]]), 3)
  np.testing.assert_array_equal(routing.expert_R, [0, 0, 1, 1])
  np.testing.assert_array_equal(routing.token_R, [2, 0, 2, 1])
  np.testing.assert_array_equal(routing.dense_gates(2), [[[2, 0], [0, 4], [1, 3]]])
  order, slot, sizes = rows.sort_rows(routing.expert_R, 2, 4)
  np.testing.assert_array_equal(sizes, [2, 2])
  y_MD = routing.combine(routing.spread(jnp.array([[1.], [10.], [100.]]), order, slot), order, slot)
  np.testing.assert_array_equal(y_MD[:, 0], [2, 40, 400])


def test_dense_gates_leave_out_dropped_rows():
  np.testing.assert_array_equal(ROUTING.dense_gates(3)[1], [[0, 0, 5], [8, 7, 0]])


@pytest.mark.parametrize('routing, most', [(ROUTING, 4), (rows.TokenChoice(EXPERT_BTA[..., :1], None), 4)])
def test_one_expert_receives_a_token_once_at_most(routing, most):
  assert routing.most_rows(1, 3) == most
