"""Cross-entropy of a linear layer's logits, without keeping the logits: the loss of every model in training."""
from efficient_lm.ops import dispatch, mosaic
from efficient_lm.ops.linear_cross_entropy import limits, reference, xla


def linear_cross_entropy(hidden_BTD, head_DV, labels_BT, *, implementation: str = 'auto'):
  """The negative log-likelihood of each label, and the log of its normaliser. Differentiable in hidden and head.

  Args:
    hidden_BTD: the input of the last layer.
    head_DV: the weight of the last layer, in the dtype of hidden.
    labels_BT: int32 in [0, V). Callers mask tokens that do not count in the result.
    implementation: 'auto', 'pallas_gpu' (Hopper), 'pallas_tpu', 'xla' or 'reference'.

  Returns:
    nll_BT = logsumexp_BT - logits[label], and logsumexp_BT: in nats, float32. In the backward pass, the gradient by the
    logits is rounded to the dtype of hidden before it is multiplied.
  """
  return dispatch.run('linear_cross_entropy', IMPLEMENTATIONS, implementation, hidden_BTD, head_DV, labels_BT)


def backward(hidden_BTD, head_DV, labels_BT, logsumexp_BT, g_nll_BT, g_logsumexp_BT, *, implementation: str = 'auto'):
  """The backward pass alone, for benchmarks: the gradients by hidden and head, from those by the two results."""
  return dispatch.run('linear_cross_entropy', BACKWARD, implementation, hidden_BTD, head_DV, labels_BT, logsumexp_BT,
                      g_nll_BT, g_logsumexp_BT)


def _pallas_gpu():
  from efficient_lm.ops.linear_cross_entropy import pallas_gpu
  return pallas_gpu


def _pallas_tpu():
  from efficient_lm.ops.linear_cross_entropy import pallas_tpu
  return pallas_tpu


def _on(pass_: str):
  """The table of implementations of one pass."""
  return {
    'pallas_gpu': mosaic.kernel(_pallas_gpu, pass_, 'hopper', limits.gpu),
    'pallas_tpu': mosaic.kernel(_pallas_tpu, pass_, 'tpu', limits.tpu),
    'xla': dispatch.Implementation(getattr(xla, pass_)),
    'reference': dispatch.Implementation(getattr(reference, pass_)),
  }


IMPLEMENTATIONS = _on('linear_cross_entropy')
BACKWARD = _on('backward')
