"""The product of a quantized matrix as its equation: the matrix is dequantized and multiplied in float32."""
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.quantized_matmul.storage import QuantizedMatrix, dequantize, quantize_rows


def quantized_matmul(x_MI, w: QuantizedMatrix, activations: str | None = None):
  """y = x @ w^T, with each row of x rounded if `activations` names a dtype."""
  x = x_MI.astype(jnp.float32)
  if activations is not None:
    q_MI, scale_M1 = quantize_rows(x, jnp.dtype(activations))
    x = q_MI.astype(jnp.float32) * scale_M1
  return jnp.matmul(x, dequantize(w).T, precision=lax.Precision.HIGHEST).astype(x_MI.dtype)


def input_gradient(g_MO, w: QuantizedMatrix):
  """dx = g @ w: the gradient treats the rounding of activations as the identity (Bengio et al. 2013, arXiv 1308.3432)."""
  return jnp.matmul(g_MO.astype(jnp.float32), dequantize(w), precision=lax.Precision.HIGHEST).astype(g_MO.dtype)
