"""Functions of all logits of a token, in chunks of tokens: logits are computed once in each pass and never kept.

A token's divergence is a function of its own logits, so that autodiff differentiates the equations of the reference on a
chunk of tokens. The gradient by the logits of a chunk is multiplied at once, and the gradient by head is accumulated in
float32. This takes the memory of a few chunks of logits. Chunks cut T and leave B and V whole, as those of the cross-entropy
do where devices share the arrays.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.linear_cross_entropy.xla import gradients_of_product, product, token_chunks


def chunked(of_logits, hidden_BTD, head_DV, per_token: tuple, whole: tuple):
  """of_logits(hidden @ head, *per_token, *whole), a tree of arrays (B, T, ...), computed in chunks of tokens.

  Args:
    of_logits: (logits_BTV float32, *per_token, *whole) -> values_BT, or a tree of such; it closes over no array.
    per_token: arrays (B, T, ...) that are cut into chunks with the tokens.
    whole: arrays that every chunk gets whole.
  """
  def chunk(_, inputs):
    hidden_BTD, *per_token = inputs
    return None, of_logits(product(hidden_BTD, head_DV), *per_token, *whole)

  split, join = token_chunks(*hidden_BTD.shape[:2], head_DV.shape[1])
  _, values = lax.scan(chunk, None, tuple(_split(split, x) for x in (hidden_BTD, *per_token)))
  return jax.tree.map(join, values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def over_tokens(of_logits, hidden_BTD, head_DV, per_token: tuple, whole: tuple):
  """`chunked` for one array values_BT, differentiable in hidden and head alone."""
  return chunked(of_logits, hidden_BTD, head_DV, per_token, whole)


def _forward(of_logits, hidden_BTD, head_DV, per_token, whole):
  return over_tokens(of_logits, hidden_BTD, head_DV, per_token, whole), (hidden_BTD, head_DV, per_token, whole)


def _backward(of_logits, saved, g_BT):
  hidden_BTD, head_DV, per_token, whole = saved

  def chunk(dhead_DV, inputs):
    hidden_BTD, g_BT, *per_token = inputs
    _, pull = jax.vjp(lambda logits_BTV: of_logits(logits_BTV, *per_token, *whole), product(hidden_BTD, head_DV))
    dhidden_BTD, more_DV = gradients_of_product(hidden_BTD, head_DV, *pull(g_BT))
    return dhead_DV + more_DV, dhidden_BTD.astype(hidden_BTD.dtype)

  split, join = token_chunks(*g_BT.shape, head_DV.shape[1])
  inputs = _split(split, hidden_BTD), split(g_BT), *(_split(split, x) for x in per_token)
  dhead_DV, dhidden = lax.scan(chunk, jnp.zeros(head_DV.shape, jnp.float32), inputs)
  return join(dhidden), dhead_DV.astype(head_DV.dtype), None, None


over_tokens.defvjp(_forward, _backward)


def _split(split, x):
  # Padding repeats the last token: zeros would be no distribution, and infinite values in the padding would make the
  # gradient NaN.
  return split(x, mode='edge')
