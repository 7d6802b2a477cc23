"""Attention as its equation: every score is computed, masked and normalised. Autodiff gives the gradient."""
import jax
import jax.numpy as jnp
from jax import lax


def visible(T: int, S: int, start=0, segments_BS=None, window: int | None = None):
  """The keys that each query sees: bool, (1 or B, T, S).

  Query t is the token at key index start + t. It sees key s iff s <= start + t; and start + t - s < window, when a
  window is given; and both belong to the same document, when segments are given.
  """
  query_T1 = start + jnp.arange(T)[:, None]
  key_S = jnp.arange(S)
  mask_TS = key_S <= query_T1
  if window is not None:
    mask_TS &= query_T1 - key_S < window
  if segments_BS is None:
    return mask_TS[None]
  segments_BT = lax.dynamic_slice_in_dim(segments_BS, start, T, axis=1)
  return mask_TS & (segments_BT[:, :, None] == segments_BS[:, None, :])


def attention(q_BTNH, k_BSKH, v_BSKH, *, start=0, segments_BS=None, window=None, scale: float, softcap=None):
  """o = softmax(scale * q k^T) v over the visible keys, for G = N / K query heads per key-value head."""
  (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  scores_BKGTS = scale * jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
  if softcap is not None: scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
  mask_BTS = visible(T, S, start, segments_BS, window)
  # Every query sees itself, so no row is without a finite score.
  p_BKGTS = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores_BKGTS, -jnp.inf), axis=-1)
  o_BTKGH = jnp.einsum('BKGTS,BSKH->BTKGH', p_BKGTS.astype(v_BSKH.dtype), v_BSKH)
  return o_BTKGH.reshape(B, T, N, v_BSKH.shape[-1])
