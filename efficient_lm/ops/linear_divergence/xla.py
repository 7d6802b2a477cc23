"""The divergences in plain JAX: logits are computed once in each pass, in chunks, and never kept.

Forward, chunks are of tokens, because a divergence needs all logits of a token (tokens.py). Backward, chunks of tokens
accumulate the gradient by head, D x V in float32, for each chunk, and chunks of the vocabulary (vocabulary.py) that by
hidden; the smaller of the two is accumulated, as for the cross-entropy. The logits of listed tokens are gathered from all
logits of a token, so that signals with listed tokens have chunks of tokens alone.
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
  """The divergence in chunks of tokens in both passes."""
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
