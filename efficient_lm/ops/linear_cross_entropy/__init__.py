"""Cross-entropy of a linear layer's logits, without keeping the logits."""
from efficient_lm.ops import dispatch
from efficient_lm.ops.linear_cross_entropy import reference, xla


def linear_cross_entropy(hidden_BTD, head_DV, labels_BT, *, implementation: str = 'auto'):
  """Negative log-likelihood of each label, and the log of its normaliser. Differentiable in hidden and head.

  Args:
    hidden_BTD: what the last layer reads.
    head_DV: its weight, in the dtype of hidden.
    labels_BT: int32 in [0, V). Tokens that do not count are masked in the result.
    implementation: 'auto', 'reference' or 'xla'.

  Returns:
    nll_BT = logsumexp_BT - logits[label], and logsumexp_BT: nats, float32.
  """
  return dispatch.run('linear_cross_entropy', IMPLEMENTATIONS, implementation, hidden_BTD, head_DV, labels_BT)


IMPLEMENTATIONS = {
  'xla': dispatch.Implementation(xla.linear_cross_entropy),
  'reference': dispatch.Implementation(reference.linear_cross_entropy),
}
