"""Quantization of rows on Hopper and later: a row is read once, stays in the registers of a warpgroup, and is written once
as bytes. Rows arrive by a ring of asynchronous copies (TMA), so that some are under way while one is processed.

A Hadamard product of n = f1 f2 … fp numbers takes p passes (H_ab = H_a ⊗ H_b), each of sums and differences among f numbers
that one thread holds; between passes threads exchange the row through shared memory. It takes log2(n) float32 additions a
number, and no tensor core: bfloat16 products of a float32 row would need three parts and operands of 64 rows. A rotated
number has the error of log2(n) additions. Numbers of 16 bits are read two at a time, and bytes are written four at a time.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from efficient_lm.ops.absmax import SMALL, largest
from efficient_lm.ops.quantize.tiles import SHARED_MEMORY, GpuTiles, factors_for, gpu_tiles_for, padded, shared_memory

# The registers of a thread hold at most 128 numbers of the row in float32, beside other values.
LONGEST = 16384
LINE = 256   # numbers: no dimension of a copy may be longer, so that a row is several lines


def refuses(x_MI, *, norm_I=None, block=None, **_) -> str:
  """Why this kernel cannot take these arguments, or ''."""
  I = x_MI.shape[1]
  if not hasattr(plgpu, 'InterpretGPUParams'): return 'needs jax 0.11'
  if I % 512 or I > LONGEST: return f'rows of {I} numbers: must be a multiple of 512, at most {LONGEST}'
  if block is None: return ''
  factors = factors_for(I, block, x_MI.dtype.itemsize)
  if not factors: return f'no passes of a warpgroup for Hadamard blocks of {block} in rows of {I} numbers'
  tiles = gpu_tiles_for(x_MI.shape[0], I, x_MI.dtype.itemsize)
  if shared_memory(tiles, I, x_MI.dtype.itemsize, factors) > SHARED_MEMORY: return f'a row of {I} numbers does not fit'
  return ''


def quantize(x_MI, *, dtype, norm_I=None, eps: float = 1e-6, block: int | None = None, tiles: GpuTiles | None = None):
  """See the API."""
  M, I = x_MI.shape
  tiles = tiles or gpu_tiles_for(M, I, x_MI.dtype.itemsize)
  if block is not None: return _rotated(x_MI, norm_I, dtype, eps, factors_for(I, block, x_MI.dtype.itemsize), tiles)
  row = (I // LINE, LINE)
  operands = [x_MI.reshape(M, *row)]
  if norm_I is not None: operands.append(norm_I.astype(jnp.float32).reshape(row))
  scratch = dict(x=plgpu.SMEM((tiles.stages, *row), x_MI.dtype), values=plgpu.SMEM((2, *row), dtype),
                 barriers=plgpu.Barrier(num_barriers=tiles.stages))
  values, scale_M = plgpu.kernel(
    functools.partial(_kernel, tiles=tiles, eps=eps, normalised=norm_I is not None, dtype=dtype),
    out_type=(jax.ShapeDtypeStruct((M, *row), dtype), jax.ShapeDtypeStruct((M,), jnp.float32)),
    grid=(pl.cdiv(M, tiles.rows),), grid_names=('rows',), scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(), kernel_name='quantize',
  )(*operands)
  return values.reshape(M, I), scale_M


def _kernel(x_ref, *refs, tiles: GpuTiles, eps: float, normalised: bool, dtype, x, values, barriers):
  *norm, values_ref, scale_ref = refs
  (M, *shape), stages = x_ref.shape, tiles.stages
  first = lax.axis_index('rows') * tiles.rows
  count = jnp.minimum(M - first, tiles.rows)
  strided = plgpu.Layout.WG_STRIDED(tuple(shape), vec_size=4)
  if normalised: norm_I = plgpu.layout_cast(norm[0][...], strided)

  def fetch(i):
    slot = lax.rem(i, stages)
    pl.when(i < count)(lambda: plgpu.copy_gmem_to_smem(x_ref.at[first + i], x.at[slot], barriers.at[slot]))

  for i in range(stages): fetch(jnp.int32(i))

  def row(i, _):
    slot, out = lax.rem(i, stages), lax.rem(i, 2)
    plgpu.barrier_wait(barriers.at[slot])
    y_I = plgpu.layout_cast(x[slot], strided).astype(jnp.float32)
    if normalised:
      y_I = y_I * lax.rsqrt(jnp.sum(y_I * y_I) * (1 / math.prod(shape)) + eps) * norm_I
    # `absmax.scale_of` and `absmax.nearest` with products in place of quotients, which a GPU has no instruction for.
    scale = jnp.maximum(jnp.max(jnp.abs(y_I)), SMALL) * (1 / largest(dtype))
    y_I = y_I * (1 / scale)
    if dtype == jnp.int8: y_I = jnp.round(y_I)
    limit = largest(dtype)
    y_I = jnp.minimum(jnp.maximum(y_I, -limit), limit)
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    values[out] = y_I.astype(dtype)
    scale_ref[first + i] = scale
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values.at[out], values_ref.at[first + i])
    fetch(i + stages)

  lax.fori_loop(0, count, row, None)
  plgpu.wait_smem_to_gmem(0)


def _rotated(x_MI, norm_I, dtype, eps: float, factors: tuple[int, ...], tiles: GpuTiles):
  """`quantize` with a rotation. A row is (blocks, f1, …, fp) numbers; as words of int32 it is (blocks, f1, …, fp / 2) if its
  numbers have 16 bits, and the values of a row are (blocks, f1, …, fp / 4)."""
  (M, I), size = x_MI.shape, math.prod(factors)
  pairs = x_MI.dtype.itemsize == 2
  row = (I // size, *factors)
  words = lambda count: (*row[:-1], factors[-1] // count)
  x = x_MI.reshape(M, *row)
  if pairs: x = lax.bitcast_convert_type(x.reshape(M, *words(2), 2), jnp.int32)
  operands = [x]
  if norm_I is not None: operands.append(norm_I.astype(jnp.float32).reshape(words(2) + (2,) if pairs else row))
  scratch = dict(x=plgpu.SMEM((tiles.stages, *x.shape[1:]), x.dtype), values=plgpu.SMEM((2, *words(4)), jnp.int32),
                 z=plgpu.SMEM(padded(row), jnp.float32), barriers=plgpu.Barrier(num_barriers=tiles.stages))
  values, scale_M = plgpu.kernel(
    functools.partial(_rotated_kernel, factors=factors, tiles=tiles, eps=eps, normalised=norm_I is not None, dtype=dtype),
    out_type=(jax.ShapeDtypeStruct((M, *words(4)), jnp.int32), jax.ShapeDtypeStruct((M,), jnp.float32)),
    grid=(pl.cdiv(M, tiles.rows),), grid_names=('rows',), scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(), kernel_name='quantize_rotated',
  )(*operands)
  return lax.bitcast_convert_type(values, dtype).reshape(M, I), scale_M


def _rotated_kernel(x_ref, *refs, factors: tuple[int, ...], tiles: GpuTiles, eps: float, normalised: bool, dtype, x, z,
                    values, barriers):
  *norm, values_ref, scale_ref = refs
  M, stages, size = x_ref.shape[0], tiles.stages, math.prod(factors)
  I = x_ref.shape[1] * size
  first = lax.axis_index('rows') * tiles.rows
  count = jnp.minimum(M - first, tiles.rows)

  def fetch(i):
    slot = lax.rem(i, stages)
    pl.when(i < count)(lambda: plgpu.copy_gmem_to_smem(x_ref.at[first + i], x.at[slot], barriers.at[slot]))

  for i in range(stages): fetch(jnp.int32(i))

  def row(i, _):
    slot, out = lax.rem(i, stages), lax.rem(i, 2)
    plgpu.barrier_wait(barriers.at[slot])
    squares = _first_pass(x.at[slot], norm, z, factors)
    for axis in range(2, len(factors)): _middle_pass(z, factors, axis)
    y, absmax = _last_pass(z, factors, x.dtype == jnp.int32)
    unit = size ** -.5
    if normalised: unit *= lax.rsqrt(squares * (1 / I) + eps)
    scale = jnp.maximum(absmax * unit, SMALL) * (1 / largest(dtype))
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    packed = values.at[out]
    for word in range(factors[-1] // 4):
      packed[..., pl.ds(word, 1)] = _word(y[4 * word:4 * word + 4], unit / scale, dtype)
    scale_ref[first + i] = scale
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(packed, values_ref.at[first + i])
    fetch(i + stages)

  lax.fori_loop(0, count, row, None)
  plgpu.wait_smem_to_gmem(0)


def _load(ref):
  """Loads a buffer into registers, consecutive numbers into consecutive threads."""
  return plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED(ref.shape, vec_size=1))


def _butterflies(y: list) -> list:
  """The Hadamard product along the list, by H_2m = [[H_m, H_m], [H_m, -H_m]]."""
  if len(y) == 1: return y
  half = len(y) // 2
  low, high = y[:half], y[half:]
  return (_butterflies([a + b for a, b in zip(low, high)]) + _butterflies([a - b for a, b in zip(low, high)]))


def _first_pass(x, norm, z, factors):
  """Rotates x along f1 into z, where the first number of each pair lies in the first half of fp. Returns the sum of the
  squares of x if x is to be normalised; the factor that follows from it is applied in the last pass."""
  pairs, squares = x.dtype == jnp.int32, 0.
  words = [_load(x.at[:, j]) for j in range(factors[0])]
  for parity in range(1 + pairs):
    if not pairs: y = words
    # The upper 16 bits of a float32 are a bfloat16.
    else: y = [lax.bitcast_convert_type(word & jnp.int32(-65536) if parity else word << 16, jnp.float32) for word in words]
    if norm:
      squares = sum((one * one for one in y), squares)
      y = [one * _load(norm[0].at[(slice(None), j, ..., *[parity] * pairs)]) for j, one in enumerate(y)]
    width = factors[-1] // (1 + pairs)
    for j, one in enumerate(_butterflies(y)): z[:, j, ..., pl.ds(parity * width, width)] = one
  plgpu.commit_smem()
  return jnp.sum(squares) if norm else None


def _middle_pass(z, factors, axis: int):
  """Rotates z along a factor in the middle, in place."""
  at = lambda j: (slice(None), pl.ds(0, factors[0]), *[slice(None)] * (axis - 2), j, ..., pl.ds(0, factors[-1]))
  y = _butterflies([_load(z.at[at(j)]) for j in range(factors[axis - 1])])
  for j, one in enumerate(y): z[at(j)] = one
  plgpu.commit_smem()


def _last_pass(z, factors, pairs: bool):
  """Rotates z along fp. Returns a list of fp arrays (blocks, f1, …, 1), and the largest magnitude."""
  width = factors[-1]
  places = [j // 2 + j % 2 * (width // 2) if pairs else j for j in range(width)]
  y = _butterflies([_load(z.at[:, pl.ds(0, factors[0]), ..., pl.ds(place, 1)]) for place in places])
  return y, jnp.max(functools.reduce(jnp.maximum, map(jnp.abs, y)))


def _word(y: list, factor, dtype):
  """Four numbers times the factor, as the bytes of an int32, the first one in the lowest byte. They exceed the largest value
  by float32 roundings at most, which the rounding to bytes removes."""
  if dtype == jnp.int8:
    # The last bit of a float32 of this size stands for 1, so that the addition rounds to even and leaves the integer in the
    # lowest byte.
    codes = [lax.bitcast_convert_type(one * factor + 1.5 * 2 ** 23, jnp.int32) for one in y]
  else:
    codes = [lax.bitcast_convert_type((one * factor).astype(dtype), jnp.int8).astype(jnp.int32) for one in y]
  byte = [code & 255 for code in codes[:3]] + codes[3:]
  return byte[0] | byte[1] << 8 | byte[2] << 16 | byte[3] << 24
