"""Quality of a model: bits per byte on held-out text."""
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.parallel.processes import checking, fetched
from efficient_lm.parallel.sharding import place, wait_on_cpu
from efficient_lm.training.losses import outputs_of


@jax.jit
def evaluation_sums(model, batch):
  """Nats, counted targets and bytes of text of one batch."""
  outputs = outputs_of(model, batch)
  nll_BT, _ = outputs.head.nll(outputs.hidden_BTD, batch['targets_BT'])
  return jnp.sum(nll_BT * batch['weights_BT']), jnp.sum(batch['weights_BT']), jnp.sum(batch['bytes_BT'])


def evaluate(model, batches: Iterable[dict[str, np.ndarray]], mesh, sums_of: Callable = evaluation_sums) -> dict[str, float]:
  """Bits per byte (comparable across tokenizers), nats and perplexity per token over all `batches`.

  sums_of: (model, batch) -> the three sums of `evaluation_sums`, for a model that is to read a batch in another way. Those
  of batches are added up in float64. Raises Preempted where a signal is waiting to be heard.
  """
  sums, check = [], checking()
  for batch in batches:
    check()
    sums.append(wait_on_cpu(sums_of(model, place(batch, mesh))))
  return quality(*np.sum(np.array(fetched(sums), np.float64), 0))


def quality(nats: float, tokens: float, num_bytes: float) -> dict[str, float]:
  """The figures of so many nats over so many predicted tokens, which stand for so many bytes of text."""
  per_token = nats / tokens
  return {'bits_per_byte': nats / num_bytes / math.log(2), 'nats_per_token': per_token,
          'perplexity': math.exp(min(per_token, 700.0)), 'tokens': int(tokens), 'bytes': int(num_bytes)}
