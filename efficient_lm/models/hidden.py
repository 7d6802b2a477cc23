"""What a feed-forward layer reports of its hidden units, where there is a penalty on them."""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, meta_fields=['weight', 'count'],
                   data_fields=['magnitude', 'zeros', 'num_tokens'])
@dataclasses.dataclass(frozen=True)
class HiddenUnits:
  """Sums over the tokens of a batch, padding left out, of one layer or of a stack of them with L in front; float32.

  magnitude: of |h| over all units. zeros: how many units are exactly zero. weight: of the loss; count: of hidden units.
  """
  magnitude: Any
  zeros: Any
  num_tokens: Any
  weight: float
  count: int

  reads_load = False

  @classmethod
  def of(cls, h_BTF, segments_BT, weight: float) -> 'HiddenUnits':
    """segments_BT: 0 for padding, or None for none."""
    real_BT1 = jnp.ones(h_BTF.shape[:2], bool)[..., None] if segments_BT is None else (segments_BT > 0)[..., None]
    magnitude = jnp.sum(jnp.where(real_BT1, jnp.abs(h_BTF.astype(jnp.float32)), 0))
    zeros = jnp.sum(real_BT1 & (h_BTF == 0), dtype=jnp.float32)
    return cls(magnitude, zeros, jnp.sum(real_BT1, dtype=jnp.float32), weight, h_BTF.shape[-1])

  def losses(self, num_tokens=None, total=None) -> dict[str, jax.Array]:
    """As `moe.statistics.Statistics`."""
    num_tokens = jnp.maximum(self.num_tokens if num_tokens is None else num_tokens, 1)
    return {'l1': self.weight * self.magnitude / (num_tokens * self.count)}

  def metrics(self) -> dict[str, jax.Array]:
    """The share of hidden units that are exactly zero, by layer."""
    return {'mlp/zeros': self.zeros / (jnp.maximum(self.num_tokens, 1) * self.count)}
