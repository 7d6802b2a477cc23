"""Quantization of rows as its equations, in float32."""
import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.quantize.grid import as_values, hadamard_matrix, step_of


def quantize(x_MD, *, dtype, norm_D=None, eps: float = 1e-6, hadamard: int | None = None):
  """y = x; y = rms_norm(y) * norm; y = y H in blocks; scale = max |y| / largest value; values = round(y / scale)."""
  y_MD = x_MD.astype(jnp.float32)
  if norm_D is not None:
    y_MD = y_MD * lax.rsqrt(jnp.mean(y_MD * y_MD, axis=-1, keepdims=True) + eps) * norm_D.astype(jnp.float32)
  if hadamard is not None:
    y_MCQ = y_MD.reshape(y_MD.shape[0], -1, hadamard)
    h_QQ = hadamard_matrix(hadamard) * hadamard ** -.5
    y_MD = jnp.einsum('MCQ,QP->MCP', y_MCQ, h_QQ, precision=jax.lax.Precision.HIGHEST).reshape(y_MD.shape)
  scale_M1 = step_of(jnp.max(jnp.abs(y_MD), axis=-1, keepdims=True), dtype)
  return as_values(y_MD / scale_M1, dtype), scale_M1[:, 0]
