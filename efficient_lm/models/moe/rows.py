"""Routed rows: a routing says which rows exist; here they are laid out in buffers, and their results come home.

R rows in a fixed order, row r being one (token, expert) pair. A layout of C slots is a pair of index arrays that undo
each other: `order_C` says which row a slot holds (R: none), `slot_R` says where a row lies (C: nowhere, it is dropped).

  rows_CD = routing.spread(x_MD, order_C, slot_R)        dispatch
  y_MD = routing.combine(y_CD, order_C, slot_R)          combine: the weighted sum of a token's rows

Each is the other's transpose, so with both index arrays at hand the forward and the backward pass are gathers only:
scatters of rows are slow on CPU, and unordered sums on GPU.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp


def take(x, index):
  """x[index] over the first dimension, zero where the index is past the end."""
  return x.at[index].get(mode='fill', fill_value=0)


def sort_rows(expert_R, num_experts: int, slots: int):
  """Layout of the rows by expert in `slots` slots, stable, with the rows of each expert that found room.

  Rows of expert E (dropped) come last and rows that find no slot are dropped.

  Returns:
    order_C, slot_R, sizes_E; sum(sizes_E) <= C, slots past the sum hold nothing that counts.
  """
  num_rows = expert_R.shape[0]
  order_R = jnp.argsort(expert_R, stable=True).astype(jnp.int32)
  slot_R = jnp.zeros(num_rows, jnp.int32).at[order_R].set(jnp.arange(num_rows, dtype=jnp.int32), unique_indices=True)
  end_E = jnp.searchsorted(expert_R[order_R], jnp.arange(num_experts), side='right').astype(jnp.int32)
  order_C = jnp.pad(order_R[:slots], (0, max(0, slots - num_rows)), constant_values=num_rows)
  return order_C, jnp.minimum(slot_R, slots), jnp.diff(jnp.minimum(end_E, slots), prepend=0)


def _sum_choices(rows_CD, slot_MA, gate_MA=None):
  """sum over a of gate_ma * rows[slot_ma], in float32: one gather a choice, so that no (M, A, D) array is built."""
  total_MD = jnp.zeros((slot_MA.shape[0], rows_CD.shape[-1]), jnp.float32)
  for a in range(slot_MA.shape[1]):
    rows_MD = take(rows_CD, slot_MA[:, a]).astype(jnp.float32)
    total_MD += rows_MD if gate_MA is None else rows_MD * gate_MA[:, a, None]
  return total_MD.astype(rows_CD.dtype)


@jax.custom_vjp
def spread(x_MD, order_C, slot_MA):
  """rows_CD: slot c holds the token of row order_c = (m, a), zero where it holds no row."""
  return take(x_MD, order_C // slot_MA.shape[1])


def _spread_forward(x_MD, order_C, slot_MA):
  return spread(x_MD, order_C, slot_MA), slot_MA


def _spread_backward(slot_MA, g_CD):
  return _sum_choices(g_CD, slot_MA), None, None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def combine(y_CD, gate_MA, order_C, slot_MA):
  """y_m = sum over a of gate_ma * y[slot_ma], a row without a slot counting zero; accumulated in float32."""
  return _sum_choices(y_CD, slot_MA, gate_MA)


def _combine_forward(y_CD, gate_MA, order_C, slot_MA):
  return combine(y_CD, gate_MA, order_C, slot_MA), (y_CD, gate_MA, order_C, slot_MA)


def _combine_backward(residuals, g_MD):
  y_CD, gate_MA, order_C, slot_MA = residuals
  g_CD = take(g_MD, order_C // slot_MA.shape[1]).astype(jnp.float32)
  dy_CD = g_CD * take(gate_MA.reshape(-1), order_C)[:, None]
  dgate_C = jnp.sum(g_CD * y_CD.astype(jnp.float32), -1)
  return dy_CD.astype(y_CD.dtype), take(dgate_C, slot_MA).astype(gate_MA.dtype), None, None


combine.defvjp(_combine_forward, _combine_backward)


def permute(x_CD, order_C, slot_C):
  """x[order], with a gather for its gradient too; the inverse is permute(y, slot, order)."""
  return spread(x_CD, order_C, slot_C[:, None])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenChoice:
  """Each token chose A experts. expert_BTA int32, E meaning dropped; gate_BTA float32. Rows in the order of (B, T, A)."""
  expert_BTA: jax.Array
  gate_BTA: jax.Array

  @property
  def expert_R(self):
    return self.expert_BTA.reshape(-1)

  @property
  def token_R(self):
    """Index of each row's token among all local tokens."""
    return jnp.arange(self.expert_BTA.size, dtype=jnp.int32) // self.expert_BTA.shape[-1]

  def most_rows(self, num_experts: int, of_experts: int) -> int:
    """The most rows that `num_experts` of the experts can receive: a token visits an expert once at most."""
    return self.expert_BTA.size // self.expert_BTA.shape[-1] * min(self.expert_BTA.shape[-1], num_experts)

  def spread(self, x_MD, order_C, slot_R):
    return spread(x_MD, order_C, slot_R.reshape(-1, self.expert_BTA.shape[-1]))

  def combine(self, y_CD, order_C, slot_R):
    active = self.expert_BTA.shape[-1]
    return combine(y_CD, self.gate_BTA.reshape(-1, active), order_C, slot_R.reshape(-1, active))

  def visits(self, num_experts: int):
    """visit_BTE, True where the token sees the expert."""
    return jnp.any(self.expert_BTA[..., None] == jnp.arange(num_experts), -2)

  def load(self, num_experts: int):
    """load_E: rows per expert over the mean, 1 where balanced."""
    rows_E = jnp.sum(self.visits(num_experts), (0, 1))
    return rows_E * (num_experts / self.expert_BTA.size)

  def dense_gates(self, num_experts: int):
    """gate_BTE, zero where the token does not see the expert: what `combine` amounts to, for oracles."""
    chosen_BTAE = self.expert_BTA[..., None] == jnp.arange(num_experts)
    return jnp.sum(jnp.where(chosen_BTAE, self.gate_BTA[..., None], 0), -2)

  def capped(self, capacity: int, num_experts: int) -> 'TokenChoice':
    """Drops what exceeds `capacity` rows for one expert in one sequence, first come first served, so causally."""
    place_BTE = jnp.cumsum(self.visits(num_experts), 1)
    chosen_BTAE = self.expert_BTA[..., None] == jnp.arange(num_experts)
    place_BTA = jnp.sum(jnp.where(chosen_BTAE, place_BTE[..., None, :], 0), -1)
    return dataclasses.replace(self, expert_BTA=jnp.where(place_BTA > capacity, num_experts, self.expert_BTA))


