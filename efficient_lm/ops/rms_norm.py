"""Root-mean-square normalisation (Zhang and Sennrich, 2019, arXiv 1910.07467, equation 4): the norm of every model here."""
import jax
import jax.numpy as jnp


def rms_norm(x, scale_D, eps: float = 1e-6):
  """y = x / sqrt(mean(x^2) + eps) * scale over the last dim; computed in float32, returned in the dtype of x.

  Args:
    x: (..., D).
    scale_D: (D,), or None for no scale.
    eps: added to the mean square.
  """
  x_32 = x.astype(jnp.float32)
  y = x_32 * jax.lax.rsqrt(jnp.mean(x_32 * x_32, axis=-1, keepdims=True) + eps)
  return (y if scale_D is None else y * scale_D).astype(x.dtype)
