"""The loss of a language model's last layer as its equation, with all logits."""
import jax
import jax.numpy as jnp


def linear_cross_entropy(hidden_BTD, head_DV, labels_BT):
  """logits = hidden @ head; nll = logsumexp(logits) - logits[label]."""
  logits_BTV = jnp.einsum('BTD,DV->BTV', hidden_BTD, head_DV, preferred_element_type=jnp.float32)
  logsumexp_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  label_BT = jnp.take_along_axis(logits_BTV, labels_BT[..., None], axis=-1)[..., 0]
  return logsumexp_BT - label_BT, logsumexp_BT


def backward(hidden_BTD, head_DV, labels_BT, logsumexp_BT, g_nll_BT, g_logsumexp_BT):
  """The gradients by hidden and head. The logsumexp of the forward pass is not needed here."""
  del logsumexp_BT
  _, pull = jax.vjp(lambda hidden, head: linear_cross_entropy(hidden, head, labels_BT), hidden_BTD, head_DV)
  return pull((g_nll_BT, g_logsumexp_BT))
