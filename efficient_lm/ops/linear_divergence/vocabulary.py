"""The divergences in chunks of the vocabulary: what is left to an implementation is one chunk forward and one backward.

In a kernel the student's logits exist a tile at a time, never in memory, and meet an array of M tokens by a chunk's columns
that is there: the teacher's logits, float32, or what rules listed tokens out. Products of M tokens by the whole vocabulary,
student's and teacher's alike:

  forward KL, reverse KL      forward 2: both logits
  Jensen-Shannon              forward 2: both logits, in chunks of tokens (tokens.py) of plain JAX
  any of these                backward 4: both logits again, and one for each gradient
  listed or drawn tokens      forward 1, backward 3: as these, without a teacher

For a KL, sums go on as chunks come: KL(a || b) = logsumexp(b) - logsumexp(a) + the mean of a - b under softmax(a), and means
of parts are weighted by exp of their logsumexp. Jensen-Shannon cannot: a term of it needs both normalisers of the whole. Two
sweeps of chunks would be four products. Keeping the logits of a chunk of tokens is two, and traffic, some 32 bytes a logit:
with student and teacher 2048 and 4096 wide that is by arithmetic half of what two more products take on an H200, two thirds
on a v5e, but half as much again on a v6e. Its gradient knows the normalisers, and is a kernel's as the others.

The teacher's logits of a chunk go through memory, 8 bytes each, because then their product is the library's, for any width
and dtype, and a kernel's tile is that of the cross-entropy, 128 x 256 on Hopper. With both logits in registers it would be
128 x 128: 64 bytes of operands a cycle for a block at full speed, a third more than now, where L2 caches give some 30.

Backward, the gradient by the student's logits, d_MC, is written in the dtype of hidden, and two dense products follow, as
for the cross-entropy: see its vocabulary.py. Beside that memory is the other array's, M x C float32, and for listed tokens
the transpose of a head that is not one already.
"""
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops import dispatch
from efficient_lm.ops.linear_cross_entropy import vocabulary
from efficient_lm.ops.linear_cross_entropy.xla import columns, product
from efficient_lm.ops.linear_divergence import equations, tokens
from efficient_lm.ops.linear_divergence.equations import NONE, Measure


@dataclasses.dataclass(frozen=True)
class Kernels:
  """What a device has to offer; arrays are matrices and vectors, with M a multiple of what `rows` says.

  sweep: (measure, hidden_MD, head_DV, other_MC, start, tiles) -> values of the columns start … start + C - 1, vectors over
    M, float32, that `equations.combined` puts together: for a KL(a || b) the logsumexp of a and of b and the mean of a - b
    under softmax(a); for 'rest' a logsumexp. None where all is known from chunks of tokens.
  dlogits: (measure, hidden_MD, head_DV, other_MC, per_token, start, tiles) -> d_MC: see `equations.slope`.
  tiles: (pass, M, D, V, bytes of an element) -> what to use where nothing was given.
  rows: tiles -> the multiple to which tokens are padded.
  columns: see `vocabulary.gradients` of the cross-entropy.
  width: (M, V) -> columns of a chunk, C.
  """
  sweep: Callable | None
  dlogits: Callable
  tiles: Callable[..., Any] = lambda *_: None
  rows: Callable[[Any], int] = lambda _: 1
  columns: Callable = vocabulary.columns_of
  width: Callable[[int, int], int] = lambda M, V: vocabulary.width_for(V)


@dataclasses.dataclass(frozen=True)
class Way:
  """How a measure is taken."""
  kernels: Kernels
  measure: Measure
  tiles: Any = None

  def flat(self, of: str, hidden_BTD, head_DV, *per_token):
    """The tiles of a pass; and arrays (B, T, ...) as (M, ...), padded with zeros to a whole number of them."""
    (B, T, D), V = hidden_BTD.shape, head_DV.shape[1]
    tiles = self.tiles or self.kernels.tiles(of, B * T, D, V, hidden_BTD.dtype.itemsize)
    padding = -B * T % self.kernels.rows(tiles)
    def flat(x): return jnp.pad(x.reshape(B * T, *x.shape[2:]), ((0, padding), *[(0, 0)] * (x.ndim - 2)))
    return tiles, *map(flat, (hidden_BTD, *per_token))

  def sums(self, tiles, hidden_MD, head_DV, other: Callable):
    """Values of all columns. other: (first column, number of columns) -> other_MC."""
    def chunk(start, width, values):
      other_MC = other(start, width)
      more = self.kernels.sweep(self.measure, hidden_MD, head_DV, other_MC, start, tiles)
      return equations.combined(values, more)
    M, V = hidden_MD.shape[0], head_DV.shape[1]
    nothing = jnp.full(M, NONE, jnp.float32)
    values = (nothing,) if self.measure.kind == 'rest' else (nothing, nothing, jnp.zeros(M, jnp.float32))
    return vocabulary.fold(V, self.kernels.width(M, V), chunk, values)

  def gradients(self, tiles, hidden_MD, head_DV, other: Callable, per_token, finish=lambda d_MC, start: d_MC):
    """dhidden_MD and dhead_DV. finish: (d_MC, first column) -> d_MC with what is not a kernel's part of it."""
    def dlogits(start, width):
      d_MC = self.kernels.dlogits(self.measure, hidden_MD, head_DV, other(start, width), per_token, start, tiles)
      return finish(d_MC, start)
    width = self.kernels.width(hidden_MD.shape[0], head_DV.shape[1])
    return vocabulary.gradients(dlogits, hidden_MD, head_DV, width, self.kernels.columns)


