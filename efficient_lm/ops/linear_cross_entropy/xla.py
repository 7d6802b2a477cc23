"""The loss in chunks of logits, which are computed once in each pass and never kept: it takes the memory of one chunk, and
one product more.

The gradient by the logits is softmax * (g_nll + g_logsumexp) - onehot * g_nll. Chunks are

- of tokens, where devices share the arrays and the compiler partitions them (a mesh is in force): chunks cut T and leave B
  and V whole, so that devices that share the batch or the vocabulary all compute every chunk;
- of the vocabulary (vocabulary.py), on one device or inside `shard_map`, if it is longer than there are tokens. Chunks of
  tokens accumulate the gradient by head in float32 for each chunk, and chunks of the vocabulary that by hidden; the smaller
  one is accumulated.
"""
import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops import dispatch
from efficient_lm.ops.linear_cross_entropy import vocabulary

CHUNK_LOGITS = 2 ** 23   # logits of a chunk on a CPU: 32 MiB of float32, about the size of caches
CHUNK_LOGITS_ACCELERATOR = 2 ** 27   # logits of a chunk elsewhere, for fewer and larger products: 512 MiB


@jax.custom_vjp
def linear_cross_entropy(hidden_BTD, head_DV, labels_BT):
  """See the API."""
  return _cut(labels_BT.shape, head_DV.shape[1])[0](hidden_BTD, head_DV, labels_BT)


def backward(hidden_BTD, head_DV, labels_BT, logsumexp_BT, g_nll_BT, g_logsumexp_BT):
  """The gradients by hidden and head, from those by the two results and the logsumexp of the forward pass."""
  way = _cut(labels_BT.shape, head_DV.shape[1])[1]
  return way(hidden_BTD, head_DV, labels_BT, logsumexp_BT, g_nll_BT, g_logsumexp_BT)


def _forward(hidden_BTD, head_DV, labels_BT):
  nll_BT, logsumexp_BT = linear_cross_entropy(hidden_BTD, head_DV, labels_BT)
  return (nll_BT, logsumexp_BT), (hidden_BTD, head_DV, labels_BT, logsumexp_BT)


linear_cross_entropy.defvjp(_forward, lambda saved, g: (*backward(*saved, *g), None))


def _cut(tokens: tuple[int, int], V: int):
  """The forward and the backward function, in chunks of tokens or of the vocabulary."""
  return BY_VOCABULARY if by_vocabulary(tokens, V) else BY_TOKENS


def by_vocabulary(tokens: tuple[int, int], V: int) -> bool:
  """Whether the chunks of B x T tokens by V words are chunks of the vocabulary."""
  mesh = jax.sharding.get_abstract_mesh()
  shared = not mesh.empty and mesh.size > 1 and len(mesh.manual_axes) < len(mesh.axis_names)
  return not shared and tokens[0] * tokens[1] < V


def chunk_logits() -> int:
  """The number of logits of a chunk, at most."""
  return CHUNK_LOGITS if dispatch.device().platform == 'cpu' else CHUNK_LOGITS_ACCELERATOR


def _forward_by_tokens(hidden_BTD, head_DV, labels_BT):
  def chunk(_, hidden_and_labels):
    hidden_BTD, labels_BT = hidden_and_labels
    logits_BTV, at_label_BTV = _logits(hidden_BTD, head_DV, labels_BT)
    logsumexp_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return None, (logsumexp_BT - jnp.sum(jnp.where(at_label_BTV, logits_BTV, 0), -1), logsumexp_BT)

  split, join = token_chunks(*labels_BT.shape, head_DV.shape[1])
  _, (nll, logsumexp) = lax.scan(chunk, None, (split(hidden_BTD), split(labels_BT)))
  return join(nll), join(logsumexp)


def _backward_by_tokens(hidden_BTD, head_DV, *others_BT):
  def chunk(dhead_DV, inputs):
    hidden_BTD, labels_BT, logsumexp_BT, g_nll_BT, g_logsumexp_BT = inputs
    logits_BTV, at_label_BTV = _logits(hidden_BTD, head_DV, labels_BT)
    p_BTV = jnp.exp(logits_BTV - logsumexp_BT[..., None])
    d_BTV = p_BTV * (g_nll_BT + g_logsumexp_BT)[..., None] - jnp.where(at_label_BTV, g_nll_BT[..., None], 0)
    dhidden_BTD, more_DV = gradients_of_product(hidden_BTD, head_DV, d_BTV)
    return dhead_DV + more_DV, dhidden_BTD.astype(hidden_BTD.dtype)

  split, join = token_chunks(*others_BT[0].shape, head_DV.shape[1])
  inputs = tuple(map(split, (hidden_BTD, *others_BT)))
  dhead_DV, dhidden = lax.scan(chunk, jnp.zeros(head_DV.shape, jnp.float32), inputs)
  return join(dhidden), dhead_DV.astype(head_DV.dtype)


