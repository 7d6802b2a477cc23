"""Small parts of a layer: normalisation and rotary position embedding."""
import math

import jax.numpy as jnp
from flax import nnx

from efficient_lm.ops.rms_norm import rms_norm


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich 2019), over the last len(axes) dimensions."""

  def __init__(self, sizes: tuple[int, ...], axes: str, eps: float):
    self.scale, self.eps = nnx.Param(jnp.ones(sizes), axes=axes), eps

  def __call__(self, x):
    scale = self.scale.get_value()
    flat = x.reshape(*x.shape[:x.ndim - scale.ndim], math.prod(scale.shape))
    return rms_norm(flat, scale.reshape(-1), self.eps).reshape(x.shape)


def rotate(x_BTNH, positions_BT, theta: float, layout: str):
  """Turns pair i of the H/2 pairs of each head by positions * theta**(-2i/H) (Su et al. 2021, eq. 15), in float32."""
  half = x_BTNH.shape[-1] // 2
  frequency_H = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_H
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  x = x_BTNH.astype(jnp.float32)
  if layout == 'half':
    a, b = x[..., :half], x[..., half:]
    turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
  else:
    a, b = x[..., 0::2], x[..., 1::2]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)
  return turned.astype(x_BTNH.dtype)
