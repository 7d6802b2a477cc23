"""The divergences as functions of logits, for plain JAX and for the epilogues of kernels."""
import dataclasses
import math

import jax
import jax.numpy as jnp

from efficient_lm.ops.linear_divergence.reference import divergence, kl

NONE = -1e30   # stands for log 0; it is finite, so that the difference of two is not NaN


@dataclasses.dataclass(frozen=True)
class Measure:
  """What is computed from a student's logits: a divergence (see the API), or for the kind 'rest' the logsumexp of the logits
  that another array does not exclude. That array is NONE at excluded logits, and 0 elsewhere."""
  kind: str
  beta: float = 0.5
  temperature: float = 1.

  def tempered(self, logits):
    """logits / temperature."""
    return logits if self.temperature == 1 else logits * (1 / self.temperature)

  @property
  def rate(self) -> float:
    """The factor by which `slope` has to be multiplied, beside the cotangent."""
    return (1 - self.beta if self.kind == 'jensen_shannon' else 1) / self.temperature


def statistics(measure: Measure, student_V, teacher_V):
  """From the logits of tokens, (..., V): the divergence D(p, q), the logsumexp of the student's logits / temperature and of
  the teacher's, and KL(q || r), which the gradient needs. r is p for the reverse KL and m for Jensen-Shannon; the forward KL
  needs none, and gets 0."""
  kind, beta = measure.kind, measure.beta
  student_V, teacher_V = measure.tempered(student_V), measure.tempered(teacher_V)
  of_student_1, of_teacher_1 = (jax.nn.logsumexp(x_V, axis=-1, keepdims=True) for x_V in (student_V, teacher_V))
  log_q_V, log_p_V = student_V - of_student_1, teacher_V - of_teacher_1
  if kind == 'jensen_shannon':
    log_m_V = jnp.logaddexp(jnp.log(beta) + log_p_V, jnp.log1p(-beta) + log_q_V)
    student_to = kl(log_q_V, log_m_V)
    value = beta * kl(log_p_V, log_m_V) + (1 - beta) * student_to
  else:
    value = divergence(log_p_V, log_q_V, kind, beta)
    student_to = value if kind == 'reverse_kl' else jnp.zeros_like(value)
  return value, of_student_1[..., 0], of_teacher_1[..., 0], student_to


def slope(measure: Measure, student, other, *per_token):
  """The gradient by a student's logits. The last array of `per_token` is the product of the cotangent and `rate`.

  With q, p, m as in the API and r as in `statistics`, by the chain rule through q = softmax(logits / temperature):
    forward KL      q - p
    reverse KL      q (log q - log r - KL(q || r))
    Jensen-Shannon  the same times 1 - beta, because dD / dq = (1 - beta) log (q / m): the terms of p and m cancel
    rest            the softmax over the logits that are not excluded
  The logarithm of q / r is computed from that of p / q, without the logarithm of q or p alone, which overflow sooner.

  Args:
    student, other: tiles of the student's logits, and of the teacher's or of the array that excludes tokens.
    per_token: for 'rest' its logsumexp and the factor; otherwise what `statistics` returned without the value, and the
      factor. They broadcast against the tiles.
  """
  student = measure.tempered(student)
  if measure.kind == 'rest':
    rest, factor = per_token
    return jnp.exp(student + other - rest) * factor
  of_student, of_teacher, student_to, factor = per_token
  log_q, log_p = student - of_student, measure.tempered(other) - of_teacher
  if measure.kind == 'forward_kl': return (jnp.exp(log_q) - jnp.exp(log_p)) * factor
  log_r_to_q = log_p - log_q
  if measure.kind == 'jensen_shannon':   # log (beta p / q + 1 - beta)
    log_r_to_q = _logaddexp(log_r_to_q + math.log(measure.beta), math.log1p(-measure.beta))
  return -jnp.exp(log_q) * (log_r_to_q + student_to) * factor


def combined(one: tuple, other: tuple) -> tuple:
  """Joins the values of two sets of columns to those of both. Values are the logsumexp of a; or that, the logsumexp of b,
  and the mean of a - b under softmax(a)."""
  total = tuple(_logaddexp(x, y) for x, y in zip(one[:2], other[:2]))
  if len(one) == 1: return total
  weighted = (jnp.exp(part[0] - total[0]) * part[2] for part in (one, other))
  return *total, sum(weighted)


def _logaddexp(x, y):
  # jnp.logaddexp handles infinities and NaN by operations that kernels do not have.
  largest = jnp.maximum(x, y)
  return largest + jnp.log(jnp.exp(x - largest) + jnp.exp(y - largest))


def top_k(log_p_BTA, log_q_BTA, others_BT, measure: Measure, V: int):
  """The divergence over the listed tokens and all others as one outcome, whose log-probability by the student is given."""
  if log_p_BTA.shape[-1] == V: return divergence(log_p_BTA, log_q_BTA, measure.kind, measure.beta)
  # log(1 - sum p), where rounding may have made the sum larger than 1.
  left_BT1 = -jnp.expm1(jnp.minimum(jax.nn.logsumexp(log_p_BTA, axis=-1, keepdims=True), 0))
  return divergence(jnp.concatenate([log_p_BTA, jnp.log(left_BT1)], -1),
                    jnp.concatenate([log_q_BTA, others_BT[..., None]], -1), measure.kind, measure.beta)


def sampled(counts_BTA, log_q_BTA):
  """The cross-entropy on counted samples."""
  return -jnp.sum(counts_BTA * log_q_BTA, axis=-1) / jnp.maximum(jnp.sum(counts_BTA, axis=-1), 1)
