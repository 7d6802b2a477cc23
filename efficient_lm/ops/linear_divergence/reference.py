"""The divergences as their equations, with all logits of student and teacher. Autodiff gives the gradient."""
import jax
import jax.numpy as jnp
from jax import lax


def linear_divergence(hidden_BTD, head_DV, teacher_hidden_BTE, teacher_head_EV, *, kind, beta, temperature):
  """D(p, q) for p = softmax(teacher's logits / temperature) and q = softmax(student's logits / temperature)."""
  log_q_BTV = log_softmax(hidden_BTD, head_DV, temperature)
  log_p_BTV = lax.stop_gradient(log_softmax(teacher_hidden_BTE, teacher_head_EV, temperature))
  return divergence(log_p_BTV, log_q_BTV, kind, beta)


def linear_top_k_divergence(hidden_BTD, head_DV, ids_BTA, logprobs_BTA, *, kind, beta, temperature):
  """D(p, q) over A + 1 outcomes: the listed tokens, and all others as one outcome."""
  log_q_BTV = log_softmax(hidden_BTD, head_DV, temperature)
  log_q_BTA = jnp.take_along_axis(log_q_BTV, ids_BTA, axis=-1)
  log_p_BTA = lax.stop_gradient(logprobs_BTA.astype(jnp.float32))
  if ids_BTA.shape[-1] == head_DV.shape[1]: return divergence(log_p_BTA, log_q_BTA, kind, beta)
  listed_BTV = jnp.any(ids_BTA[..., None] == jnp.arange(head_DV.shape[1]), axis=-2)
  others_BT1 = jax.nn.logsumexp(jnp.where(listed_BTV, -jnp.inf, log_q_BTV), axis=-1, keepdims=True)
  left_BT1 = jnp.maximum(1 - jnp.sum(jnp.exp(log_p_BTA), axis=-1, keepdims=True), 0)
  return divergence(jnp.concatenate([log_p_BTA, jnp.log(left_BT1)], -1), jnp.concatenate([log_q_BTA, others_BT1], -1),
                    kind, beta)


def linear_sampled_cross_entropy(hidden_BTD, head_DV, ids_BTA, counts_BTA, *, temperature):
  """-sum_a (n_a / sum n) log q_a."""
  log_q_BTA = jnp.take_along_axis(log_softmax(hidden_BTD, head_DV, temperature), ids_BTA, axis=-1)
  counts_BTA = lax.stop_gradient(counts_BTA.astype(jnp.float32))
  return -jnp.sum(counts_BTA * log_q_BTA, axis=-1) / jnp.maximum(jnp.sum(counts_BTA, axis=-1), 1)


def log_softmax(hidden_BTD, head_DV, temperature):
  """Log-probabilities of the next token, float32."""
  logits_BTV = jnp.einsum('BTD,DV->BTV', hidden_BTD, head_DV, preferred_element_type=jnp.float32)
  return jax.nn.log_softmax(logits_BTV / temperature, axis=-1)


def divergence(log_p, log_q, kind: str, beta: float):
  """D(p, q) over the last dimension; see the API for the kinds."""
  if kind == 'forward_kl': return kl(log_p, log_q)
  if kind == 'reverse_kl': return kl(log_q, log_p)
  log_m = jnp.logaddexp(jnp.log(beta) + log_p, jnp.log1p(-beta) + log_q)
  return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def kl(log_p, log_q):
  """sum p (log p - log q) over the last dimension; an outcome with p = 0 adds nothing."""
  return jnp.sum(jnp.where(log_p == -jnp.inf, 0, jnp.exp(log_p) * (log_p - log_q)), axis=-1)