def linear_divergence(kernels: Kernels, *arrays, kind: str, beta: float, temperature: float, tiles=None):
  """See the API."""
  return _divergence(Way(kernels, Measure(kind, beta, temperature), tiles), *arrays)


def linear_top_k_divergence(kernels: Kernels, hidden_BTD, head_DV, ids_BTA, logprobs_BTA, *, kind: str, beta: float,
                            temperature: float, tiles=None):
  """See the API."""
  listed_BTA, rest_BT = _listed_and_rest(Way(kernels, Measure('rest', temperature=temperature), tiles), hidden_BTD,
                                         head_DV, ids_BTA)
  total_BT = jnp.logaddexp(jax.nn.logsumexp(listed_BTA, axis=-1), rest_BT)
  return equations.top_k(lax.stop_gradient(logprobs_BTA.astype(jnp.float32)), listed_BTA - total_BT[..., None],
                         rest_BT - total_BT, Measure(kind, beta), head_DV.shape[1])


def linear_sampled_cross_entropy(kernels: Kernels, hidden_BTD, head_DV, ids_BTA, counts_BTA, *, temperature: float,
                                 tiles=None):
  """See the API."""
  listed_BTA, rest_BT = _listed_and_rest(Way(kernels, Measure('rest', temperature=temperature), tiles), hidden_BTD,
                                         head_DV, ids_BTA)
  # A token that was drawn twice has one logit.
  A = ids_BTA.shape[-1]
  again_BTA = jnp.any((ids_BTA[..., :, None] == ids_BTA[..., None, :]) & jnp.tri(A, k=-1, dtype=bool), axis=-1)
  once_BT = jax.nn.logsumexp(jnp.where(again_BTA, NONE, listed_BTA), axis=-1)
  total_BT = jnp.logaddexp(once_BT, rest_BT)
  return equations.sampled(lax.stop_gradient(counts_BTA.astype(jnp.float32)), listed_BTA - total_BT[..., None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(way: Way, hidden_BTD, head_DV, teacher_hidden_BTE, teacher_head_EV):
  return _divergence_forward(way, hidden_BTD, head_DV, teacher_hidden_BTE, teacher_head_EV)[0]


def _divergence_forward(way: Way, hidden_BTD, head_DV, teacher_hidden_BTE, teacher_head_EV):
  arrays = hidden_BTD, head_DV, teacher_hidden_BTE, teacher_head_EV
  if way.kernels.sweep is None or way.measure.kind == 'jensen_shannon':
    of_logits = lambda logits_BTV, hidden_BTE, head_EV: equations.statistics(
      way.measure, logits_BTV, product(hidden_BTE, head_EV))
    value_BT, *statistics = tokens.chunked(of_logits, hidden_BTD, head_DV, (teacher_hidden_BTE,), (teacher_head_EV,))
    return value_BT, (arrays, statistics)
  tiles, hidden_MD, teacher_ME = way.flat('forward', hidden_BTD, head_DV, teacher_hidden_BTE)
  other = lambda start, width: columns(teacher_ME, teacher_head_EV, start, width)
  sums = way.sums(tiles, hidden_MD, head_DV, other)
  first_BT, second_BT, mean_BT = (x_M[:hidden_BTD[..., 0].size].reshape(hidden_BTD.shape[:2]) for x_M in sums)
  value_BT = mean_BT - first_BT + second_BT
  if way.measure.kind == 'reverse_kl': return value_BT, (arrays, (first_BT, second_BT, value_BT))
  return value_BT, (arrays, (second_BT, first_BT, jnp.zeros_like(value_BT)))


def _divergence_backward(way: Way, saved, g_BT):
  (hidden_BTD, head_DV, teacher_hidden_BTE, teacher_head_EV), statistics = saved
  # What pads the tokens has 0 for a factor, so nothing comes of it.
  tiles, hidden_MD, teacher_ME, *per_token = way.flat('backward', hidden_BTD, head_DV, teacher_hidden_BTE, *statistics,
                                                      g_BT * way.measure.rate)
  other = lambda start, width: columns(teacher_ME, teacher_head_EV, start, width)
  dhidden_MD, dhead_DV = way.gradients(tiles, hidden_MD, head_DV, other, per_token)
  return dhidden_MD[:g_BT.size].reshape(hidden_BTD.shape), dhead_DV, None, None


_divergence.defvjp(_divergence_forward, _divergence_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _listed_and_rest(way: Way, hidden_BTD, head_DV, ids_BTA):
  """Logits / temperature of listed tokens, (B, T, A), and the logsumexp of all others', (B, T).

  Others are summed up by themselves: as a difference, 1 less the listed probabilities, their mass would be known to 1e-6 of
  1, which is nothing where the listed tokens have nearly all of it and a gradient divides by what they leave."""
  return _listed_and_rest_forward(way, hidden_BTD, head_DV, ids_BTA)[0]


def _listed_and_rest_forward(way: Way, hidden_BTD, head_DV, ids_BTA):
  tiles, hidden_MD, ids_MA = way.flat('forward', hidden_BTD, head_DV, ids_BTA)
  rest_M, = way.sums(tiles, hidden_MD, head_DV, functools.partial(_ruled_out, ids_MA))
  rest_BT = rest_M[:ids_BTA[..., 0].size].reshape(ids_BTA.shape[:2])
  return (_listed(way, hidden_BTD, head_DV, ids_BTA), rest_BT), (hidden_BTD, head_DV, ids_BTA, rest_BT)


def _listed_and_rest_backward(way: Way, saved, g):
  hidden_BTD, head_DV, ids_BTA, rest_BT = saved
  tiles, hidden_MD, ids_MA, rest_M, g_listed_MA, g_rest_M = way.flat(
    'backward', hidden_BTD, head_DV, ids_BTA, rest_BT, *(x * way.measure.rate for x in g))

  finish = lambda d_MC, start: _at_listed(d_MC, ids_MA, start, g_listed_MA)
  dhidden_MD, dhead_DV = way.gradients(tiles, hidden_MD, head_DV, functools.partial(_ruled_out, ids_MA),
                                       (rest_M, g_rest_M), finish)
  return dhidden_MD[:rest_BT.size].reshape(hidden_BTD.shape), dhead_DV, None


_listed_and_rest.defvjp(_listed_and_rest_forward, _listed_and_rest_backward)


def _listed(way: Way, hidden_BTD, head_DV, ids_BTA):
  """Logits / temperature of listed tokens, one a token at a time, so that their columns of head are never an array."""
  # Rows of the transpose: an embedding read as a head is transposed already, any other one is once, not for each.
  head_VD = head_DV.T
  def one(ids_BT): return jnp.sum(hidden_BTD.astype(jnp.float32) * head_VD[ids_BT].astype(jnp.float32), axis=-1)
  return way.measure.tempered(jnp.moveaxis(lax.map(one, jnp.moveaxis(ids_BTA, -1, 0)), 0, -1))


def _ruled_out(ids_MA, start, width: int):
  """NONE, or more than once that, at the listed columns of a chunk and 0 elsewhere: (M, width)."""
  M, A = ids_MA.shape
  return _at_listed(jnp.zeros((M, width), jnp.float32), ids_MA, start, jnp.full((M, A), NONE))


def _at_listed(x_MC, ids_MA, start, values_MA):
  """x_MC, of a chunk that begins with column `start`, with values added at its listed columns."""
  values_MA = values_MA.astype(x_MC.dtype)
  # A TPU scatters one number after the other, those of all other chunks too; A comparisons for each of x are less.
  add = _compared if dispatch.device().platform == 'tpu' else _scattered
  return add(x_MC, ids_MA - start, values_MA)


def _compared(x_MC, at_MA, values_MA):
  column_C = jnp.arange(x_MC.shape[1])
  for a in range(at_MA.shape[1]): x_MC += jnp.where(at_MA[:, a, None] == column_C, values_MA[:, a, None], 0)
  return x_MC


def _scattered(x_MC, at_MA, values_MA):
  M, width = x_MC.shape
  at_MA = jnp.where(at_MA < 0, width, at_MA)   # a negative index would count from the end; one past it is dropped
  return x_MC.at[jnp.arange(M)[:, None], at_MA].add(values_MA, mode='drop')
