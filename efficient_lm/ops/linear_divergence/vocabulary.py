"""The divergences in chunks of the vocabulary: an implementation provides one chunk of the forward and one of the backward
pass.

In a kernel the student's logits exist one tile at a time, and never in memory. They are combined with a float32 array of M
tokens by the columns of a chunk, which is in memory: the teacher's logits, or the array that excludes listed tokens. The
numbers of products of M tokens by the whole vocabulary, of student and teacher together, are

  forward KL, reverse KL      forward 2: both logits
  Jensen-Shannon              forward 2: both logits, in chunks of tokens (tokens.py) of plain JAX
  any of these                backward 4: both logits again, and one for each gradient
  listed or drawn tokens      forward 1, backward 3: as these, without a teacher

A KL is accumulated over chunks: KL(a || b) = logsumexp(b) - logsumexp(a) + the mean of a - b under softmax(a), where the
means of chunks are weighted by exp of their logsumexp. Jensen-Shannon cannot be accumulated, because each term needs the
normalisers of the whole vocabulary: two sweeps over the chunks would take four products. Keeping the logits of a chunk of
tokens takes two products and some 32 bytes of memory traffic for each logit. With widths of 2048 and 4096 for student and
teacher, that traffic takes, by arithmetic, half the time of two more products on an H200, two thirds on a v5e, but one and a
half times as long on a v6e. The gradient of Jensen-Shannon knows the normalisers, and kernels compute it as that of a KL.

The teacher's logits of a chunk pass through memory, 8 bytes each. Their product is then the library's, for any width and
dtype, and the tile of a kernel is that of the cross-entropy, 128 x 256 on Hopper. With both logits in registers it would be
128 x 128, and a block at full speed would need 64 bytes of operands in a cycle, a third more than now, while L2 caches
deliver some 30.

Backward, the gradient by the student's logits, d_MC, is written in the dtype of hidden, and two dense products follow, as
for the cross-entropy: see its vocabulary.py. The other array takes M x C float32 of memory beside that, and listed tokens
need the transpose of the head, unless the head is a transpose already.
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
  """The functions that an implementation provides. Arrays are matrices and vectors, and M is a multiple of what `rows`
  returns.

  sweep: (measure, hidden_MD, head_DV, other_MC, start, tiles) -> the values of the columns start … start + C - 1, float32
    vectors over M that `equations.combined` joins: for a KL(a || b) the logsumexp of a and of b and the mean of a - b under
    softmax(a), for 'rest' a logsumexp. None where the forward pass is computed in chunks of tokens.
  dlogits: (measure, hidden_MD, head_DV, other_MC, per_token, start, tiles) -> d_MC: see `equations.slope`.
  tiles: (pass, M, D, V, bytes of an element) -> the default tiles.
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
  """A measure, the kernels that compute it, and their tiles."""
  kernels: Kernels
  measure: Measure
  tiles: Any = None

  def flat(self, of: str, hidden_BTD, head_DV, *per_token):
    """The tiles of a pass; and arrays (B, T, ...) as (M, ...), padded with zeros to a multiple of the tiles."""
    (B, T, D), V = hidden_BTD.shape, head_DV.shape[1]
    tiles = self.tiles or self.kernels.tiles(of, B * T, D, V, hidden_BTD.dtype.itemsize)
    padding = -B * T % self.kernels.rows(tiles)
    def flat(x): return jnp.pad(x.reshape(B * T, *x.shape[2:]), ((0, padding), *[(0, 0)] * (x.ndim - 2)))
    return tiles, *map(flat, (hidden_BTD, *per_token))

  def sums(self, tiles, hidden_MD, head_DV, other: Callable):
    """The values of all columns. other: (first column, number of columns) -> other_MC."""
    def chunk(start, width, values):
      other_MC = other(start, width)
      more = self.kernels.sweep(self.measure, hidden_MD, head_DV, other_MC, start, tiles)
      return equations.combined(values, more)
    M, V = hidden_MD.shape[0], head_DV.shape[1]
    nothing = jnp.full(M, NONE, jnp.float32)
    values = (nothing,) if self.measure.kind == 'rest' else (nothing, nothing, jnp.zeros(M, jnp.float32))
    return vocabulary.fold(V, self.kernels.width(M, V), chunk, values)

  def gradients(self, tiles, hidden_MD, head_DV, other: Callable, per_token, finish=lambda d_MC, start: d_MC):
    """dhidden_MD and dhead_DV. finish: (d_MC, first column) -> d_MC, with the terms that kernels do not compute."""
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
  # A token that was drawn twice counts once in the normaliser.
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
  # Padding tokens have a factor of 0, so that they contribute nothing.
  tiles, hidden_MD, teacher_ME, *per_token = way.flat('backward', hidden_BTD, head_DV, teacher_hidden_BTE, *statistics,
                                                      g_BT * way.measure.rate)
  other = lambda start, width: columns(teacher_ME, teacher_head_EV, start, width)
  dhidden_MD, dhead_DV = way.gradients(tiles, hidden_MD, head_DV, other, per_token)
  return dhidden_MD[:g_BT.size].reshape(hidden_BTD.shape), dhead_DV, None, None


_divergence.defvjp(_divergence_forward, _divergence_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _listed_and_rest(way: Way, hidden_BTD, head_DV, ids_BTA):
  """Logits / temperature of listed tokens, (B, T, A), and the logsumexp of those of all other tokens, (B, T).

  The other tokens are summed themselves. As the difference of 1 and the listed probabilities, their mass would have an error
  of 1e-6, which is too large where the listed tokens have nearly all mass and a gradient divides by the rest."""
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
  """Logits / temperature of listed tokens, one for each token at a time, so that their columns of the head are never
  stored."""
  # They are rows of the transposed head: a tied head is a transposed embedding, and any other head is transposed once.
  head_VD = head_DV.T
  def one(ids_BT): return jnp.sum(hidden_BTD.astype(jnp.float32) * head_VD[ids_BT].astype(jnp.float32), axis=-1)
  return way.measure.tempered(jnp.moveaxis(lax.map(one, jnp.moveaxis(ids_BTA, -1, 0)), 0, -1))


def _ruled_out(ids_MA, start, width: int):
  """(M, width): NONE, or a multiple of NONE, at the listed columns of a chunk, and 0 elsewhere."""
  M, A = ids_MA.shape
  return _at_listed(jnp.zeros((M, width), jnp.float32), ids_MA, start, jnp.full((M, A), NONE))


def _at_listed(x_MC, ids_MA, start, values_MA):
  """x_MC with values added at the listed columns of a chunk that begins with column `start`."""
  values_MA = values_MA.astype(x_MC.dtype)
  # A TPU scatters one number after another, also those of all other chunks; A comparisons for each number of x take less
  # time.
  add = _compared if dispatch.device().platform == 'tpu' else _scattered
  return add(x_MC, ids_MA - start, values_MA)


def _compared(x_MC, at_MA, values_MA):
  column_C = jnp.arange(x_MC.shape[1])
  for a in range(at_MA.shape[1]): x_MC += jnp.where(at_MA[:, a, None] == column_C, values_MA[:, a, None], 0)
  return x_MC


def _scattered(x_MC, at_MA, values_MA):
  M, width = x_MC.shape
  at_MA = jnp.where(at_MA < 0, width, at_MA)   # A negative index would count from the end; an index past the end is dropped.
  return x_MC.at[jnp.arange(M)[:, None], at_MA].add(values_MA, mode='drop')
