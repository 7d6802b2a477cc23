"""Training attention of cuDNN on NVIDIA GPUs, through `jax.nn.dot_product_attention`: fused, forward and backward.

Head dims that cuDNN does not take are padded with zeros, which change no score and no value. Without documents, the causal
mask and the window are cuDNN's own, and masked blocks are skipped. Documents are a boolean mask, (B, 1, T, T), which
`dot_product_attention` adds as a bias in 16 bits: B * T * T * 2 bytes, read once for each head. cuDNN then skips blocks of
later keys, but not those of other documents. It takes no window beside a bias, so that the mask contains the window too.

cuDNN also supports packed sequences, given by the offsets of their documents. JAX offers these through a private function
only. It needs a static bound on the number of documents of a row, by which it multiplies the log-normalisers that are kept
for the backward pass, and in JAX 0.10.2 it takes wrong offsets for grouped heads. For these reasons documents are a mask.

The tests run this preparation of arguments with XLA's attention in place of cuDNN's. The calls of cuDNN were compiled for an
H200, which does not prove that cuDNN accepts them. cuDNN itself has not run.
"""
import jax
import jax.numpy as jnp

from efficient_lm.ops import dispatch
from efficient_lm.ops.attention import reference


def attention(q_BTNH, k_BTKH, v_BTKH, *, start=0, segments_BS=None, window=None, scale: float,
              implementation: str = 'cudnn'):
  """See the API. implementation: of `jax.nn.dot_product_attention`."""
  T, H, value = q_BTNH.shape[1], q_BTNH.shape[-1], v_BTKH.shape[-1]
  q, k, v = (_filled(x, _width(H, value)) for x in (q_BTNH, k_BTKH, v_BTKH))
  if window is not None and window >= T: window = None
  mask, local = None, None
  if segments_BS is not None: mask = reference.visible(T, T, 0, segments_BS, window)[:, None]
  elif window is not None: local = window - 1, 0   # keys before and after a query's own
  o_BTNH = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=True, local_window_size=local,
                                        implementation=implementation)
  return o_BTNH[..., :value]


def refuses(q_BTNH, k_BSKH, v_BSKH, *, start, segments_BS, window, scale, softcap=None) -> str:
  """Why cuDNN cannot take such arguments, '' if it can."""
  here, width, T = dispatch.device(), _width(q_BTNH.shape[-1], v_BSKH.shape[-1]), q_BTNH.shape[1]
  limit = 256 if {'hopper', 'blackwell'} & set(here.families) else 128
  if softcap is not None: return 'it has no soft cap'
  if not here.kind.startswith('NVIDIA'): return f'{here.kind} has no cuDNN'
  # JAX asks cuDNN and the GPU what they can do while it traces, not when it compiles for a mesh's devices.
  if jax.default_backend() != 'gpu': return 'it is traced on a machine with a GPU only'
  if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16): return f'queries are {q_BTNH.dtype}, neither bfloat16 nor float16'
  if width > limit: return f'head dims are {width} where cuDNN takes {limit} at most'
  if not (isinstance(start, int) and start == 0) or k_BSKH.shape[1] != T: return 'it is for training, without a cache'
  if segments_BS is not None and T % 2: return f'with documents it needs an even number of tokens, not {T}'
  # Before, the gradient by the mask was computed as well.
  if segments_BS is not None and jax.__version_info__ < (0, 11): return 'with documents it needs jax 0.11'
  return ''


def _width(H: int, value: int) -> int:
  """One head dim for queries, keys and values, a multiple of 8."""
  return -(-max(H, value) // 8) * 8


def _filled(x_BTNH, width: int):
  return jnp.pad(x_BTNH, ((0, 0), (0, 0), (0, 0), (0, width - x_BTNH.shape[-1])))
