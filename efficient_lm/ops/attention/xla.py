"""Attention in plain JAX: strips of queries against the keys that any of them sees, and a gradient that recomputes scores.

Training keeps q, k, v, o and the log of each softmax's normaliser, and recomputes the probabilities in the backward pass, as
FlashAttention does (Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4). Strips are cut at static positions, so that keys
after a strip's last query, or before its window, cost nothing. There is no running maximum, because a strip has all of its
keys. Within a strip the G query heads of a key-value head are rows of one product.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.attention import reference

# Short strips skip more keys, and long ones multiply faster. More strips than MAX_STRIPS only make compilation longer.
MIN_STRIP, MAX_STRIPS = 128, 16


def attention(q_BTNH, k_BSKH, v_BSKH, *, start=0, segments_BS=None, window=None, scale: float, softcap=None):
  """See the API. Without a cache, attention is computed in strips, with their gradient; with one, over all of its slots."""
  if isinstance(start, int) and start == 0 and q_BTNH.shape[1] == k_BSKH.shape[1]:
    return _strips(q_BTNH, k_BSKH, v_BSKH, segments_BS, window, scale, softcap)
  return _cached(q_BTNH, k_BSKH, v_BSKH, start, segments_BS, window, scale, softcap)


def refuses(q_BTNH, k_BSKH, v_BSKH, **_) -> str:
  """Why it cannot take this; '' if it can."""
  known = isinstance(q_BTNH.shape[1], int) and isinstance(k_BSKH.shape[1], int)
  return '' if known else 'it cuts strips of a number of queries that is known when it is traced'


def _cached(q_BTNH, k_BSKH, v_BSKH, start, segments_BS, window, scale, softcap):
  """The equation, in products that read a cache of layout (B, K, S, H) without copying it."""
  K = k_BSKH.shape[2]
  k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
  mask_BTS = reference.visible(q_BTNH.shape[1], k_BKSH.shape[2], start, segments_BS, window)
  scores_BKGTS = _capped(scale * _against_keys(_heads(q_BTNH, K), k_BKSH), softcap)
  p_BKGTS = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores_BKGTS, -jnp.inf), axis=-1)
  return _tokens(_times_keys(p_BKGTS.astype(v_BKSH.dtype), v_BKSH)).astype(v_BKSH.dtype)


def _spans(T: int, window: int | None):
  """(first query, end of queries, first key) of each strip. Its last key is that of its last query."""
  strip = max(MIN_STRIP, -(-T // MAX_STRIPS))
  for begin in range(0, T, strip):
    yield begin, min(begin + strip, T), 0 if window is None else max(0, begin - window + 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _strips(q_BTNH, k_BTKH, v_BTKH, segments_BT, window, scale, softcap):
  return _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, window, scale, softcap)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, window, scale, softcap):
  # With heads in front, strips are contiguous in memory, and batched products need no further transposition.
  q_BKGTH, k_BKTH, v_BKTH = _heads(q_BTNH, k_BTKH.shape[2]), k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
  o, lse = [], []
  for begin, end, first in _spans(q_BTNH.shape[1], window):
    s_BKGTS = _scores(q_BKGTH[..., begin:end, :], k_BKTH[:, :, first:end], segments_BT, (begin, end, first), window, scale,
                      softcap)
    m_BKGT1 = jnp.max(s_BKGTS, -1, keepdims=True)
    p_BKGTS = jnp.exp(s_BKGTS - m_BKGT1)
    z_BKGT1 = jnp.sum(p_BKGTS, -1, keepdims=True)
    o.append(_times_keys(p_BKGTS.astype(v_BKTH.dtype), v_BKTH[:, :, first:end]) / z_BKGT1)
    lse.append(m_BKGT1 + jnp.log(z_BKGT1))
  o_BTNH = _tokens(jnp.concatenate(o, -2)).astype(v_BTKH.dtype)
  return o_BTNH, (q_BKGTH, k_BKTH, v_BKTH, segments_BT, o_BTNH, jnp.concatenate(lse, -2))


def _backward(window, scale, softcap, saved, do_BTNH):
  """With p = softmax(s) and dp = do v^T: ds = p * (dp - sum(do * o)); algorithm 4, lines 13 to 22. Of a capped score s that
  is multiplied by its slope, 1 - (s / softcap)^2."""
  q_BKGTH, k_BKTH, v_BKTH, segments_BT, o_BTNH, lse_BKGT1 = saved
  _, K, _, T, _ = q_BKGTH.shape
  do_BKGTH = _heads(do_BTNH.astype(v_BKTH.dtype), K)
  product_BTN1 = jnp.sum(do_BTNH.astype(jnp.float32) * o_BTNH.astype(jnp.float32), -1, keepdims=True)
  delta_BKGT1 = _heads(product_BTN1, K)
  dq, dk_BKTH, dv_BKTH = [], jnp.zeros(k_BKTH.shape, jnp.float32), jnp.zeros(v_BKTH.shape, jnp.float32)
  for begin, end, first in _spans(T, window):
    q, do = q_BKGTH[..., begin:end, :], do_BKGTH[..., begin:end, :]
    k, v = k_BKTH[:, :, first:end], v_BKTH[:, :, first:end]
    s_BKGTS = _scores(q, k, segments_BT, (begin, end, first), window, scale, softcap)
    p_BKGTS = jnp.exp(s_BKGTS - lse_BKGT1[..., begin:end, :])
    ds_BKGTS = scale * p_BKGTS * (_against_keys(do, v) - delta_BKGT1[..., begin:end, :])
    if softcap is not None: ds_BKGTS = jnp.where(p_BKGTS > 0, ds_BKGTS * (1 - jnp.square(s_BKGTS / softcap)), 0)
    ds_BKGTS = ds_BKGTS.astype(q.dtype)
    dq.append(_times_keys(ds_BKGTS, k))
    dk_BKTH = dk_BKTH.at[:, :, first:end].add(_times_queries(ds_BKGTS, q))
    dv_BKTH = dv_BKTH.at[:, :, first:end].add(_times_queries(p_BKGTS.astype(do.dtype), do))
  dq_BTNH = _tokens(jnp.concatenate(dq, -2))
  return (dq_BTNH.astype(q_BKGTH.dtype), dk_BKTH.swapaxes(1, 2).astype(k_BKTH.dtype),
          dv_BKTH.swapaxes(1, 2).astype(v_BKTH.dtype), None)


_strips.defvjp(_forward, _backward)


def _heads(x_BTNH, K: int):
  B, T, N, H = x_BTNH.shape
  return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _tokens(x_BKGTH):
  B, K, G, T, H = x_BKGTH.shape
  return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _capped(scores, softcap):
  return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _scores(q_BKGTH, k_BKSH, segments_BT, span, window, scale, softcap):
  """scale * q k^T in float32, capped, -inf where a query does not see a key."""
  begin, end, first = span
  if segments_BT is not None: segments_BT = segments_BT[:, first:end]
  mask_BTS = reference.visible(end - begin, end - first, begin - first, segments_BT, window)
  return jnp.where(mask_BTS[:, None, None], _capped(scale * _against_keys(q_BKGTH, k_BKSH), softcap), -jnp.inf)


def _product(a, b, a_axis: int, b_axis: int):
  """Sums over one axis of each, for every sequence and key-value head (axes 0 and 1), in float32."""
  return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _rows(x_BKGTH):
  """The G heads of each group one after another, as rows."""
  B, K, G, T, H = x_BKGTH.shape
  return x_BKGTH.reshape(B, K, G * T, H)


def _against_keys(x_BKGTH, k_BKSH):
  B, K, G, T, _ = x_BKGTH.shape
  return _product(_rows(x_BKGTH), k_BKSH, 3, 3).reshape(B, K, G, T, -1)


def _times_keys(p_BKGTS, k_BKSH):
  B, K, G, T, _ = p_BKGTS.shape
  return _product(_rows(p_BKGTS), k_BKSH, 3, 2).reshape(B, K, G, T, -1)


def _times_queries(p_BKGTS, x_BKGTH):
  return _product(_rows(p_BKGTS), _rows(x_BKGTH), 2, 2)
