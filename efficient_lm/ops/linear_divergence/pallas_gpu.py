"""Mosaic GPU kernels for Hopper: the product of the cross-entropy, whose epilogue has the student's logits in registers and
reads those of another array from memory. See vocabulary.py for what is computed from both, and the kernels of the
cross-entropy for the tiles.

An epilogue processes 32 columns at a time, so that registers are left beside the logits of a tile, which take 128 registers
of a thread: with 64 columns the compiler spills. Forward, a tile leaves up to three values for each token,
[V / columns, 3, M] float32 in all, which XLA combines.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from efficient_lm.ops.linear_cross_entropy.pallas_gpu import ROW, persistent, product, swizzled
from efficient_lm.ops.linear_divergence import equations, vocabulary
from efficient_lm.ops.linear_divergence.equations import NONE, Measure
from efficient_lm.ops.linear_divergence.tiles import WIDTH, GpuTiles, gpu_tiles_for


def _sweep(measure: Measure, hidden_MD, head_DV, other_MC, start, tiles: GpuTiles):
  M, V, width = hidden_MD.shape[0], head_DV.shape[1], other_MC.shape[1]
  num_values = 1 if measure.kind == 'rest' else 3

  def epilogue(logits, rows, n, half, out, smem):
    other_gmem, result_gmem = out
    values = None
    for _, _, student, other in _slices(logits, other_gmem, rows, n, tiles):
      # Past the end of the vocabulary the other array is NONE, and the copies read zeros for head: the student becomes NONE
      # too.
      if V % tiles.columns: student = jnp.where(other < NONE / 2, NONE, student)
      more = _of_columns(measure, student, other)
      values = more if values is None else equations.combined(values, more)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for i, value in enumerate(values): smem[half, i] = value
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.at[half], result_gmem.at[n, :, rows])

  def body(hidden, head, other, start, result):
    smem = plgpu.SMEM((2, num_values, tiles.rows), jnp.float32)
    product(hidden, head, start[0], width, tiles, smem, functools.partial(epilogue, out=(other, result)))

  result = jax.ShapeDtypeStruct((pl.cdiv(width, tiles.columns), num_values, M), jnp.float32)
  parts = persistent(body, result, 'linear_divergence_sweep')(
    hidden_MD, head_DV, _padded(other_MC, tiles), jnp.reshape(start, 1).astype(jnp.int32))
  of_first, *more = (parts[:, i] for i in range(num_values))
  total = jax.nn.logsumexp(of_first, axis=0)
  if measure.kind == 'rest': return (total,)
  of_second, mean = more
  return total, jax.nn.logsumexp(of_second, axis=0), jnp.sum(jnp.exp(of_first - total) * mean, axis=0)


def _slices(logits, other_gmem, rows, n, tiles: GpuTiles):
  """For each slice of WIDTH columns of a tile: its number, its first column in the chunk, the student's logits, and those of
  the other array."""
  for i in range(tiles.columns // WIDTH):
    at = n * tiles.columns + i * WIDTH
    other = plgpu.load(other_gmem.at[rows, pl.ds(at, WIDTH)], layout=plgpu.Layout.WGMMA, optimized=False)
    yield i, at, logits[:, i * WIDTH:(i + 1) * WIDTH], other


def _padded(other_MC, tiles: GpuTiles):
  """The other array, padded with NONE to whole tiles, because epilogues read whole tiles also of the last chunk."""
  return jnp.pad(other_MC, ((0, 0), (0, -other_MC.shape[1] % tiles.columns)), constant_values=NONE)


def _of_columns(measure: Measure, student, other) -> tuple:
  """The values of some columns, one of each for every token: see `vocabulary.Kernels.sweep`."""
  student = measure.tempered(student)
  if measure.kind == 'rest': return _logsumexp(student + other)[:1]
  other = measure.tempered(other)
  first, second = (other, student) if measure.kind == 'forward_kl' else (student, other)
  of_first, total, terms = _logsumexp(first)
  mean = (terms * (first - second)).sum(axis=1) / total
  return of_first, _logsumexp(second)[0], mean


def _logsumexp(x):
  """The logsumexp over columns, the sum relative to its largest term, and the terms of that sum."""
  largest = x.max(axis=1)
  terms = jnp.exp(x - lax.broadcast_in_dim(largest, x.shape, [0]))
  total = terms.sum(axis=1)
  return largest + jnp.log(total), total, terms


def _dlogits(measure: Measure, hidden_MD, head_DV, other_MC, per_token, start, tiles: GpuTiles):
  dtype, width = hidden_MD.dtype, other_MC.shape[1]

  def epilogue(logits, rows, n, half, out, smem):
    *per_token, other_gmem, d_gmem = out
    wide = [lax.broadcast_in_dim(plgpu.load(x.at[rows], layout=ROW, optimized=False), (tiles.rows, WIDTH), [0])
            for x in per_token]
    for i, at, student, other in _slices(logits, other_gmem, rows, n, tiles):
      d = equations.slope(measure, student, other, *wide)
      # The copy before the last one has freed this slot; for the first, also the last one of the tile before must have.
      plgpu.wait_smem_to_gmem(min(i, 1), wait_read_only=True)
      smem[half, i % 2] = d.astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(smem.at[half, i % 2], d_gmem.at[rows, pl.ds(at, WIDTH)])

  def body(hidden, head, *rest):
    *per_token_and_other, start, d = rest
    smem = plgpu.SMEM((2, 2, tiles.rows, WIDTH), dtype, transforms=swizzled(WIDTH, dtype))
    product(hidden, head, start[0], width, tiles, smem, functools.partial(epilogue, out=(*per_token_and_other, d)))

  return persistent(body, jax.ShapeDtypeStruct((hidden_MD.shape[0], width), dtype), 'linear_divergence_dlogits')(
    hidden_MD, head_DV, *per_token, _padded(other_MC, tiles), jnp.reshape(start, 1).astype(jnp.int32))


KERNELS = vocabulary.Kernels(_sweep, _dlogits, gpu_tiles_for, lambda tiles: 2 * tiles.rows)
linear_divergence = functools.partial(vocabulary.linear_divergence, KERNELS)
linear_top_k_divergence = functools.partial(vocabulary.linear_top_k_divergence, KERNELS)
linear_sampled_cross_entropy = functools.partial(vocabulary.linear_sampled_cross_entropy, KERNELS)
