"""What a mixture reports of a batch: sums over its tokens, from which the balancing losses and the metrics are computed.

Sums add up over microbatches and devices. Balancing losses are defined over the global batch, and divide the sums of a part
of it by totals of the whole: so the same batch gives the same loss however it is divided.
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, meta_fields=['balance'],
                   data_fields=['rows_E', 'num_tokens', 'entropy', 'dropped', 'term_sums'])
@dataclasses.dataclass(frozen=True)
class Statistics:
  """Of one layer, or of a stack of them with L in front of every array; padding counts for nothing.

  rows_E: rows that were routed to each expert, before any was dropped. num_tokens: of the batch. entropy: of the router, in
  nats, summed over tokens. dropped: rows, for lack of capacity or of buffer. term_sums: `term.sums` of each of the `balance`
  terms. All float32; counts are exact up to 2^24.
  """
  rows_E: Any
  num_tokens: Any
  entropy: Any
  dropped: Any
  term_sums: tuple[Any, ...]
  balance: tuple[Any, ...]

  @property
  def load_E(self):
    """Rows of each expert over the mean: 1 is balanced."""
    return self.rows_E / jnp.maximum(jnp.mean(self.rows_E, -1, keepdims=True), 1e-9)

  @property
  def reads_load(self) -> bool:
    """Whether a loss asks for the load of the global batch."""
    return any(term.reads_load for term in self.balance)

  def losses(self, num_tokens=None, total: 'Statistics | None' = None) -> dict[str, jax.Array]:
    """Weighted balancing losses by name, (L,) or scalars. Of a microbatch, `num_tokens` and `total` are those of its global
    batch (of `total` the load is read, and only if a term reads it): the losses of all microbatches then add up to that of
    the global batch."""
    num_tokens = jnp.maximum(self.num_tokens if num_tokens is None else num_tokens, 1)
    load_E = jax.lax.stop_gradient((total or self).load_E)
    found = (term.loss(sums, load_E, num_tokens) for term, sums in zip(self.balance, self.term_sums))
    return {name: loss for losses in found for name, loss in losses.items()}

  def metrics(self) -> dict[str, jax.Array]:
    """For the log: `load_E`, and by layer the largest excess of a load over the mean (MaxVio of Wang et al. 2024), the
    number of experts without a row, the router's mean entropy in nats, the share of rows dropped."""
    load_E = self.load_E
    return {
      'load_E': load_E,
      'max_violation': jnp.max(load_E, -1) - 1,
      'dead_experts': jnp.sum(self.rows_E == 0, -1),
      'router_entropy': self.entropy / jnp.maximum(self.num_tokens, 1),
      'dropped_share': self.dropped / jnp.maximum(jnp.sum(self.rows_E, -1), 1),
    }
