"""Why the kernels refuse arguments, in words, without importing the kernels."""
import jax
import jax.numpy as jnp


def gpu(hidden_BTD, head_DV, *_, **__) -> str:
  """Why the Hopper kernel cannot take this; '' if it can."""
  (B, T, D), V = hidden_BTD.shape, head_DV.shape[1]
  if jax.__version_info__ < (0, 11): return 'needs jax 0.11, this is ' + jax.__version__
  # float16 is refused: a gradient of 1e-8, as a likely token's logit has in a batch of a million tokens, would become 0.
  if not hidden_BTD.dtype == head_DV.dtype == jnp.bfloat16:
    return f'multiplies bfloat16, not {hidden_BTD.dtype} with {head_DV.dtype}'
  if D % 64 or V % 8: return f'D must be a multiple of 64 and V one of 8, for 16-byte strides; they are {D} and {V}'
  if B * T < 128 or V < 256: return f'{B * T} tokens and a vocabulary of {V} do not fill one tile of 128 x 256'
  return ''


def tpu(hidden_BTD, head_DV, *_, **__) -> str:
  """Why the TPU kernel cannot take this; '' if it can."""
  (B, T, D), V = hidden_BTD.shape, head_DV.shape[1]
  if hidden_BTD.dtype != head_DV.dtype or hidden_BTD.dtype not in (jnp.bfloat16, jnp.float32):
    return f'multiplies bfloat16 or float32, not {hidden_BTD.dtype} with {head_DV.dtype}'
  if D % 128: return f'D must be a multiple of 128, and is {D}'
  if B * T < 16 or V < 128: return f'{B * T} tokens and a vocabulary of {V} do not fill one tile of 16 x 128'
  return ''
