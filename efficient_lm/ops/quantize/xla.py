"""Quantization of rows in plain JAX, arranged for XLA: each row is multiplied by the reciprocal of its scale."""
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.absmax import SMALL, largest, nearest, scale_of
from efficient_lm.ops.hadamard import hadamard


def quantize(x_MI, *, dtype, norm_I=None, eps: float = 1e-6, block: int | None = None):
  """See the API."""
  y_MI = x_MI.astype(jnp.float32)
  if norm_I is not None:
    y_MI = y_MI * lax.rsqrt(jnp.mean(y_MI * y_MI, axis=-1, keepdims=True) + eps) * norm_I.astype(jnp.float32)
  if block is not None: y_MI = hadamard(y_MI, block)
  scale_M1 = scale_of(jnp.max(jnp.abs(y_MI), axis=-1, keepdims=True), largest(dtype), SMALL)
  return nearest(y_MI * (1 / scale_M1), dtype), scale_M1[:, 0]
