"""Logits in chunks of tokens, built once in each pass and never kept: memory of one chunk, and one product more.

The gradient by the logits is softmax * (g_nll + g_logsumexp) - onehot * g_nll. Chunks cut T and leave B whole, so that
devices that share the batch all work on every chunk.
"""
import jax
import jax.numpy as jnp
from jax import lax

CHUNK_LOGITS = 2 ** 23   # 32 MiB of float32


@jax.custom_vjp
def linear_cross_entropy(hidden_BTD, head_DV, labels_BT):
  """See the API."""
  def chunk(_, hidden_and_labels):
    hidden_BTD, labels_BT = hidden_and_labels
    logits_BTV, at_label_BTV = _logits(hidden_BTD, head_DV, labels_BT)
    logsumexp_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return None, (logsumexp_BT - jnp.sum(jnp.where(at_label_BTV, logits_BTV, 0), -1), logsumexp_BT)

  split, join = _chunks(*labels_BT.shape, head_DV.shape[1])
  _, (nll, logsumexp) = lax.scan(chunk, None, (split(hidden_BTD), split(labels_BT)))
  return join(nll), join(logsumexp)


def _forward(hidden_BTD, head_DV, labels_BT):
  nll_BT, logsumexp_BT = linear_cross_entropy(hidden_BTD, head_DV, labels_BT)
  return (nll_BT, logsumexp_BT), (hidden_BTD, head_DV, labels_BT, logsumexp_BT)


def _backward(saved, g):
  hidden_BTD, head_DV, labels_BT, logsumexp_BT = saved
  g_nll_BT, g_logsumexp_BT = g

  def chunk(dhead_DV, inputs):
    hidden_BTD, labels_BT, logsumexp_BT, g_nll_BT, g_logsumexp_BT = inputs
    logits_BTV, at_label_BTV = _logits(hidden_BTD, head_DV, labels_BT)
    p_BTV = jnp.exp(logits_BTV - logsumexp_BT[..., None])
    g_BTV = p_BTV * (g_nll_BT + g_logsumexp_BT)[..., None] - jnp.where(at_label_BTV, g_nll_BT[..., None], 0)
    # Two matrices: a product that sums over two dims, B and T, makes XLA:CPU transpose first.
    g_MV = g_BTV.astype(hidden_BTD.dtype).reshape(-1, g_BTV.shape[-1])
    hidden_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    dhead_DV += lax.dot_general(hidden_MD, g_MV, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    dhidden_MD = lax.dot_general(g_MV, head_DV, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return dhead_DV, dhidden_MD.astype(hidden_BTD.dtype).reshape(hidden_BTD.shape)

  split, join = _chunks(*labels_BT.shape, head_DV.shape[1])
  inputs = tuple(map(split, (hidden_BTD, labels_BT, logsumexp_BT, g_nll_BT, g_logsumexp_BT)))
  dhead_DV, dhidden = lax.scan(chunk, jnp.zeros(head_DV.shape, jnp.float32), inputs)
  return join(dhidden), dhead_DV.astype(head_DV.dtype), None


linear_cross_entropy.defvjp(_forward, _backward)


def _logits(hidden_BTD, head_DV, labels_BT):
  """Float32 logits, and where the label is: a comparison, because a gather would need the whole vocabulary."""
  (B, T, D), V = hidden_BTD.shape, head_DV.shape[1]
  logits_MV = jnp.dot(hidden_BTD.reshape(B * T, D), head_DV, preferred_element_type=jnp.float32)
  return logits_MV.reshape(B, T, V), labels_BT[..., None] == jnp.arange(V)


def _chunks(B: int, T: int, V: int):
  """Functions that cut (B, T, ...) into (chunks, B, tokens, ...), padded with zeros, and put it together again."""
  count = min(-(-B * T * V // CHUNK_LOGITS), T)
  tokens = -(-T // count)

  def split(x):
    x = jnp.pad(x, ((0, 0), (0, count * tokens - T), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(B, count, tokens, *x.shape[2:]).swapaxes(0, 1)

  def join(x):
    x = x.swapaxes(0, 1)
    return x.reshape(B, count * tokens, *x.shape[3:])[:, :T]

  return split, join
