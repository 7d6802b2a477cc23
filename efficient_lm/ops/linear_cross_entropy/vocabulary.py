"""The loss in chunks of the vocabulary: what is left to an implementation is one chunk forward and one chunk backward.

Backward, the gradient by the logits of a chunk, d_MC, is kept in the dtype of hidden, and two dense products follow:

  dhidden_MD += d_MC @ head_DC^T      accumulated in float32 over the chunks
  dhead_DC    = hidden_MD^T @ d_MC    complete as it is: a chunk has all of its tokens

So the only thing built is M x C, and the dense products are the library's, at the speed of any other. Chunks of tokens
would accumulate dhead_DV instead, which is D x V in float32, read and written for each of them: with a large vocabulary
that costs more than the products. The price here is M x D in float32, read and written for each chunk.

Memory, for M = 16384, D = 4096, V = 131072 in bfloat16 and the default sixteenth: d_MC 256 MiB, dhidden 256 MiB, a chunk
of head and one of dhead 64 MiB each, against 4 GiB for bfloat16 logits alone.
"""
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

CHUNKS = 16   # as many, unless chunks become narrower than this:
MIN_WIDTH = 4096   # of the sum in dhidden, so that reading and writing it stays small beside the products
TILE = 2048   # a multiple of the columns of every tile of a kernel


def width_for(V: int) -> int:
  """Columns of a chunk on an accelerator: a sixteenth of the vocabulary, or what products need to be fast."""
  return min(V, max(MIN_WIDTH, -(-V // CHUNKS // TILE) * TILE))


def columns_of(head_DV, start, width: int):
  """head_DC: the columns start … start + width - 1."""
  return lax.dynamic_slice_in_dim(head_DV, start, width, axis=1)


def gradients(dlogits: Callable, hidden_MD, head_DV, width: int, columns: Callable = columns_of):
  """dhidden_MD and dhead_DV, in the dtypes of hidden and head.

  Args:
    dlogits: (first column, int32 scalar; number of columns, int) -> d_MC, the gradient by those logits.
    width: columns of a chunk: see `fold`.
    columns: (head_DV, first column, number of columns) -> head_DC.
  """
  V = head_DV.shape[1]
  # Kernels and products may want hidden laid out differently: as one value it would be laid out anew for every chunk.
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
  """Takes `carry` through chunk(first column, int32 scalar; number of columns, int; carry) for the whole vocabulary; what
  chunks of that width leave over is a narrower one."""
  whole, rest = divmod(V, width)
  carry = lax.fori_loop(0, whole, lambda i, carry: chunk(i * width, width, carry), carry)
  return chunk(jnp.int32(V - rest), rest, carry) if rest else carry


def combine(maximum_M, total_M, logsumexp_M):
  """Running maximum and sum of exp(logit - maximum), with one more chunk's logsumexp; -inf, 0 to begin with."""
  new_M = jnp.maximum(maximum_M, logsumexp_M)
  return new_M, total_M * jnp.exp(maximum_M - new_M) + jnp.exp(logsumexp_M - new_M)


@dataclasses.dataclass(frozen=True)
class Kernels:
  """What a device has to offer; arrays are matrices and vectors, with M a multiple of what `rows` says.

  forward: (hidden_MD, head_DV, labels_M, tiles) -> logsumexp_M and the logit of the label, label_M.
  dlogits: (hidden_MD, head_DV, per_token_4M, start, width, tiles) -> d_MC for the columns start … start + width - 1:
    exp(logits - logsumexp) * p_scale - (at label) * label_scale, per_token being labels, logsumexp and those two scales.
  tiles: (pass, M, D, V, bytes of an element) -> what to use where nothing was given.
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
  """Gradients by hidden and head. What pads the tokens has zeros for scales, so nothing comes of it."""
  M = labels_BT.size
  tiles, hidden_PD, *per_token = _flat('backward', kernels, tiles, head_DV, hidden_BTD, labels_BT, logsumexp_BT,
                                       g_nll_BT + g_logsumexp_BT, g_nll_BT)
  dlogits = lambda start, width: kernels.dlogits(hidden_PD, head_DV, tuple(per_token), start, width, tiles)
  dhidden_PD, dhead_DV = gradients(dlogits, hidden_PD, head_DV, width_for(head_DV.shape[1]), kernels.columns)
  return dhidden_PD[:M].reshape(hidden_BTD.shape), dhead_DV


def _flat(of: str, kernels: Kernels, tiles, head_DV, hidden_BTD, *per_token_BT):
  """The tiles of a pass; and a matrix and vectors, padded with zeros to a whole number of them."""
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
