"""How far a model is from another one on text: from the model in float that it was made of, say.

Beside what `evaluation` gives, the mean of KL(reference || model) over the predicted tokens, in nats, and the share of them
at which both models find the same token the likeliest.
"""
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.models.requests import over_pieces
from efficient_lm.parallel.processes import fetched
from efficient_lm.parallel.sharding import place, wait_on_cpu
from efficient_lm.training.evaluation import quality
from efficient_lm.training.losses import outputs_of


@jax.jit
def comparison_sums(model, reference, batch):
  """Of one batch, float32 (6,): nats, counted targets and bytes as `evaluation_sums`, then nats of the reference, its
  KL divergence to the model, and targets at which both find the same token the likeliest.

  Both heads give logits as generation computes them, of some tokens at a time (`over_pieces`). Where one head is wider than
  the other, as vocabularies may be padded, the divergence is of the distributions over the ids that both have.
  """
  outputs, others = outputs_of(model, batch), outputs_of(reference, batch)
  V = min(outputs.head.shape[-1], others.head.shape[-1])

  def piece(hidden_BtD, other_BtE, targets_Bt, weights_Bt):
    logits_BtV, other_BtV = (head.contract('BTD,DV->BTV', x, jnp.float32) for head, x in
                             ((outputs.head, hidden_BtD), (others.head, other_BtE)))
    nats = [jax.nn.logsumexp(x_BtV, -1) - jnp.take_along_axis(x_BtV, targets_Bt[..., None], -1)[..., 0]
            for x_BtV in (logits_BtV, other_BtV)]
    log_q_BtV, log_p_BtV = (jax.nn.log_softmax(x_BtV[..., :V], -1) for x_BtV in (logits_BtV, other_BtV))
    kl_Bt = jnp.sum(jnp.exp(log_p_BtV) * (log_p_BtV - log_q_BtV), -1)
    same_Bt = jnp.argmax(log_p_BtV, -1) == jnp.argmax(log_q_BtV, -1)
    return [jnp.sum(x_Bt * weights_Bt) for x_Bt in (*nats, kl_Bt, same_Bt)]

  arrays = outputs.hidden_BTD, others.hidden_BTD, batch['targets_BT'], batch['weights_BT']
  nats, other_nats, kl, same = over_pieces(piece, arrays)
  return jnp.stack([nats, jnp.sum(batch['weights_BT']), jnp.sum(batch['bytes_BT']), other_nats, kl, same])


def compare(model, reference, batches: Iterable[dict[str, np.ndarray]], mesh) -> dict[str, float]:
  """What `evaluation.evaluate` gives of the model over all `batches`, and: `kl`, mean KL(reference || model) in nats a
  token; `same_top`, the share of tokens at which both find the same one the likeliest; `reference_perplexity`, a token.

  reference: a model with the same vocabulary, of any other shape. Sums of batches are added up in float64.
  """
  sums = [wait_on_cpu(comparison_sums(model, reference, place(batch, mesh))) for batch in batches]
  nats, tokens, num_bytes, other_nats, kl, same = np.sum(np.array(fetched(sums), np.float64), 0)
  return quality(nats, tokens, num_bytes) | {
    'kl': kl / tokens, 'same_top': same / tokens, 'reference_perplexity': math.exp(min(other_nats / tokens, 700.0))}
