"""Wanda (Sun et al. 2024, arXiv 2306.11695): pruning by weights and activations."""
import dataclasses

from efficient_lm.compression.patterns import PerOutput
from efficient_lm.compression.scores import Score


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Wanda(Score):
  """|w_oi| times the norm of input i over the calibration tokens (eq. 1), compared among the inputs of each output. A layer
  is calibrated on what pruned layers before it give."""
  needs, pattern = ('square',), PerOutput()

  def of(self, w_OI, found):
    import jax.numpy as jnp
    return jnp.abs(w_OI) * jnp.sqrt(found['square'])[..., None, :]
