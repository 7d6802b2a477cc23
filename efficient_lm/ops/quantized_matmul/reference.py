"""The product of a quantized matrix as its equation: dequantise, then multiply in float32."""
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.quantized_matmul.storage import QuantizedMatrix, dequantize, quantize_rows


def quantized_matmul(x_MK, w: QuantizedMatrix, activations: str | None = None):
  """y = x @ w^T, of x rounded row by row if `activations` names a dtype."""
  x = x_MK.astype(jnp.float32)
  if activations is not None:
    q_MK, scale_M1 = quantize_rows(x, jnp.dtype(activations))
    x = q_MK.astype(jnp.float32) * scale_M1
  return jnp.matmul(x, dequantize(w).T, precision=lax.Precision.HIGHEST).astype(x_MK.dtype)


def input_gradient(g_MN, w: QuantizedMatrix):
  """dx = g @ w: rounding the activations counts as the identity (Bengio et al. 2013)."""
  return jnp.matmul(g_MN.astype(jnp.float32), dequantize(w), precision=lax.Precision.HIGHEST).astype(g_MN.dtype)
