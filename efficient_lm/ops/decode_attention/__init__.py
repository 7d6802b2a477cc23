"""Attention of one new token of each sequence over a cache, which may be quantized and may be stored in pages.

Models with grouped key-value heads decode by it; their caches are contiguous. No model uses pages.
"""
import jax

from efficient_lm.ops import dispatch, mosaic
from efficient_lm.ops.decode_attention import reference, xla


def decode_attention(q_BNH, k_BKSH, v_BKSH, lengths_B, *, k_scale_BKS=None, v_scale_BKS=None, page_table_BS=None,
                     window: int | None = None, scale: float | None = None, softcap: float | None = None,
                     k_shift=None, v_shift=None, implementation: str = 'auto'):
  """o_BNH = softmax(scale * q k^T) v over the slots first … length - 1 of each sequence, softmax in float32.

  first is 0, or max(0, length - window). Slots outside may hold any finite numbers. A sequence of length 0 has o = 0. Of the
  N = K * G query heads, k * G … k * G + G - 1 read key-value head k.

  A quantized cache holds integers, and a scale for each head and token, or for each head and group of successive tokens:
  k = k_int * k_scale. The scales multiply scores and probabilities, (q . k_int) * k_scale and (p * v_scale) v_int, so that
  the products read integers and no cache is dequantized (`ops.quantize.quantize_cache`). Or it has a scale and a shift for
  each tile of tokens and dims, k = k_int * scale + shift (`ops.quantize.quantize_tiles`). No kernel reads these.

  Decoding needs no gradient; asking for one raises NotImplementedError.

  Args:
    q_BNH: the queries, float32 or bfloat16; the dtype of the result.
    k_BKSH: keys, in float32, bfloat16, int8, or uint8. uint8 is (B, K, S, H / 2) with four bits a number, two to a byte
      along H, as halves (`ops.packing`): along H, so that a token is written without reading its neighbour; as halves, so
      that unpacking shuffles nothing. With a page table: k_PKQH, P pages of Q tokens, v_PKQH, and scales (P, K, Q).
    v_BKSH: values, stored as keys are; the head dim of the result is theirs.
    lengths_B: int32 tokens in each sequence's cache, the query's own included; at most S.
    k_scale_BKS, v_scale_BKS: float32, (B, K, S / group); None for a cache that is not quantized. With shifts: float16, (B,
      K, S / group, H / part), in pages (P, K, Q / group, H / part).
    k_shift, v_shift: as these scales; None for a cache without.
    page_table_BS: int32, (B, S / Q): the page of tokens s * Q … s * Q + Q - 1 of sequence b. Entries past the length are not
      used but must be valid pages.
    window: the number of tokens that the query sees at most, its own included.
    scale: of the scores; H ** -0.5 by default.
    softcap: bounds them, softcap * tanh(score / softcap); None: not at all.
    implementation: 'auto' or one of IMPLEMENTATIONS.

  Raises:
    ValueError: heads or head dims do not agree, or dtypes and scales do not suit each other; or see `dispatch.run`.
  """
  (_, N, H), K = q_BNH.shape, k_BKSH.shape[1]
  if N % K or k_BKSH.shape[3] * (2 if k_BKSH.dtype == 'uint8' else 1) != H:
    raise ValueError(f'decode_attention of {N} query heads of {H} on {K} key heads of shape {k_BKSH.shape}, {k_BKSH.dtype}: '
                     'heads must divide, and head dims agree (uint8 holds two numbers)')
  _check_scales(k_BKSH, v_BKSH, k_scale_BKS, v_scale_BKS)
  for scales, shift in ((k_scale_BKS, k_shift), (v_scale_BKS, v_shift)): _check_tiles(k_BKSH, H, scales, shift, k_shift)
  q_BNH, k_BKSH, v_BKSH, k_scale_BKS, v_scale_BKS = _without_gradient((q_BNH, k_BKSH, v_BKSH, k_scale_BKS, v_scale_BKS))
  return dispatch.run('decode_attention', IMPLEMENTATIONS, implementation, q_BNH, k_BKSH, v_BKSH, lengths_B.astype('int32'),
                      k_scale_BKS=k_scale_BKS, v_scale_BKS=v_scale_BKS, page_table_BS=page_table_BS, window=window,
                      scale=H ** -0.5 if scale is None else scale,
                      **dispatch.given(softcap=softcap, k_shift=k_shift, v_shift=v_shift))


def _check_scales(k_BKSH, v_BKSH, k_scale, v_scale):
  """Raises ValueError for dtypes that differ, and for scales that are missing or superfluous."""
  quantized = k_BKSH.dtype in ('int8', 'uint8')
  if k_BKSH.dtype != v_BKSH.dtype or quantized != (k_scale is not None) or quantized != (v_scale is not None):
    raise ValueError(f'decode_attention with keys in {k_BKSH.dtype} and values in {v_BKSH.dtype}: both need the same '
                     'dtype, and scales if and only if it is int8 or uint8')


def _check_tiles(k_BKSH, H: int, scale, shift, k_shift):
  """Raises ValueError for scales of tiles without shifts, or the reverse, and for tiles that do not divide the cache."""
  tiles = scale is not None and scale.ndim == 4
  if tiles != (shift is not None) or tiles != (k_shift is not None) or (tiles and shift.shape != scale.shape):
    raise ValueError('decode_attention needs shifts of keys and values, each in the shape of its scales, if and only if '
                     'these are of tiles, (B, K, groups, parts)')
  halves = 2 if k_BKSH.dtype == 'uint8' else 1
  if tiles and (k_BKSH.shape[2] % scale.shape[2] or H % scale.shape[3] or scale.shape[3] % halves):
    raise ValueError(f'decode_attention with scales {scale.shape} of {k_BKSH.shape[2]} tokens x {H} numbers: tiles must '
                     'divide them, and in four bits each half of the numbers')


@jax.custom_jvp
def _without_gradient(arrays):
  return arrays


@_without_gradient.defjvp
def _raise(primals, tangents):
  raise NotImplementedError('decode_attention has no gradient: train with ops.attention')


def _pallas_tpu():
  from efficient_lm.ops.decode_attention import pallas_tpu
  return pallas_tpu


def _pallas_gpu():
  from efficient_lm.ops.decode_attention import pallas_gpu
  return pallas_gpu


IMPLEMENTATIONS = {
  'pallas_tpu': mosaic.kernel(_pallas_tpu, 'decode_attention', 'tpu'),
  'pallas_gpu': mosaic.kernel(_pallas_gpu, 'decode_attention', 'hopper'),
  'blocks': dispatch.Implementation(xla.blocks, auto=('cpu',)),
  'xla': dispatch.Implementation(xla.whole),
  'reference': dispatch.Implementation(reference.decode_attention),
}
