"""The divergences in chunks of tokens: logits of student and teacher are built once in each pass and never kept.

A token's divergence is a function of its own logits, so a chunk of tokens is differentiated as it is, with the equations
of the reference; the gradient by its logits is multiplied at once, and that of head added up in float32. Memory is that of
a few arrays as large as a chunk of logits. Chunks cut T and leave B and V whole, as those of the cross-entropy do where
devices share the arrays.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.linear_cross_entropy.xla import gradients_of_product, product, token_chunks
from efficient_lm.ops.linear_divergence.reference import divergence


def linear_divergence(hidden_BTD, head_DV, teacher_hidden_BTE, teacher_head_EV, *, kind, beta, temperature):
  """See the API."""
  def of_logits(logits_BTV, teacher_hidden_BTE, teacher_head_EV):
    log_q_BTV = jax.nn.log_softmax(logits_BTV / temperature, axis=-1)
    log_p_BTV = jax.nn.log_softmax(product(teacher_hidden_BTE, teacher_head_EV) / temperature, axis=-1)
    return divergence(log_p_BTV, log_q_BTV, kind, beta)
  return over_tokens(of_logits, hidden_BTD, head_DV, (teacher_hidden_BTE,), (teacher_head_EV,))


def linear_top_k_divergence(hidden_BTD, head_DV, ids_BTA, logprobs_BTA, *, kind, beta, temperature):
  """See the API."""
  def of_logits(logits_BTV, ids_BTA, log_p_BTA):
    logits_BTV /= temperature
    logsumexp_BT1 = jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True)
    log_q_BTA = jnp.take_along_axis(logits_BTV, ids_BTA, axis=-1) - logsumexp_BT1
    if ids_BTA.shape[-1] == head_DV.shape[1]: return divergence(log_p_BTA, log_q_BTA, kind, beta)
    others_BTV = jnp.put_along_axis(logits_BTV, ids_BTA, -jnp.inf, axis=-1, inplace=False)
    others_BT1 = jax.nn.logsumexp(others_BTV, axis=-1, keepdims=True) - logsumexp_BT1
    # log(1 - sum p), of a sum that rounding may carry past 1.
    left_BT1 = -jnp.expm1(jnp.minimum(jax.nn.logsumexp(log_p_BTA, axis=-1, keepdims=True), 0))
    return divergence(jnp.concatenate([log_p_BTA, jnp.log(left_BT1)], -1),
                      jnp.concatenate([log_q_BTA, others_BT1], -1), kind, beta)
  return over_tokens(of_logits, hidden_BTD, head_DV, (ids_BTA, logprobs_BTA.astype(jnp.float32)), ())


def linear_sampled_cross_entropy(hidden_BTD, head_DV, ids_BTA, counts_BTA, *, temperature):
  """See the API."""
  def of_logits(logits_BTV, ids_BTA, counts_BTA):
    logits_BTV /= temperature
    log_q_BTA = jnp.take_along_axis(logits_BTV, ids_BTA, axis=-1) - jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True)
    return -jnp.sum(counts_BTA * log_q_BTA, axis=-1) / jnp.maximum(jnp.sum(counts_BTA, axis=-1), 1)
  return over_tokens(of_logits, hidden_BTD, head_DV, (ids_BTA, counts_BTA.astype(jnp.float32)), ())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def over_tokens(of_logits, hidden_BTD, head_DV, per_token: tuple, whole: tuple):
  """of_logits(hidden @ head, *per_token, *whole)_BT in chunks of tokens. Differentiable in hidden and head alone.

  Args:
    of_logits: logits_BTV, float32, and the rest -> values_BT; closes over no array.
    per_token: arrays (B, T, ...) that are cut with the tokens.
    whole: arrays that are not.
  """
  def chunk(_, inputs):
    hidden_BTD, *per_token = inputs
    return None, of_logits(product(hidden_BTD, head_DV), *per_token, *whole)

  split, join = token_chunks(*hidden_BTD.shape[:2], head_DV.shape[1])
  _, values = lax.scan(chunk, None, tuple(_split(split, x) for x in (hidden_BTD, *per_token)))
  return join(values)


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
  # Not with zeros: they are no distribution, and what is infinite in the padding is NaN in the gradient.
  return split(x, mode='edge')
