"""Causal attention with grouped key-value heads, sliding windows, packed documents and a cache offset.

All models attend by it in training, and when they read a prompt.
"""
import jax

from efficient_lm.ops import dispatch, mosaic
from efficient_lm.ops.attention import cudnn, reference, xla


def attention(q_BTNH, k_BSKH, v_BSKH, *, start=0, segments_BS=None, window: int | None = None,
              scale: float | None = None, softcap: float | None = None, implementation: str = 'auto'):
  """o_BTNH = softmax(scale * q k^T) v over the visible keys, softmax in float32. Differentiable in q, k and v.

  Query t is the token at key index start + t. It sees key s iff s <= start + t; and start + t - s < window, when a
  window is given; and segments_BS[b, s] == segments_BS[b, start + t], when segments are given.

  Args:
    q_BTNH: queries; of the N = K * G heads, k * G … k * G + G - 1 read key-value head k.
    k_BSKH: keys. Training has S = T; decoding has a cache of S slots, and those past start + T are never seen.
    v_BSKH: values; their head dim may differ from that of queries and keys, and is that of the result.
    start: key index of the first query: an int, or a traced int32 scalar; start + T <= S.
    segments_BS: int32 document ids, for packed sequences.
    window: the number of keys a query sees at most, itself included.
    scale: of the scores; H ** -0.5 by default.
    softcap: bounds them, softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118, section 2); None: not at all.
    implementation: 'auto', 'reference', 'xla', 'cudnn' (NVIDIA GPUs) or 'splash' (TPU) for training, or 'jax' for
      jax.nn.dot_product_attention.

  Raises:
    ValueError: K does not divide N, or there are more queries than keys; or see `dispatch.run`.
  """
  (T, N, H), (S, K) = q_BTNH.shape[1:], k_BSKH.shape[1:3]
  if N % K or T > S:
    raise ValueError(f'attention of {N} query heads on {K} key heads, {T} queries on {S} keys: '
                     'heads must divide, and every query needs its own key')
  scale = H ** -0.5 if scale is None else scale
  return dispatch.run('attention', IMPLEMENTATIONS, implementation, q_BTNH, k_BSKH, v_BSKH, start=start,
                      segments_BS=segments_BS, window=window, scale=scale, **dispatch.given(softcap=softcap))


def _jax(q_BTNH, k_BSKH, v_BSKH, *, start, segments_BS, window, scale):
  mask_BTS = reference.visible(q_BTNH.shape[1], k_BSKH.shape[1], start, segments_BS, window)
  return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], scale=scale)


def _refused_by_jax(q_BTNH, k_BSKH, v_BSKH, *, softcap=None, **_) -> str:
  if softcap is not None: return 'it has no soft cap'
  return '' if v_BSKH.shape[-1] == k_BSKH.shape[-1] else 'values and keys need the same head dim'


def _splash():
  from efficient_lm.ops.attention import splash
  return splash


IMPLEMENTATIONS = {
  # Training on accelerators uses the kernels of cuDNN and of JAX. What these refuse, such as a cache, is plain JAX.
  'cudnn': dispatch.Implementation(cudnn.attention, on=('gpu',), refuses=cudnn.refuses),
  'splash': mosaic.kernel(_splash, 'attention', 'tpu'),
  'xla': dispatch.Implementation(xla.attention, refuses=xla.refuses),
  'jax': dispatch.Implementation(_jax, refuses=_refused_by_jax),
  'reference': dispatch.Implementation(reference.attention),
}
