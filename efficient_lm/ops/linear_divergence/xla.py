"""The divergences in plain JAX: logits are built once forward and once again backward, in chunks, and never kept.

Forward, chunks are of tokens: all is known of a token that has all its logits (tokens.py). Backward, chunks of tokens
would accumulate the gradient of head, D x V in float32, for each of them, and chunks of the vocabulary (vocabulary.py) that
of hidden: the smaller of both is taken, as for the cross-entropy. What a teacher lists is gathered from all logits of a
token, so those signals know chunks of tokens alone.
"""
import jax
import jax.numpy as jnp

from efficient_lm.ops.linear_cross_entropy import xla
from efficient_lm.ops.linear_divergence import equations, vocabulary
from efficient_lm.ops.linear_divergence.equations import Measure
from efficient_lm.ops.linear_divergence.tokens import over_tokens


def linear_divergence(hidden_BTD, head_DV, teacher_hidden_BTE, teacher_head_EV, *, kind, beta, temperature):
  """See the API."""
  arrays = hidden_BTD, head_DV, teacher_hidden_BTE, teacher_head_EV
  if xla.by_vocabulary(hidden_BTD.shape[:2], head_DV.shape[1]):
    return vocabulary.linear_divergence(CHUNKS, *arrays, kind=kind, beta=beta, temperature=temperature)
  return by_tokens(*arrays, measure=Measure(kind, beta, temperature))


def by_tokens(hidden_BTD, head_DV, teacher_hidden_BTE, teacher_head_EV, measure: Measure):
  """The divergence with chunks of tokens in both passes."""
  def of_logits(logits_BTV, teacher_hidden_BTE, teacher_head_EV):
    return equations.statistics(measure, logits_BTV, xla.product(teacher_hidden_BTE, teacher_head_EV))[0]
  return over_tokens(of_logits, hidden_BTD, head_DV, (teacher_hidden_BTE,), (teacher_head_EV,))


def _dlogits(measure, hidden_MD, head_DV, other_MC, per_token, start, tiles):
  logits_MC = xla.columns(hidden_MD, head_DV, start, other_MC.shape[1])
  d_MC = equations.slope(measure, logits_MC, other_MC, *(x_M[:, None] for x_M in per_token))
  return d_MC.astype(hidden_MD.dtype)


def _width(M: int, V: int) -> int: return xla.chunk_width(M, V)


CHUNKS = vocabulary.Kernels(sweep=None, dlogits=_dlogits, width=_width)


def linear_top_k_divergence(hidden_BTD, head_DV, ids_BTA, logprobs_BTA, *, kind, beta, temperature):
  """See the API."""
  def of_logits(logits_BTV, ids_BTA, log_p_BTA):
    logits_BTV /= temperature
    logsumexp_BT1 = jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True)
    log_q_BTA = jnp.take_along_axis(logits_BTV, ids_BTA, axis=-1) - logsumexp_BT1
    others_BTV = jnp.put_along_axis(logits_BTV, ids_BTA, -jnp.inf, axis=-1, inplace=False)
    others_BT = jax.nn.logsumexp(others_BTV, axis=-1) - logsumexp_BT1[..., 0]
    return equations.top_k(log_p_BTA, log_q_BTA, others_BT, Measure(kind, beta), head_DV.shape[1])
  return over_tokens(of_logits, hidden_BTD, head_DV, (ids_BTA, logprobs_BTA.astype(jnp.float32)), ())


def linear_sampled_cross_entropy(hidden_BTD, head_DV, ids_BTA, counts_BTA, *, temperature):
  """See the API."""
  def of_logits(logits_BTV, ids_BTA, counts_BTA):
    logits_BTV /= temperature
    log_q_BTA = jnp.take_along_axis(logits_BTV, ids_BTA, axis=-1) - jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True)
    return equations.sampled(counts_BTA, log_q_BTA)
  return over_tokens(of_logits, hidden_BTD, head_DV, (ids_BTA, counts_BTA.astype(jnp.float32)), ())
