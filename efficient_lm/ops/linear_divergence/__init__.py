"""How far a student's next-token distribution is from its teacher's, without building the logits of either.

The student is q = softmax(hidden @ head / temperature). The teacher is one of three signals:

- `linear_divergence`: its own hidden state and head, of any width: p = softmax(teacher_hidden @ teacher_head / temperature).
- `linear_top_k_divergence`: its A likeliest tokens, from a cache, say. Tokens without a probability are one bucket, whose
  mass is what is left: with p_a = exp(logprob_a) the two distributions have A + 1 outcomes,
    p = (p_1 … p_A, 1 - sum p_a) and q = (q_1 … q_A, sum of q_v over the other v),
  and by the data-processing inequality their divergence is at most that of the whole. Renormalising the A instead would
  say nothing of how much mass the student should leave to the rest.
- `linear_sampled_cross_entropy`: tokens drawn from it, with counts: an unbiased estimate of the cross-entropy, which is
  the forward divergence plus the teacher's entropy (Anshumann et al. 2025, arXiv 2503.16870).

Divergences, by `kind`:

- 'forward_kl': KL(p || q) = sum p (log p - log q)   (Hinton et al. 2015, eq. 4, before its factor temperature^2)
- 'reverse_kl': KL(q || p), infinite where p alone is 0
- 'jensen_shannon': beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, 0 < beta < 1; at most
  -beta log beta - (1 - beta) log(1 - beta), log 2 at 1/2   (Agarwal et al. 2023, arXiv 2306.13649, eq. 1)

All are in nats, float32, per token, and differentiable in the student's hidden and head alone. None is multiplied with
temperature^2: that is a loss's business.
"""
from efficient_lm.lazy import lazy
from efficient_lm.ops import dispatch, mosaic
from efficient_lm.ops.linear_cross_entropy import limits
from efficient_lm.ops.linear_divergence import reference, xla

pallas_gpu = lazy('efficient_lm.ops.linear_divergence.pallas_gpu')
pallas_tpu = lazy('efficient_lm.ops.linear_divergence.pallas_tpu')

KINDS = ('forward_kl', 'reverse_kl', 'jensen_shannon')


def linear_divergence(hidden_BTD, head_DV, teacher_hidden_BTE, teacher_head_EV, *, kind: str = 'forward_kl',
                      beta: float = 0.5, temperature: float = 1.0, implementation: str = 'auto'):
  """Divergence_BT of the student from a teacher of the same vocabulary, given by hidden state and head.

  Args:
    hidden_BTD, head_DV: the student's, in one dtype. The gradient by its logits is rounded to it before it is multiplied.
    teacher_hidden_BTE, teacher_head_EV: in a dtype of their own.
    kind, beta: see the module.
    implementation: 'auto', 'pallas_gpu' (Hopper), 'pallas_tpu', 'xla' or 'reference'.
  """
  _check(kind, beta, temperature)
  if head_DV.shape[1] != teacher_head_EV.shape[1]:
    raise ValueError(f'student with a vocabulary of {head_DV.shape[1]}, teacher with {teacher_head_EV.shape[1]}: '
                     'they must share one tokenizer')
  return dispatch.run('linear_divergence', IMPLEMENTATIONS, implementation, hidden_BTD, head_DV, teacher_hidden_BTE,
                      teacher_head_EV, kind=kind, beta=beta, temperature=temperature)


def linear_top_k_divergence(hidden_BTD, head_DV, ids_BTA, logprobs_BTA, *, kind: str = 'forward_kl', beta: float = 0.5,
                            temperature: float = 1.0, implementation: str = 'auto'):
  """Divergence_BT of the student from a teacher known by some of its log-probabilities, the rest being one bucket.

  Args:
    ids_BTA: int32 in [0, V), different for each of a token's A. With A = V nothing is left for a bucket.
    logprobs_BTA: the teacher's log-probability of each, over the whole vocabulary and at the same temperature as the
      student's here; -inf says that it gives 0. What their sum exceeds 1 by is taken for rounding.
    hidden_BTD, head_DV, kind, beta, temperature, implementation: as for linear_divergence.
  """
  _check(kind, beta, temperature)
  return dispatch.run('linear_top_k_divergence', TOP_K, implementation, hidden_BTD, head_DV, ids_BTA, logprobs_BTA,
                      kind=kind, beta=beta, temperature=temperature)


def linear_sampled_cross_entropy(hidden_BTD, head_DV, ids_BTA, counts_BTA, *, temperature: float = 1.0,
                                 implementation: str = 'auto'):
  """Cross_entropy_BT of the student on samples of the teacher: -sum_a (n_a / sum n) log q_a; 0 where no sample is.

  Args:
    ids_BTA: int32 in [0, V); one that repeats counts again.
    counts_BTA: how often each was drawn, at least 0, of any dtype.
    hidden_BTD, head_DV, temperature, implementation: as for linear_divergence.
  """
  _check('forward_kl', 0.5, temperature)
  return dispatch.run('linear_sampled_cross_entropy', SAMPLED, implementation, hidden_BTD, head_DV, ids_BTA, counts_BTA,
                      temperature=temperature)


def _check(kind: str, beta: float, temperature: float):
  if kind not in KINDS: raise ValueError(f'no divergence {kind!r}: choose one of {KINDS}')
  if not 0 < beta < 1: raise ValueError(f'beta of {beta}: it must be between 0 and 1; for the ends choose a KL as `kind`')
  if temperature <= 0: raise ValueError(f'temperature of {temperature}: it must be positive')


def _table(name: str):
  # What limits a kernel are the student's arrays, as those of the cross-entropy: they alone are multiplied there.
  return {
    'pallas_gpu': mosaic.kernel(pallas_gpu, name, 'hopper', limits.gpu),
    'pallas_tpu': mosaic.kernel(pallas_tpu, name, 'tpu', limits.tpu),
    'xla': dispatch.Implementation(getattr(xla, name)),
    'reference': dispatch.Implementation(getattr(reference, name)),
  }


IMPLEMENTATIONS = _table('linear_divergence')
TOP_K = _table('linear_top_k_divergence')
SAMPLED = _table('linear_sampled_cross_entropy')
