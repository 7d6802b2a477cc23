"""The loss in chunks of the vocabulary: an implementation provides one chunk of the forward and one of the backward pass.

Letters: M tokens, C columns of a chunk, P tokens with padding. Backward, the gradient by the logits of a chunk, d_MC, is
stored in the dtype of hidden, and two dense products follow:

  dhidden_MD += d_MC @ head_DC^T      accumulated in float32 over the chunks
  dhead_DC    = hidden_MD^T @ d_MC    complete as it is: a chunk has all of its tokens

Only an M x C matrix is stored, and the dense products are those of the library, at full speed. Chunks of tokens would
accumulate dhead_DV instead, D x V in float32, which is read and written for each chunk: with a large vocabulary that takes
longer than the products. Chunks of the vocabulary read and write dhidden_MD in float32 for each chunk.

Memory for M = 16384, D = 4096, V = 131072 in bfloat16 and the default of a sixteenth: d_MC 256 MiB, dhidden 256 MiB, and a
chunk of head and one of dhead 64 MiB each. bfloat16 logits alone would take 4 GiB.
"""
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

CHUNKS = 16        # chunks of the vocabulary, unless they were narrower than MIN_WIDTH
MIN_WIDTH = 4096   # columns of a chunk, so that reading and writing dhidden takes little time beside the products
TILE = 2048        # a multiple of the columns of every tile of a kernel


def width_for(V: int) -> int:
  """Columns of a chunk on an accelerator: a sixteenth of the vocabulary, but at least MIN_WIDTH."""
  return min(V, max(MIN_WIDTH, -(-V // CHUNKS // TILE) * TILE))


def columns_of(head_DV, start, width: int):
  """head_DC: the columns start … start + width - 1 of the head."""
  return lax.dynamic_slice_in_dim(head_DV, start, width, axis=1)


def gradients(dlogits: Callable, hidden_MD, head_DV, width: int, columns: Callable = columns_of):
  """dhidden_MD and dhead_DV, in the dtypes of hidden and head.

  Args:
    dlogits: (first column, int32 scalar; number of columns, int) -> d_MC, the gradient by the logits of these columns.
    width: columns of a chunk: see `fold`.
    columns: (head_DV, first column, number of columns) -> head_DC.
  """
  V = head_DV.shape[1]
  # Kernels and products may need different layouts of hidden: as one value, its layout would be converted for every chunk.
  multiplied_MD = lax.optimization_barrier(hidden_MD)

  def chunk(start, width, carry):
    dhidden_MD, dhead_DV = carry
    d_MC = dlogits(start, width)
    head_DC = columns(head_DV, start, width)
    dhidden_MD += lax.dot_general(d_MC, head_DC, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    dhead_DC = lax.dot_general(multiplied_MD, d_MC, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return dhidden_MD, lax.dynamic_update_slice_in_dim(dhead_DV, dhead_DC.astype(dhead_DV.dtype), start, axis=1)

  carry = jnp.zeros(hidden_MD.shape, jnp.float32), jnp.zeros_like(head_DV)
  dhidden_MD, dhead_DV = fold(V, width, chunk, carry)
  return dhidden_MD.astype(hidden_MD.dtype), dhead_DV


def fold(V: int, width: int, chunk: Callable, carry):
  """carry = chunk(first column, int32 scalar; number of columns, int; carry) for all chunks of the vocabulary. The last
  chunk is narrower where the width does not divide V."""
  whole, rest = divmod(V, width)
  carry = lax.fori_loop(0, whole, lambda i, carry: chunk(i * width, width, carry), carry)
  return chunk(jnp.int32(V - rest), rest, carry) if rest else carry


def combine(maximum_M, total_M, logsumexp_M):
  """The running maximum and the sum of exp(logit - maximum), with the logsumexp of one more chunk. They begin with -inf and
  0."""
  new_M = jnp.maximum(maximum_M, logsumexp_M)
  return new_M, total_M * jnp.exp(maximum_M - new_M) + jnp.exp(logsumexp_M - new_M)


@dataclasses.dataclass(frozen=True)
class Kernels:
  """The functions that an implementation provides. Arrays are matrices and vectors, and M is a multiple of what `rows`
  returns.

  forward: (hidden_MD, head_DV, labels_M, tiles) -> logsumexp_M and the logit of the label, label_M.
  dlogits: (hidden_MD, head_DV, per_token_4M, start, width, tiles) -> d_MC for the columns start … start + width - 1:
    exp(logits - logsumexp) * p_scale - (at label) * label_scale, per_token being labels, logsumexp and those two scales.
  tiles: (pass, M, D, V, bytes of an element) -> the default tiles.
  rows: tiles -> the multiple to which tokens are padded.
  columns: see `gradients`.
  """
  forward: Callable
  dlogits: Callable
  tiles: Callable[..., Any]
  rows: Callable[[Any], int]
  columns: Callable = columns_of


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def linear_cross_entropy(kernels: Kernels, hidden_BTD, head_DV, labels_BT, tiles):
  """See the API."""
  M = labels_BT.size
  tiles, hidden_PD, labels_P = _flat('forward', kernels, tiles, head_DV, hidden_BTD, labels_BT)
  logsumexp_BT, label_BT = (x_P[:M].reshape(labels_BT.shape) for x_P in
                            kernels.forward(hidden_PD, head_DV, labels_P, tiles))
  return logsumexp_BT - label_BT, logsumexp_BT


def backward(kernels: Kernels, hidden_BTD, head_DV, labels_BT, logsumexp_BT, g_nll_BT, g_logsumexp_BT, tiles):
  """The gradients by hidden and head. Padding tokens have scales of 0, so that they contribute nothing."""
  M = labels_BT.size
  tiles, hidden_PD, *per_token = _flat('backward', kernels, tiles, head_DV, hidden_BTD, labels_BT, logsumexp_BT,
                                       g_nll_BT + g_logsumexp_BT, g_nll_BT)
  dlogits = lambda start, width: kernels.dlogits(hidden_PD, head_DV, tuple(per_token), start, width, tiles)
  dhidden_PD, dhead_DV = gradients(dlogits, hidden_PD, head_DV, width_for(head_DV.shape[1]), kernels.columns)
  return dhidden_PD[:M].reshape(hidden_BTD.shape), dhead_DV


def _flat(of: str, kernels: Kernels, tiles, head_DV, hidden_BTD, *per_token_BT):
  """The tiles of a pass; and hidden as a matrix, and vectors of tokens, padded with zeros to a multiple of the tiles."""
  (B, T, D), V = hidden_BTD.shape, head_DV.shape[1]
  M = B * T
  tiles = tiles or kernels.tiles(of, M, D, V, hidden_BTD.dtype.itemsize)
  padding = -M % kernels.rows(tiles)
  hidden_MD = jnp.pad(hidden_BTD.reshape(M, -1), ((0, padding), (0, 0)))
  return tiles, hidden_MD, *(jnp.pad(x_BT.reshape(M), (0, padding)) for x_BT in per_token_BT)


def _forward(kernels, hidden_BTD, head_DV, labels_BT, tiles):
  nll_BT, logsumexp_BT = linear_cross_entropy(kernels, hidden_BTD, head_DV, labels_BT, tiles)
  return (nll_BT, logsumexp_BT), (hidden_BTD, head_DV, labels_BT, logsumexp_BT)


def _backward(kernels, tiles, saved, g):
  return *backward(kernels, *saved, *g, tiles), None


linear_cross_entropy.defvjp(_forward, _backward)
