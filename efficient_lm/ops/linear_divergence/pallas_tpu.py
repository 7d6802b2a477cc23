"""Mosaic TPU kernels: a tile of the student's logits is computed in VMEM, and only what is computed from it and from a tile
of another array leaves VMEM. See vocabulary.py for what that is, and the kernels of the cross-entropy for the tiles.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_lm.ops.linear_cross_entropy.pallas_tpu import LANES, accumulate, columns, head_columns, lanes, parameters
from efficient_lm.ops.linear_divergence import equations, vocabulary
from efficient_lm.ops.linear_divergence.equations import NONE, Measure
from efficient_lm.ops.linear_divergence.tiles import TpuTiles, tpu_tiles_for


def _sweep(measure: Measure, hidden_MD, head_DV, other_MC, start, tiles: TpuTiles):
  M, V = hidden_MD.shape[0], head_DV.shape[1]
  per_token = pl.BlockSpec((tiles.rows, LANES), lambda m, v, d, first: (m, 0))
  num_values = 1 if measure.kind == 'rest' else 3
  values = pl.pallas_call(
    functools.partial(_sweep_kernel, measure=measure, V=V),
    grid_spec=_grid(hidden_MD, other_MC, tiles, [], [per_token] * num_values),
    out_shape=[jax.ShapeDtypeStruct((M, LANES), jnp.float32)] * num_values,
    compiler_params=parameters('parallel', 'arbitrary', 'arbitrary'),
    name='linear_divergence_sweep',
  )(_first(start, tiles), hidden_MD, head_DV, other_MC)
  return tuple(value[:, 0] for value in values)


def _first(start, tiles: TpuTiles):
  """The first tile of a chunk, as a prefetched scalar, because `start` is traced."""
  return jnp.reshape(start // tiles.columns, 1).astype(jnp.int32)


def _grid(hidden_MD, other_MC, tiles: TpuTiles, more_in: list, outputs):
  """A grid over tiles of tokens, of the chunk's columns and of D. Inputs are hidden, head, the other array, and
  `more_in`."""
  (M, D), width = hidden_MD.shape, other_MC.shape[1]
  return pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=1,
    grid=(M // tiles.rows, pl.cdiv(width, tiles.columns), D // tiles.inner),
    in_specs=[pl.BlockSpec((tiles.rows, tiles.inner), lambda m, v, d, first: (m, d)),
              pl.BlockSpec((tiles.inner, tiles.columns), lambda m, v, d, first: (d, v + first[0])),
              pl.BlockSpec((tiles.rows, tiles.columns), lambda m, v, d, first: (m, v)), *more_in],
    out_specs=outputs,
    scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32)],
  )


def _sweep_kernel(first_ref, hidden_ref, head_ref, other_ref, *refs, measure, V):
  *values, logits_ref = refs
  accumulate(hidden_ref, head_ref, logits_ref)
  v, d = pl.program_id(1), pl.program_id(2)

  @pl.when((v == 0) & (d == 0))
  def _():
    for i, ref in enumerate(values): ref[...] = jnp.full_like(ref, NONE if i < 2 else 0.)

  @pl.when(d == pl.num_programs(2) - 1)
  def _():
    student, other = measure.tempered(logits_ref[...]), measure.tempered(other_ref[...])
    inside = columns(student.shape, v + first_ref[0]) < V   # the last tile may exceed the vocabulary
    more = _of_tile(measure, *(jnp.where(inside, x, NONE) for x in (student, other)))
    for ref, value in zip(values, equations.combined(tuple(ref[:, :1] for ref in values), more)):
      ref[...] = jnp.broadcast_to(value, ref.shape)


def _of_tile(measure: Measure, student, other) -> tuple:
  """The values of one tile, (rows, 1) each: see `vocabulary.Kernels.sweep`."""
  if measure.kind == 'rest': return _logsumexp(student + other)[:1]
  first, second = (other, student) if measure.kind == 'forward_kl' else (student, other)
  of_first, total, terms = _logsumexp(first)
  mean = jnp.sum(terms * (first - second), axis=1, keepdims=True) / total
  return of_first, _logsumexp(second)[0], mean


def _logsumexp(x):
  """The logsumexp over columns, the sum relative to its largest term, and the terms of that sum."""
  largest = jnp.max(x, axis=1, keepdims=True)
  terms = jnp.exp(x - largest)
  total = jnp.sum(terms, axis=1, keepdims=True)
  return largest + jnp.log(total), total, terms


def _dlogits(measure: Measure, hidden_MD, head_DV, other_MC, per_token, start, tiles: TpuTiles):
  block = pl.BlockSpec((tiles.rows, LANES), lambda m, v, d, first: (m, 0))
  return pl.pallas_call(
    functools.partial(_dlogits_kernel, measure=measure),
    grid_spec=_grid(hidden_MD, other_MC, tiles, [block] * len(per_token),
                    pl.BlockSpec((tiles.rows, tiles.columns), lambda m, v, d, first: (m, v))),
    out_shape=jax.ShapeDtypeStruct(other_MC.shape, hidden_MD.dtype),
    compiler_params=parameters('parallel', 'parallel', 'arbitrary'),
    name='linear_divergence_dlogits',
  )(_first(start, tiles), hidden_MD, head_DV, other_MC, *map(lanes, per_token))


def _dlogits_kernel(first_ref, hidden_ref, head_ref, other_ref, *refs, measure):
  *per_token, d_ref, logits_ref = refs
  accumulate(hidden_ref, head_ref, logits_ref)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    d = equations.slope(measure, logits_ref[...], other_ref[...], *(ref[:, :1] for ref in per_token))
    d_ref[...] = d.astype(d_ref.dtype)   # columns past the end of the array are not written


KERNELS = vocabulary.Kernels(_sweep, _dlogits, tpu_tiles_for, lambda tiles: tiles.rows, head_columns)
linear_divergence = functools.partial(vocabulary.linear_divergence, KERNELS)
linear_top_k_divergence = functools.partial(vocabulary.linear_top_k_divergence, KERNELS)
linear_sampled_cross_entropy = functools.partial(vocabulary.linear_sampled_cross_entropy, KERNELS)
