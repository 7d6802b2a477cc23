"""Cross-entropy of a linear layer's logits, without keeping the logits."""
from efficient_lm.lazy import lazy
from efficient_lm.ops import dispatch, mosaic
from efficient_lm.ops.linear_cross_entropy import limits, reference, xla

pallas_gpu = lazy('efficient_lm.ops.linear_cross_entropy.pallas_gpu')
pallas_tpu = lazy('efficient_lm.ops.linear_cross_entropy.pallas_tpu')


def linear_cross_entropy(hidden_BTD, head_DV, labels_BT, *, implementation: str = 'auto'):
  """Negative log-likelihood of each label, and the log of its normaliser. Differentiable in hidden and head.

  Args:
    hidden_BTD: what the last layer reads.
    head_DV: its weight, in the dtype of hidden.
    labels_BT: int32 in [0, V). Tokens that do not count are masked in the result.
    implementation: 'auto', 'pallas_gpu' (Hopper), 'pallas_tpu', 'xla' or 'reference'.

  Returns:
    nll_BT = logsumexp_BT - logits[label], and logsumexp_BT: nats, float32. The gradient by the logits is rounded to the
    dtype of hidden before it is multiplied.
  """
  return dispatch.run('linear_cross_entropy', IMPLEMENTATIONS, implementation, hidden_BTD, head_DV, labels_BT)


def backward(hidden_BTD, head_DV, labels_BT, logsumexp_BT, g_nll_BT, g_logsumexp_BT, *, implementation: str = 'auto'):
  """The backward pass alone, as benchmarks time it: gradients by hidden and head, from those by the two results."""
  return dispatch.run('linear_cross_entropy', BACKWARD, implementation, hidden_BTD, head_DV, labels_BT, logsumexp_BT,
                      g_nll_BT, g_logsumexp_BT)


def _on(pass_: str):
  """The table of implementations of one pass."""
  return {
    'pallas_gpu': mosaic.kernel(pallas_gpu, pass_, 'hopper', limits.gpu),
    'pallas_tpu': mosaic.kernel(pallas_tpu, pass_, 'tpu', limits.tpu),
    'xla': dispatch.Implementation(getattr(xla, pass_)),
    'reference': dispatch.Implementation(getattr(reference, pass_)),
  }


IMPLEMENTATIONS = _on('linear_cross_entropy')
BACKWARD = _on('backward')