@functools.partial(jax.tree_util.register_dataclass, data_fields=['token_BEC', 'gate_BEC'], meta_fields=['length'])
@dataclasses.dataclass(frozen=True)
class ExpertsChoice:
  """Each expert chose C tokens of each sequence of `length` tokens. token_BEC int32, index in the sequence; gate_BEC
  float32. Rows in the order of (B, E, C). A token has any number of rows, so combining them is a scatter."""
  token_BEC: jax.Array
  gate_BEC: jax.Array
  length: int

  @property
  def expert_R(self):
    expert_E = jnp.arange(self.token_BEC.shape[1], dtype=jnp.int32)
    return jnp.broadcast_to(expert_E[:, None], self.token_BEC.shape).reshape(-1)

  @property
  def token_R(self):
    """Index of each row's token among all local tokens."""
    return (jnp.arange(self.token_BEC.shape[0])[:, None, None] * self.length + self.token_BEC).reshape(-1)

  def most_rows(self, num_experts: int, of_experts: int) -> int:
    """The most rows that `num_experts` of the experts can receive: exactly their share, by construction."""
    return self.token_BEC.size * num_experts // of_experts

  def _token_C(self, order_C):
    num_tokens, num_rows = self.token_BEC.shape[0] * self.length, self.token_BEC.size
    return jnp.where(order_C < num_rows, self.token_R[jnp.minimum(order_C, num_rows - 1)], num_tokens)

  def spread(self, x_MD, order_C, slot_R):
    return take(x_MD, self._token_C(order_C))

  def combine(self, y_CD, order_C, slot_R):
    weighted_CD = y_CD.astype(jnp.float32) * take(self.gate_BEC.reshape(-1), order_C)[:, None]
    y_MD = jnp.zeros((self.token_BEC.shape[0] * self.length, y_CD.shape[-1]), jnp.float32)
    return y_MD.at[self._token_C(order_C)].add(weighted_CD, mode='drop').astype(y_CD.dtype)

  def visits(self, num_experts: int):
    """visit_BTE, True where the expert sees the token."""
    return jnp.any(self.token_BEC[..., None] == jnp.arange(self.length), 2).swapaxes(1, 2)

  def load(self, num_experts: int):
    """load_E: rows per expert over the mean; 1, since every expert chooses the same number."""
    return jnp.ones(num_experts)

  def dense_gates(self, num_experts: int):
    """gate_BTE, zero where the expert does not see the token: what `combine` amounts to, for oracles."""
    chosen_BECT = self.token_BEC[..., None] == jnp.arange(self.length)
    return jnp.sum(jnp.where(chosen_BECT, self.gate_BEC[..., None], 0), 2).swapaxes(1, 2)
