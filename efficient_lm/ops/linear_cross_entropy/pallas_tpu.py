"""Mosaic TPU kernels: the logits of a tile are computed in VMEM, reduced there, and never leave it.

Forward, the innermost loops run over the vocabulary and over D. For each tile of tokens the running maximum, the sum of
exponentials and the label's logit stay in VMEM (Milakov and Gimelshein 2018, arXiv 1805.02867); each of the 128 lanes has
the value of a token, which is the layout of vectors. Backward, a kernel computes the gradient by a chunk of logits, and XLA
multiplies it: see vocabulary.py.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_lm.ops import dispatch
from efficient_lm.ops.linear_cross_entropy import vocabulary
from efficient_lm.ops.linear_cross_entropy.tiles import VMEM, TpuTiles, tpu_tiles_for

LANES = 128


def linear_cross_entropy(hidden_BTD, head_DV, labels_BT, *, tiles: TpuTiles | None = None):
  """See the API."""
  return vocabulary.linear_cross_entropy(KERNELS, hidden_BTD, head_DV, labels_BT, tiles)


def backward(*arguments, tiles: TpuTiles | None = None):
  """See the API."""
  return vocabulary.backward(KERNELS, *arguments, tiles)


def lanes(x_M):
  """(M,) -> (M, 128): a token's value in every lane, which is the layout of one number for each row."""
  return jnp.broadcast_to(x_M[:, None], (x_M.size, LANES))


def _forward(hidden_MD, head_DV, labels_M, tiles):
  (M, D), V = hidden_MD.shape, head_DV.shape[1]
  per_token = pl.BlockSpec((tiles.rows, LANES), lambda m, v, d: (m, 0))
  logsumexp, label = pl.pallas_call(
    functools.partial(_forward_kernel, V=V),
    grid=(M // tiles.rows, pl.cdiv(V, tiles.columns), D // tiles.inner),
    in_specs=[pl.BlockSpec((tiles.rows, tiles.inner), lambda m, v, d: (m, d)),
              pl.BlockSpec((tiles.inner, tiles.columns), lambda m, v, d: (d, v)), per_token],
    out_specs=[per_token] * 2,
    out_shape=[jax.ShapeDtypeStruct((M, LANES), jnp.float32)] * 2,
    scratch_shapes=[pltpu.VMEM((tiles.rows, width), jnp.float32) for width in (tiles.columns, LANES, LANES)],
    compiler_params=parameters('parallel', 'arbitrary', 'arbitrary'),
    name='linear_cross_entropy_forward',
  )(hidden_MD, head_DV, lanes(labels_M))
  return logsumexp[:, 0], label[:, 0]


def parameters(*semantics: str):
  """The order in which the compiler may run the grid, and the VMEM it may use."""
  # The compiler needs more VMEM than the buffers of the kernel, which tiles.vmem counts.
  return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM)


def accumulate(hidden_ref, head_ref, logits_ref):
  """Adds the part of the logits of this step over D."""
  @pl.when(pl.program_id(2) == 0)
  def _():
    logits_ref[...] = jnp.zeros_like(logits_ref)
  logits_ref[...] += jnp.dot(hidden_ref[...], head_ref[...], preferred_element_type=jnp.float32)


def columns(shape, v):
  """The column in the logits of each element of tile v."""
  return lax.broadcasted_iota(jnp.int32, shape, 1) + v * shape[1]


def _forward_kernel(hidden_ref, head_ref, labels_ref, logsumexp_ref, label_ref, logits_ref, maximum_ref, total_ref, *, V):
  accumulate(hidden_ref, head_ref, logits_ref)
  v = pl.program_id(1)

  @pl.when((v == 0) & (pl.program_id(2) == 0))
  def _():
    maximum_ref[...] = jnp.full_like(maximum_ref, -jnp.inf)
    total_ref[...] = jnp.zeros_like(total_ref)
    label_ref[...] = jnp.zeros_like(label_ref)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    column = columns(logits_ref.shape, v)
    logits = jnp.where(column < V, logits_ref[...], -jnp.inf)   # the last tile may exceed the vocabulary
    old, previous = maximum_ref[:, :1], total_ref[:, :1]
    new = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
    total = previous * jnp.exp(old - new) + jnp.sum(jnp.exp(logits - new), axis=1, keepdims=True)
    label_ref[...] += jnp.sum(jnp.where(column == labels_ref[:, :1], logits, 0), axis=1, keepdims=True)
    maximum_ref[...] = jnp.broadcast_to(new, maximum_ref.shape)
    total_ref[...] = jnp.broadcast_to(total, total_ref.shape)
    logsumexp_ref[...] = jnp.broadcast_to(new + jnp.log(total), logsumexp_ref.shape)


def _dlogits(hidden_MD, head_DV, per_token, start, width: int, tiles):
  # The first column of a chunk is traced, so that its tile is a prefetched scalar.
  M, D = hidden_MD.shape
  block = pl.BlockSpec((tiles.rows, LANES), lambda m, v, d, first: (m, 0))
  return pl.pallas_call(
    _dlogits_kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(M // tiles.rows, pl.cdiv(width, tiles.columns), D // tiles.inner),
      in_specs=[pl.BlockSpec((tiles.rows, tiles.inner), lambda m, v, d, first: (m, d)),
                pl.BlockSpec((tiles.inner, tiles.columns), lambda m, v, d, first: (d, v + first[0])), *[block] * 4],
      out_specs=pl.BlockSpec((tiles.rows, tiles.columns), lambda m, v, d, first: (m, v)),
      scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32)],
    ),
    out_shape=jax.ShapeDtypeStruct((M, width), hidden_MD.dtype),
    compiler_params=parameters('parallel', 'parallel', 'arbitrary'),
    name='linear_cross_entropy_dlogits',
  )(jnp.reshape(start // tiles.columns, 1).astype(jnp.int32), hidden_MD, head_DV, *map(lanes, per_token))


def _dlogits_kernel(first_ref, hidden_ref, head_ref, labels_ref, logsumexp_ref, p_scale_ref, label_scale_ref, d_ref,
                    logits_ref):
  accumulate(hidden_ref, head_ref, logits_ref)
  column = columns(logits_ref.shape, pl.program_id(1) + first_ref[0])

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    p = jnp.exp(logits_ref[...] - logsumexp_ref[:, :1]) * p_scale_ref[:, :1]
    d = p - jnp.where(column == labels_ref[:, :1], label_scale_ref[:, :1], 0)
    d_ref[...] = d.astype(d_ref.dtype)   # columns past the end of the array are not written


def head_columns(head_DV, start, width: int):
  """head_DC. On tpu7x a kernel copies it: for products of a slice, XLA would convert the layout of the whole head, and
  convert it back for each call of the kernel above, which takes twice D x V of memory. Other TPUs have one layout for
  both."""
  if 'TPU7x' not in dispatch.device().kind or width % LANES: return vocabulary.columns_of(head_DV, start, width)

  def kernel(start_ref, head_ref, out_ref):
    pltpu.sync_copy(head_ref.at[:, pl.ds(pl.multiple_of(start_ref[0], LANES), width)], out_ref)

  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  return pl.pallas_call(
    kernel, in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), anywhere], out_specs=anywhere,
    out_shape=jax.ShapeDtypeStruct((head_DV.shape[0], width), head_DV.dtype), name='linear_cross_entropy_columns',
  )(jnp.reshape(start, 1).astype(jnp.int32), head_DV)


KERNELS = vocabulary.Kernels(_forward, _dlogits, tpu_tiles_for, lambda tiles: tiles.rows, head_columns)
