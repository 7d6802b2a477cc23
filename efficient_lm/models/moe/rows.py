"""Routed rows: a routing says which rows exist; here they are laid out in buffers, and their results return to their tokens.

R rows in a fixed order, row r being one (token, expert) pair. A layout of C slots is a pair of index arrays that undo
each other: `order_C` says which row a slot holds (R: none), `slot_R` says where a row lies (C: nowhere, it is dropped).

  rows_CD = routing.spread(x_MD, order_C, slot_R)        dispatch
  y_MD = routing.combine(y_CD, order_C, slot_R)          combine: the weighted sum of a token's rows

Each is the other's transpose, so with both index arrays at hand the forward and the backward pass are gathers only:
scatters of rows are slow on CPU, and unordered sums on GPU.
"""
import dataclasses
import functools
from collections.abc import Sequence

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
  if isinstance(num_rows, int):
    end_E = jnp.searchsorted(expert_R[order_R], jnp.arange(num_experts), side='right').astype(jnp.int32)
  else:   # an exported program, whose number of rows is known when it runs: JAX searches none such
    end_E = jnp.sum(expert_R[:, None] <= jnp.arange(num_experts), 0, dtype=jnp.int32)
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

  def of_real(self, real_BT, num_experts: int) -> 'TokenChoice':
    """Without the choices of padding."""
    if real_BT is None: return self
    return dataclasses.replace(self, expert_BTA=jnp.where(real_BT[..., None], self.expert_BTA, num_experts))

  def rows_by_expert(self, num_experts: int):
    """rows_E, how many tokens chose each expert; float32, exact to 2^24."""
    return jnp.sum(self.visits(num_experts), (0, 1)).astype(jnp.float32)

  def dense_gates(self, num_experts: int):
    """gate_BTE, zero where the token does not see the expert: what `combine` amounts to, for oracles."""
    chosen_BTAE = self.expert_BTA[..., None] == jnp.arange(num_experts)
    return jnp.sum(jnp.where(chosen_BTAE, self.gate_BTA[..., None], 0), -2)

  def capped(self, room: Sequence[int], num_experts: int, segments_BT=None) -> 'TokenChoice':
    """Drops what exceeds `room[n]` rows for one expert in a document of n tokens, first come first served: no document of a
    packed sequence takes room from another, and padding has none to give. Without `segments_BT` a sequence is one
    document."""
    visits_BTE = self.visits(num_experts).astype(jnp.int32)
    place_BTE = jnp.cumsum(visits_BTE, 1)
    room_BT = room[self.expert_BTA.shape[1]]
    if segments_BT is not None:
      begins_BT = jnp.diff(segments_BT, axis=1, prepend=-1) != 0
      room_BT = jnp.asarray(room)[_lengths(begins_BT)][..., None]
      before_BTE = jnp.where(begins_BT[..., None], place_BTE - visits_BTE, 0)
      place_BTE -= jax.lax.cummax(before_BTE, axis=1)   # counts only grow, so the last beginning has the most before it
    chosen_BTAE = self.expert_BTA[..., None] == jnp.arange(num_experts)
    place_BTA = jnp.sum(jnp.where(chosen_BTAE, place_BTE[..., None, :], 0), -1)
    return dataclasses.replace(self, expert_BTA=jnp.where(place_BTA > room_BT, num_experts, self.expert_BTA))


def _lengths(begins_BT):
  """(B, T): how many tokens the document of each token has, from where documents begin."""
  length = begins_BT.shape[1]
  place_T = jnp.arange(length)
  start_BT = jax.lax.cummax(jnp.where(begins_BT, place_T, 0), axis=1)
  ends_BT = jnp.pad(begins_BT[:, 1:], ((0, 0), (0, 1)), constant_values=True)
  return jax.lax.cummin(jnp.where(ends_BT, place_T + 1, length), axis=1, reverse=True) - start_BT


@functools.partial(jax.tree_util.register_dataclass, data_fields=['token_BEC', 'gate_BEC'], meta_fields=['length'])
@dataclasses.dataclass(frozen=True)
class ExpertsChoice:
  """Each expert chose C tokens of each sequence of `length` tokens. token_BEC int32, index in the sequence, `length` where
  the place stays empty; gate_BEC float32. Rows in the order of (B, E, C). A token has any number of rows, so combining them
  is a scatter."""
  token_BEC: jax.Array
  gate_BEC: jax.Array
  length: int

  @property
  def expert_R(self):
    num_experts = self.token_BEC.shape[1]
    expert_E = jnp.arange(num_experts, dtype=jnp.int32)
    return jnp.where(self.token_BEC < self.length, expert_E[:, None], num_experts).reshape(-1)

  @property
  def token_R(self):
    """Index of each row's token among all local tokens; one past the sequence's last where the place is empty."""
    return (jnp.arange(self.token_BEC.shape[0])[:, None, None] * self.length + self.token_BEC).reshape(-1)

  def most_rows(self, num_experts: int, of_experts: int) -> int:
    """The most rows that `num_experts` of the experts can receive: exactly their share, by construction."""
    return self.token_BEC.size * num_experts // of_experts

  def _token_C(self, order_C):
    num_tokens, num_rows = self.token_BEC.shape[0] * self.length, self.token_BEC.size
    token_R = jnp.where(self.token_BEC.reshape(-1) < self.length, self.token_R, num_tokens)
    return jnp.where(order_C < num_rows, token_R[jnp.minimum(order_C, num_rows - 1)], num_tokens)

  def spread(self, x_MD, order_C, slot_R):
    return take(x_MD, self._token_C(order_C))

  def combine(self, y_CD, order_C, slot_R):
    weighted_CD = y_CD.astype(jnp.float32) * take(self.gate_BEC.reshape(-1), order_C)[:, None]
    y_MD = jnp.zeros((self.token_BEC.shape[0] * self.length, y_CD.shape[-1]), jnp.float32)
    return y_MD.at[self._token_C(order_C)].add(weighted_CD, mode='drop').astype(y_CD.dtype)

  def visits(self, num_experts: int):
    """visit_BTE, True where the expert sees the token."""
    return jnp.any(self.token_BEC[..., None] == jnp.arange(self.length), 2).swapaxes(1, 2)

  def rows_by_expert(self, num_experts: int):
    """rows_E, how many tokens each expert chose; float32."""
    return jnp.sum(self.token_BEC < self.length, (0, 2)).astype(jnp.float32)

  def dense_gates(self, num_experts: int):
    """gate_BTE, zero where the expert does not see the token: what `combine` amounts to, for oracles."""
    chosen_BECT = self.token_BEC[..., None] == jnp.arange(self.length)
    return jnp.sum(jnp.where(chosen_BECT, self.gate_BEC[..., None], 0), 2).swapaxes(1, 2)
