"""Random pruning: what any other score has to be better than."""
import dataclasses

from efficient_lm.compression.scores import Score


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Random(Score):
  """Every entry is worth a number drawn uniformly, by the key of the stage."""
  drawn = True

  def of(self, w_OI, found):
    import jax
    return jax.random.uniform(found['key'], w_OI.shape)
