"""Small parts of a layer: normalisation and rotary position embedding."""
import math

import jax
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


def apply_rope(x_BTNH, positions_BT, theta: float, layout: str):
  """Rotary position embedding: rotates pair i of the H/2 pairs of each head by positions * theta**(-2i/H) (Su et al. 2021,
  eq. 15), in float32."""
  *lead, H = x_BTNH.shape
  angle_BTH = positions_BT[:, :, None] * theta ** (-jnp.arange(H // 2, dtype=jnp.float32) / (H // 2))
  # The two numbers of a pair lie along one axis, and reversing it is the swap that a rotation needs. On CPU a step of a
  # dense model of 10M parameters took 1.11 s with halves concatenated, and 1.05 s so.
  pair, split = (-2, (2, H // 2)) if layout == 'half' else (-1, (H // 2, 2))
  x = x_BTNH.astype(jnp.float32).reshape(*lead, *split)
  cos, sin = (jnp.expand_dims(table_BTH[:, :, None], pair) for table_BTH in (jnp.cos(angle_BTH), jnp.sin(angle_BTH)))
  rotated = x * cos + jnp.flip(x, pair) * jnp.concatenate([-sin, sin], pair)
  return rotated.reshape(x_BTNH.shape).astype(x_BTNH.dtype)


@jax.checkpoint
def gated(gate, up):
  """silu(gate) * up, the nonlinearity of SwiGLU (Shazeer 2020, eq. 6). Recomputed in the backward pass, which saves two
  arrays of their size and takes no longer: both read the same memory."""
  return jax.nn.silu(gate) * up
