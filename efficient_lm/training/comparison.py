"""How far a model is from another one on text: from the model in float that it was made of, say.

Beside what `evaluation` gives, the mean of KL(reference || model) over the predicted tokens, in nats, and the share of them
at which both models find the same token the likeliest.
"""
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efficient_lm.parallel.sharding import place, wait_on_cpu
from efficient_lm.training.evaluation import quality
from efficient_lm.training.losses import outputs_of

ROWS = 1024   # tokens whose logits are there at a time


@jax.jit
def comparison_sums(model, reference, batch):
  """Of one batch, float32 (6,): nats, counted targets and bytes as `evaluation_sums`, then nats of the reference, its
  KL divergence to the model, and targets at which both find the same token the likeliest.

  Both heads give logits as generation computes them, of ROWS tokens at a time. Where one head is wider than the other, as
  vocabularies may be padded, the divergence is of the distributions over the ids that both have.
  """
  outputs, others = outputs_of(model, batch), outputs_of(reference, batch)
  V = min(outputs.head.shape[-1], others.head.shape[-1])
  B, T = batch['targets_BT'].shape
  width = min(T, max(1, ROWS // B))

  def piece(arguments):
    hidden_BtD, other_BtE, targets_Bt, weights_Bt = arguments
    logits_BtV, other_BtV = (head.contract('BTD,DV->BTV', x, jnp.float32) for head, x in
                             ((outputs.head, hidden_BtD), (others.head, other_BtE)))
    nats = [jax.nn.logsumexp(x_BtV, -1) - jnp.take_along_axis(x_BtV, targets_Bt[..., None], -1)[..., 0]
            for x_BtV in (logits_BtV, other_BtV)]
    log_q_BtV, log_p_BtV = (jax.nn.log_softmax(x_BtV[..., :V], -1) for x_BtV in (logits_BtV, other_BtV))
    kl_Bt = jnp.sum(jnp.exp(log_p_BtV) * (log_p_BtV - log_q_BtV), -1)
    same_Bt = jnp.argmax(log_p_BtV, -1) == jnp.argmax(log_q_BtV, -1)
    return [jnp.sum(x_Bt * weights_Bt) for x_Bt in (*nats, kl_Bt, same_Bt)]

  arrays = outputs.hidden_BTD, others.hidden_BTD, batch['targets_BT'], batch['weights_BT']
  nats, other_nats, kl, same = map(jnp.sum, lax.map(piece, tuple(_cut(array, width) for array in arrays)))
  return jnp.stack([nats, jnp.sum(batch['weights_BT']), jnp.sum(batch['bytes_BT']), other_nats, kl, same])


def _cut(array, width: int):
  """(B, T, …) -> (pieces, B, width, …); what fills the last piece is 0, its weights too. The mesh never splits T."""
  B, T, *rest = array.shape
  pieces = -(-T // width)
  padded = jnp.pad(array, [(0, 0), (0, pieces * width - T), *[(0, 0)] * len(rest)])
  return jnp.moveaxis(padded.reshape(B, pieces, width, *rest), 1, 0)


def compare(model, reference, batches: Iterable[dict[str, np.ndarray]], mesh) -> dict[str, float]:
  """What `evaluation.evaluate` gives of the model over all `batches`, and: `kl`, mean KL(reference || model) in nats a
  token; `same_top`, the share of tokens at which both find the same one the likeliest; `reference_perplexity`, a token.

  reference: a model with the same vocabulary, of any other shape. Sums of batches are added up in float64.
  """
  sums = [wait_on_cpu(comparison_sums(model, reference, place(batch, mesh))) for batch in batches]
  nats, tokens, num_bytes, other_nats, kl, same = np.sum(np.array(jax.device_get(sums), np.float64), 0)
  return quality(nats, tokens, num_bytes) | {
    'kl': kl / tokens, 'same_top': same / tokens, 'reference_perplexity': math.exp(min(other_nats / tokens, 700.0))}
