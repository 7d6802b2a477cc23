"""Quantization of rows to eight bits in one pass, after RMS normalisation or a Hadamard rotation or both if asked for; and
quantization of keys and values for a cache, to eight or four bits.

Caches of models use `quantize_cache` and `quantize_tiles`. No model uses `quantize`.
"""
import jax.numpy as jnp

from efficient_lm.ops import absmax, dispatch, mosaic
from efficient_lm.ops.packing import pack_halves
from efficient_lm.ops.quantize import reference, xla


def quantize(x_MI, *, dtype=jnp.int8, norm_I=None, eps: float = 1e-6, block: int | None = None,
             implementation: str = 'auto'):
  """values_MI and scale_M with y ≈ values * scale, where y is x, normalised if `norm_I` is given and rotated if `block` is.

    y_m = x_m;   y_m = y_m / sqrt(mean(y_m^2) + eps) * norm;   y_m = y_m H / sqrt(n) in each block of n numbers
    scale_m = max |y_m| / L;   values_m = round(y_m / scale_m)

  with L = 127 or 448. All is computed in float32, and y itself is never stored. int8 is round-to-nearest (RTN), so that
  |y - values * scale| <= scale / 2. float8_e4m3fn errs by at most |y| / 16, or scale / 1024 near 0. A row of zeros has
  values 0 and a tiny positive scale. The operation is not differentiable: rounding has no useful gradient. No model uses it.

  Normalising is RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467). Rotating spreads an outlier over its block before
  rounding (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456); a product with a weight that is rotated likewise is the product
  without rotations, because H H = n times the identity.

  Args:
    x_MI: rows, float32 or bfloat16.
    dtype: of the values: int8 or float8_e4m3fn.
    norm_I: the scale of the normalisation, or None for no normalisation.
    eps: added to the mean square.
    block: numbers that are rotated together, a power of two that divides I, or None for no rotation.
    implementation: 'auto' or one of IMPLEMENTATIONS.

  Returns:
    values_MI in `dtype`, scale_M in float32.
  """
  if jnp.dtype(dtype) not in (jnp.int8, jnp.float8_e4m3fn):
    raise ValueError(f'quantize to {jnp.dtype(dtype).name}: choose int8 or float8_e4m3fn')
  if block is not None and (block & (block - 1) or block < 2 or x_MI.shape[1] % block):
    raise ValueError(f'quantize in Hadamard blocks of {block}: must be a power of two that divides {x_MI.shape[1]} numbers')
  return dispatch.run('quantize', IMPLEMENTATIONS, implementation, x_MI, dtype=jnp.dtype(dtype), norm_I=norm_I, eps=eps,
                      block=block)


def quantize_cache(x_BKSH, *, bits: int = 8, group: int = 1):
  """Keys or values for a cache, by absmax rounding per head and token, or per head and `group` successive tokens. The
  quantized caches of models use it.

  Args:
    x_BKSH: (..., S, H), tokens and head dim last.
    bits: 8 for int8 in [-127, 127], (..., S, H); 4 for codes in [-7, 7], two to a byte along H, uint8 (..., S, H / 2): see
      `packing.pack_halves`.
    group: tokens that share a scale; divides S.

  Returns:
    values, and scale (..., S / group) in float32. x ≈ values * scale, with an error of at most half a scale.
  """
  if bits not in (4, 8): raise ValueError(f'quantize_cache to {bits} bits: choose 4 or 8')
  *heads, S, H = x_BKSH.shape
  x_BKQJ = x_BKSH.reshape(*heads, S // group, group * H)
  values, scale_BKQ1 = absmax.values_and_scale(x_BKQJ, limit=2 ** (bits - 1) - 1, least=absmax.SMALL)
  values = values.reshape(x_BKSH.shape)
  return values if bits == 8 else pack_halves(values), scale_BKQ1[..., 0]


def quantize_tiles(x_BKSH, *, bits: int = 4, group: int, part: int):
  """Keys or values for a cache, from the smallest to the largest number of each tile of `group` tokens x `part` dims.

    scale = (max - min) / (2^bits - 1);   shift = (max + min + scale) / 2;   values = round((x - shift) / scale)

  Some channels of keys are large in all tokens (KIVI, Liu et al. 2024, arXiv 2402.02750, section 3.1): with a scale and a
  shift of their own, part = 1, they do not widen the steps of the others. A shift is a zero point in the unit of the
  numbers, so that it need not lie on the grid.

  Args:
    x_BKSH: (..., S, H), tokens and head dim last.
    bits: 8 for int8, (..., S, H); 4 for two codes to a byte along H, uint8 (..., S, H / 2): see `packing.pack_halves`.
    group: tokens that share a scale; divides S.
    part: successive dims that share a scale; divides H, and of 4 bits H / 2.

  Returns:
    values, and scale and shift (..., S / group, H / part) in float16. x ≈ values * scale + shift, with an error of at most
    half a scale and what rounding to float16 adds: 2^-11 of the tile's largest number, as if the cache were in float16.
    What is outside of float16's range, 65504, is cut off.
  """
  *heads, S, H = x_BKSH.shape
  if bits not in (4, 8): raise ValueError(f'quantize_tiles to {bits} bits: choose 4 or 8')
  if S % group or H % part or (bits == 4 and H // 2 % part):
    raise ValueError(f'quantize_tiles of {S} x {H} numbers in tiles of {group} x {part}: must divide, in 4 bits half of {H}')
  most = float(jnp.finfo(jnp.float16).max)
  x = jnp.clip(x_BKSH.astype(jnp.float32), -most, most).reshape(*heads, S // group, group, H // part, part)
  low, high = (reduce(x, axis=(-3, -1), keepdims=True) for reduce in (jnp.min, jnp.max))
  # The codes are for the scales as they are stored. The least scale is the least positive number of float16.
  scale = jnp.maximum((high - low) / (2 ** bits - 1), 2. ** -24).astype(jnp.float16)
  step = scale.astype(jnp.float32)
  shift = jnp.clip((high + low + step) / 2, -most, most).astype(jnp.float16)
  limit = 2 ** (bits - 1)
  values = absmax.nearest((x - shift.astype(jnp.float32)) / step, limit=limit - 1, lowest=-limit).reshape(x_BKSH.shape)
  flat = lambda y: y[..., 0, :, 0]
  return values if bits == 8 else pack_halves(values), flat(scale), flat(shift)


def _pallas_tpu():
  from efficient_lm.ops.quantize import pallas_tpu
  return pallas_tpu


def _pallas_gpu():
  from efficient_lm.ops.quantize import pallas_gpu
  return pallas_gpu


IMPLEMENTATIONS = {
  'pallas_tpu': mosaic.kernel(_pallas_tpu, 'quantize', 'tpu'),
  'pallas_gpu': mosaic.kernel(_pallas_gpu, 'quantize', ('hopper', 'blackwell')),
  'xla': dispatch.Implementation(xla.quantize),
  'reference': dispatch.Implementation(reference.quantize),
}
