"""The divergence of a student's next-token distribution from its teacher's, without keeping the logits of either.

Distillation from another model uses the forward KL of `linear_divergence`. No model or command uses its other divergences,
`linear_top_k_divergence`, or `linear_sampled_cross_entropy`.

The student is q = softmax(hidden @ head / temperature). The teacher is one of three signals:

- `linear_divergence`: its hidden state and head, of any width: p = softmax(teacher_hidden @ teacher_head / temperature).
- `linear_top_k_divergence`: its A likeliest tokens, as they may be stored beforehand. All other tokens are one outcome: with
  p_a = exp(logprob_a) the two distributions have A + 1 outcomes,
    p = (p_1 … p_A, 1 - sum p_a) and q = (q_1 … q_A, sum of q_v over the other v),
  and by the data-processing inequality their divergence is at most that of the whole. Renormalising the A probabilities
  instead would not say how much mass the student should leave to the other tokens.
- `linear_sampled_cross_entropy`: tokens drawn from it, with counts. It is an unbiased estimate of the cross-entropy, which
  is the forward divergence plus the teacher's entropy (Anshumann et al. 2025, arXiv 2503.16870).

Letters, beside the model's: A listed tokens, M tokens, C columns of a chunk, and E the width of the teacher.

Divergences, by `kind`:

- 'forward_kl': KL(p || q) = sum p (log p - log q)   (Hinton et al. 2015, eq. 4, before its factor temperature^2)
- 'reverse_kl': KL(q || p), which is infinite where only p is 0
- 'jensen_shannon': beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, 0 < beta < 1; at most
  -beta log beta - (1 - beta) log(1 - beta), log 2 at 1/2   (Agarwal et al. 2023, arXiv 2306.13649, eq. 1)

All are in nats, float32, for each token, and differentiable in the student's hidden and head alone. None is multiplied by
temperature^2, which is left to the loss.
"""
from efficient_lm.ops import dispatch, mosaic
from efficient_lm.ops.linear_cross_entropy import limits
from efficient_lm.ops.linear_divergence import reference, xla

KINDS = ('forward_kl', 'reverse_kl', 'jensen_shannon')


def linear_divergence(hidden_BTD, head_DV, teacher_hidden_BTE, teacher_head_EV, *, kind: str = 'forward_kl',
                      beta: float = 0.5, temperature: float = 1.0, implementation: str = 'auto'):
  """The divergence_BT of the student from a teacher with the same vocabulary, which is given by its hidden state and head.

  Distillation uses its forward KL; no model uses 'reverse_kl' or 'jensen_shannon'.

  Args:
    hidden_BTD, head_DV: the student's, in one dtype. The gradient by its logits is rounded to that dtype before it is
      multiplied.
    teacher_hidden_BTE, teacher_head_EV: the teacher's, in one dtype.
    kind, beta: see the module.
    temperature: by which logits are divided, positive.
    implementation: 'auto', 'pallas_gpu' (Hopper), 'pallas_tpu', 'xla' or 'reference'.

  Raises:
    ValueError: a wrong kind, beta or temperature, or different vocabularies; or see `dispatch.run`.
  """
  _check(kind, beta, temperature)
  if head_DV.shape[1] != teacher_head_EV.shape[1]:
    raise ValueError(f'student with a vocabulary of {head_DV.shape[1]}, teacher with {teacher_head_EV.shape[1]}: '
                     'they must share one tokenizer')
  return dispatch.run('linear_divergence', IMPLEMENTATIONS, implementation, hidden_BTD, head_DV, teacher_hidden_BTE,
                      teacher_head_EV, kind=kind, beta=beta, temperature=temperature)


def linear_top_k_divergence(hidden_BTD, head_DV, ids_BTA, logprobs_BTA, *, kind: str = 'forward_kl', beta: float = 0.5,
                            temperature: float = 1.0, implementation: str = 'auto'):
  """The divergence_BT of the student from a teacher of which some log-probabilities are known; all other tokens are one
  outcome. No model uses it.

  Args:
    ids_BTA: int32 in [0, V), all different for each token. With A = V there are no other tokens.
    logprobs_BTA: the teacher's log-probabilities of these, over the whole vocabulary, at the temperature that is given here;
      -inf is a probability of 0. A sum above 1 is treated as a rounding error.
    hidden_BTD, head_DV, kind, beta, temperature, implementation: as for linear_divergence.
  """
  _check(kind, beta, temperature)
  return dispatch.run('linear_top_k_divergence', TOP_K, implementation, hidden_BTD, head_DV, ids_BTA, logprobs_BTA,
                      kind=kind, beta=beta, temperature=temperature)


def linear_sampled_cross_entropy(hidden_BTD, head_DV, ids_BTA, counts_BTA, *, temperature: float = 1.0,
                                 implementation: str = 'auto'):
  """The cross_entropy_BT of the student on samples of the teacher: -sum_a (n_a / sum n) log q_a, and 0 for a token without
  samples. No model uses it.

  Args:
    ids_BTA: int32 in [0, V); ids may repeat, and each counts.
    counts_BTA: how often each id was drawn, at least 0, of any dtype.
    hidden_BTD, head_DV, temperature, implementation: as for linear_divergence.
  """
  _check('forward_kl', 0.5, temperature)
  return dispatch.run('linear_sampled_cross_entropy', SAMPLED, implementation, hidden_BTD, head_DV, ids_BTA, counts_BTA,
                      temperature=temperature)


def _check(kind: str, beta: float, temperature: float):
  if kind not in KINDS: raise ValueError(f'no divergence {kind!r}: choose one of {KINDS}')
  if not 0 < beta < 1: raise ValueError(f'beta of {beta}: it must be between 0 and 1; for the ends choose a KL as `kind`')
  if temperature <= 0: raise ValueError(f'temperature of {temperature}: it must be positive')


def _pallas_gpu():
  from efficient_lm.ops.linear_divergence import pallas_gpu
  return pallas_gpu


def _pallas_tpu():
  from efficient_lm.ops.linear_divergence import pallas_tpu
  return pallas_tpu


def _table(name: str):
  # The kernels multiply the student's arrays alone, as those of the cross-entropy do, and have the same limits.
  return {
    'pallas_gpu': mosaic.kernel(_pallas_gpu, name, 'hopper', limits.gpu),
    'pallas_tpu': mosaic.kernel(_pallas_tpu, name, 'tpu', limits.tpu),
    'xla': dispatch.Implementation(getattr(xla, name)),
    'reference': dispatch.Implementation(getattr(reference, name)),
  }


IMPLEMENTATIONS = _table('linear_divergence')
TOP_K = _table('linear_top_k_divergence')
SAMPLED = _table('linear_sampled_cross_entropy')
