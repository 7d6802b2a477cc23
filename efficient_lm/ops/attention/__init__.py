"""Causal attention with grouped key-value heads, sliding windows, packed documents and a cache offset."""

import jax

from efficient_lm.ops import dispatch
from efficient_lm.ops.attention import reference, xla


def attention(q_BTNH, k_BSKH, v_BSKH, *, start=0, segments_BS=None, window: int | None = None,
              scale: float | None = None, implementation: str = 'auto') -> jax.Array:
  """o_BTNH = softmax(scale * q k^T + mask) v, softmax in float32. Differentiable in q, k and v.

  Query t is the token at key index start + t. Key s is visible iff s <= start + t; and start + t - s < window, when a
  window is given; and segments_BS[b, s] == segments_BS[b, start + t], when segments are given.

  Args:
    q_BTNH: queries; N = K * G heads, those of key-value head k are k * G ... k * G + G - 1.
    k_BSKH: keys. Training has S = T; decoding has a cache of S slots, of which those past start + T are never seen.
    v_BSKH: values; their head dim may differ from that of queries and keys, and is the head dim of the result.
    start: key index of the first query; an int, or a traced int32 scalar.
    segments_BS: int32 document ids, for packed sequences.
    window: how many keys a query sees at most, itself included.
    scale: of the scores; default H ** -0.5.
    implementation: 'auto', 'reference' or 'xla'.
  """
  run = dispatch.choose('attention', _IMPLEMENTATIONS, implementation, {'': 'xla'})
  return run(q_BTNH, k_BSKH, v_BSKH, start=start, segments_BS=segments_BS, window=window, scale=scale)


_IMPLEMENTATIONS = {'reference': reference.attention, 'xla': xla.attention}
