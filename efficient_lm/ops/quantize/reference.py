"""Quantization of rows as its equations, in float32."""
import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops import absmax
from efficient_lm.ops.hadamard import sylvester


def quantize(x_MI, *, dtype, norm_I=None, eps: float = 1e-6, block: int | None = None):
  """y = x; y = rms_norm(y) * norm; y = y H / sqrt(block) in blocks; scale = max |y| / L; values = round(y / scale)."""
  y_MI = x_MI.astype(jnp.float32)
  if norm_I is not None:
    y_MI = y_MI * lax.rsqrt(jnp.mean(y_MI * y_MI, axis=-1, keepdims=True) + eps) * norm_I.astype(jnp.float32)
  if block is not None:
    y_MQJ = y_MI.reshape(y_MI.shape[0], -1, block)
    h_JJ = sylvester(block) * block ** -.5
    y_MI = jnp.einsum('MQJ,JP->MQP', y_MQJ, h_JJ, precision=jax.lax.Precision.HIGHEST).reshape(y_MI.shape)
  values_MI, scale_M1 = absmax.values_and_scale(y_MI, dtype, least=absmax.SMALL)
  return values_MI, scale_M1[:, 0]