def gradients_of_product(hidden_BTD, head_DV, d_BTV):
  """Float32 gradients by hidden and head. The gradient by the logits, d_BTV, is rounded to the dtype of hidden first."""
  # These are products of matrices, because XLA:CPU transposes operands for a product that sums over two dims, B and T.
  d_MV = d_BTV.astype(hidden_BTD.dtype).reshape(-1, d_BTV.shape[-1])
  hidden_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
  dhead_DV = lax.dot_general(hidden_MD, d_MV, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
  dhidden_MD = lax.dot_general(d_MV, head_DV, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
  return dhidden_MD.reshape(hidden_BTD.shape), dhead_DV


def product(hidden_BTD, head_DV):
  """Float32 logits_BTV."""
  (B, T, D), V = hidden_BTD.shape, head_DV.shape[1]
  return jnp.dot(hidden_BTD.reshape(B * T, D), head_DV, preferred_element_type=jnp.float32).reshape(B, T, V)


def _logits(hidden_BTD, head_DV, labels_BT):
  """Float32 logits, and whether a logit is the label's: by a comparison, because a gather would need the whole
  vocabulary."""
  return product(hidden_BTD, head_DV), labels_BT[..., None] == jnp.arange(head_DV.shape[1])


def token_chunks(B: int, T: int, V: int):
  """A function that cuts (B, T, ...) into (chunks, B, tokens, ...), padded with zeros or by `mode` of `jnp.pad`, and its
  inverse."""
  count = min(-(-B * T * V // chunk_logits()), T)
  tokens = -(-T // count)

  def split(x, mode='constant'):
    x = jnp.pad(x, ((0, 0), (0, count * tokens - T), *[(0, 0)] * (x.ndim - 2)), mode)
    return x.reshape(B, count, tokens, *x.shape[2:]).swapaxes(0, 1)

  def join(x):
    x = x.swapaxes(0, 1)
    return x.reshape(B, count * tokens, *x.shape[3:])[:, :T]

  return split, join


def _forward_by_vocabulary(hidden_BTD, head_DV, labels_BT):
  hidden_MD, labels_M, V = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), labels_BT.reshape(-1), head_DV.shape[1]
  width = chunk_width(labels_M.size, V)

  def chunk(start, width, carry):
    maximum_M, total_M, label_M = carry
    logits_MC = columns(hidden_MD, head_DV, start, width)
    at_label_MC = labels_M[:, None] - start == jnp.arange(width)
    label_M += jnp.sum(jnp.where(at_label_MC, logits_MC, 0), -1)
    return *vocabulary.combine(maximum_M, total_M, jax.nn.logsumexp(logits_MC, axis=-1)), label_M

  zero_M = jnp.zeros(labels_M.shape, jnp.float32)
  carry = zero_M - jnp.inf, zero_M, zero_M
  maximum_M, total_M, label_M = vocabulary.fold(V, width, chunk, carry)
  logsumexp_BT = (maximum_M + jnp.log(total_M)).reshape(labels_BT.shape)
  return logsumexp_BT - label_M.reshape(labels_BT.shape), logsumexp_BT


def _backward_by_vocabulary(hidden_BTD, head_DV, *others_BT):
  hidden_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
  labels_M, logsumexp_M, g_nll_M, g_logsumexp_M = (x_BT.reshape(-1) for x_BT in others_BT)

  def dlogits(start, width):
    p_MC = jnp.exp(columns(hidden_MD, head_DV, start, width) - logsumexp_M[:, None])
    at_label_MC = labels_M[:, None] - start == jnp.arange(width)
    d_MC = p_MC * (g_nll_M + g_logsumexp_M)[:, None] - jnp.where(at_label_MC, g_nll_M[:, None], 0)
    return d_MC.astype(hidden_MD.dtype)

  width = chunk_width(labels_M.size, head_DV.shape[1])
  dhidden_MD, dhead_DV = vocabulary.gradients(dlogits, hidden_MD, head_DV, width)
  return dhidden_MD.reshape(hidden_BTD.shape), dhead_DV


def columns(hidden_MD, head_DV, start, width: int):
  """Float32 logits_MC of the columns start … start + width - 1."""
  head_DC = lax.dynamic_slice_in_dim(head_DV, start, width, axis=1)
  return jnp.dot(hidden_MD, head_DC, preferred_element_type=jnp.float32)


def chunk_width(M: int, V: int) -> int:
  """Columns of a chunk: as many as the logits of a chunk allow, in multiples of 128."""
  return min(V, max(128, chunk_logits() // M // 128 * 128))


BY_TOKENS = (_forward_by_tokens, _backward_by_tokens)
BY_VOCABULARY = (_forward_by_vocabulary, _backward_by_vocabulary)
