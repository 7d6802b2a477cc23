"""Small parts of a layer: normalisation, rotary position embedding, activations."""
import functools
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


class LayerNorm(nnx.Module):
  """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias (Ba et al. 2016, eq. 4), over D, in float32; without a bias, if asked
  for."""

  def __init__(self, size: int, eps: float, bias: bool):
    self.scale, self.eps = nnx.Param(jnp.ones((size,)), axes='D'), eps
    self.bias = nnx.Param(jnp.zeros((size,)), axes='D') if bias else None

  def __call__(self, x):
    x_32 = x.astype(jnp.float32)
    centered = x_32 - jnp.mean(x_32, -1, keepdims=True)
    y = centered * jax.lax.rsqrt(jnp.mean(centered * centered, -1, keepdims=True) + self.eps) * self.scale.get_value()
    return (y if self.bias is None else y + self.bias.get_value()).astype(x.dtype)


def apply_rope(x_BTNH, positions_BT, theta: float, layout: str, scaling=None):
  """Rotary position embedding: rotates pair i of the H/2 pairs of each head by positions * theta**(-2i/H) (Su et al. 2021,
  eq. 15), in float32; with a `scaling` of `models.rope`, by its frequencies, and cos and sin have its magnitude."""
  *lead, H = x_BTNH.shape
  if scaling is None: frequency_H = theta ** (-jnp.arange(H // 2, dtype=jnp.float32) / (H // 2))
  else: frequency_H = scaling.frequencies(H, theta)
  angle_BTH = positions_BT[:, :, None] * frequency_H
  # The two numbers of a pair lie along one axis, and reversing it is the swap that a rotation needs. On CPU a step of a
  # dense model of 10M parameters took 1.11 s with halves concatenated, and 1.05 s so.
  pair, split = (-2, (2, H // 2)) if layout == 'half' else (-1, (H // 2, 2))
  x = x_BTNH.astype(jnp.float32).reshape(*lead, *split)
  cos, sin = (jnp.expand_dims(table_BTH[:, :, None], pair) for table_BTH in (jnp.cos(angle_BTH), jnp.sin(angle_BTH)))
  if scaling is not None and scaling.magnitude != 1: cos, sin = scaling.magnitude * cos, scaling.magnitude * sin
  rotated = x * cos + jnp.flip(x, pair) * jnp.concatenate([-sin, sin], pair)
  return rotated.reshape(x_BTNH.shape).astype(x_BTNH.dtype)


ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
  'relu': jax.nn.relu,
  'relu2': lambda x: jnp.square(jax.nn.relu(x)),
}


def gated(gate, up, activation: str = 'silu'):
  """activation(gate) * up; with silu the nonlinearity of SwiGLU (Shazeer 2020, eq. 6). Recomputed in the backward pass,
  which saves two arrays of their size and takes no longer: both read the same memory."""
  return jax.checkpoint(lambda gate, up: ACTIVATIONS[activation](gate) * up)(gate, up)
