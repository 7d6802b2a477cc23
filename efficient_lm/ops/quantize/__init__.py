"""Rows to eight bits in one pass: plain, after RMS normalisation, after a Hadamard rotation, or after both.

Also what a key-value cache needs: heads and tokens to eight or four bits.
"""
import jax.numpy as jnp

from efficient_lm.lazy import lazy
from efficient_lm.ops import dispatch, mosaic
from efficient_lm.ops.quantize import reference, xla
from efficient_lm.ops.quantize.grid import SMALLEST, pack_halves

pallas_tpu = lazy('efficient_lm.ops.quantize.pallas_tpu')
pallas_gpu = lazy('efficient_lm.ops.quantize.pallas_gpu')


def quantize(x_MD, *, dtype=jnp.int8, norm_D=None, eps: float = 1e-6, hadamard: int | None = None,
             implementation: str = 'auto'):
  """values_MD, scale_M with y ≈ values * scale, where y is x, normalised if `norm_D`, rotated if `hadamard`.

    y_m = x_m;   y_m = y_m / sqrt(mean(y_m^2) + eps) * norm;   y_m = y_m H / sqrt(n) in each block of n numbers
    scale_m = max |y_m| / L;   values_m = round(y_m / scale_m)

  with L = 127 or 448. All of it is float32, and y itself is never stored. int8 rounds to the nearest integer, so that
  |y - values * scale| <= scale / 2; float8_e4m3fn to the nearest float8: half a step there is at most |y| / 16, or scale /
  1024 near 0. A row of zeros has values 0 and a tiny positive scale. Not differentiable: rounding has no useful gradient.

  Normalising is RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467); rotating spreads an outlier over its block before
  rounding (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456), and a weight rotated likewise takes it back: H H = n I.

  Args:
    x_MD: rows, float32 or bfloat16.
    dtype: of the values: int8 or float8_e4m3fn.
    norm_D: the scale of the normalisation; None does not normalise.
    eps: added to the mean square.
    hadamard: numbers in a block, a power of two that divides D; None does not rotate.
    implementation: 'auto' or one of IMPLEMENTATIONS.

  Returns:
    values_MD in `dtype`, scale_M in float32.
  """
  if jnp.dtype(dtype) not in (jnp.int8, jnp.float8_e4m3fn):
    raise ValueError(f'quantize to {jnp.dtype(dtype).name}: choose int8 or float8_e4m3fn')
  if hadamard is not None and (hadamard & (hadamard - 1) or hadamard < 2 or x_MD.shape[1] % hadamard):
    raise ValueError(f'quantize with hadamard = {hadamard}: must be a power of two that divides D = {x_MD.shape[1]}')
  return dispatch.run('quantize', IMPLEMENTATIONS, implementation, x_MD, dtype=jnp.dtype(dtype), norm_D=norm_D, eps=eps,
                      hadamard=hadamard)


def quantize_cache(x_BKSH, *, bits: int = 8, group: int = 1):
  """Keys or values for a cache: absmax per head and token, or per head and `group` consecutive tokens.

  Args:
    x_BKSH: (..., S, H), tokens and head dim last.
    bits: 8: int8 in [-127, 127], (..., S, H). 4: [-7, 7], two to a byte along H, uint8 (..., S, H / 2): see `pack_halves`.
    group: tokens that share a scale; divides S.

  Returns:
    values, and scale (..., S / group) in float32: x ≈ values * scale, at most half a scale away.
  """
  if bits not in (4, 8): raise ValueError(f'quantize_cache to {bits} bits: choose 4 or 8')
  limit = 2 ** (bits - 1) - 1
  *heads, S, H = x_BKSH.shape
  x_BKCJ = x_BKSH.astype(jnp.float32).reshape(*heads, S // group, group * H)
  scale_BKC1 = jnp.maximum(jnp.max(jnp.abs(x_BKCJ), axis=-1, keepdims=True), SMALLEST) / limit
  values = jnp.clip(jnp.round(x_BKCJ / scale_BKC1), -limit, limit).astype(jnp.int8).reshape(x_BKSH.shape)
  return values if bits == 8 else pack_halves(values), scale_BKC1[..., 0]


IMPLEMENTATIONS = {
  'pallas_tpu': mosaic.kernel(pallas_tpu, 'quantize', 'tpu'),
  'pallas_gpu': mosaic.kernel(pallas_gpu, 'quantize', ('hopper', 'blackwell')),
  'xla': dispatch.Implementation(xla.quantize),
  'reference': dispatch.Implementation(reference.quantize),
}
