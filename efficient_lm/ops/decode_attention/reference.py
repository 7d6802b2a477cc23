"""Attention of one token of each sequence as its equation: the cache is gathered, dequantized and masked, in float32."""
import jax
import jax.numpy as jnp

from efficient_lm.ops.decode_attention.cache import Stored, contiguous, first_slots


def decode_attention(q_BNH, k_BKSH, v_BKSH, lengths_B, *, k_scale_BKS=None, v_scale_BKS=None, page_table_BS=None,
                     window=None, scale: float, softcap=None, k_shift=None, v_shift=None):
  """o = softmax(scale * q k^T) v over slots first … length - 1; see the API."""
  (B, N, H), K = q_BNH.shape, k_BKSH.shape[1]
  stored = Stored(k_BKSH, k_scale_BKS, k_shift), Stored(v_BKSH, v_scale_BKS, v_shift)
  k_BKSH, v_BKSH = (contiguous(cached.numbers(), page_table_BS) for cached in stored)
  slot_S, first_B = jnp.arange(k_BKSH.shape[2]), first_slots(lengths_B, window)
  seen_BS = (slot_S >= first_B[:, None]) & (slot_S < lengths_B[:, None])
  q_BKGH = q_BNH.astype(jnp.float32).reshape(B, K, N // K, H)
  precise = jax.lax.Precision.HIGHEST
  scores_BKGS = scale * jnp.einsum('BKGH,BKSH->BKGS', q_BKGH, k_BKSH, precision=precise)
  if softcap is not None: scores_BKGS = softcap * jnp.tanh(scores_BKGS / softcap)
  p_BKGS = jax.nn.softmax(scores_BKGS, axis=-1, where=seen_BS[:, None, None])
  o_BKGH = jnp.einsum('BKGS,BKSH->BKGH', jnp.where(seen_BS[:, None, None], p_BKGS, 0), v_BKSH, precision=precise)
  return o_BKGH.reshape(B, N, -1).astype(q_BNH.dtype)
