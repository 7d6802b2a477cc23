"""Saliencies by gradients: what the loss would change by, to first order, if an entry were zero."""
import dataclasses

from efficient_lm.compression.scores import Score


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Snip(Score):
  """|w * g| with the gradient g of the mean loss over all calibration tokens: the connection sensitivity of SNIP (Lee et al.
  2019, arXiv 1810.02340, eq. 4). Of a model that is trained well, g is near zero, and mostly noise: see `Taylor`."""
  gradient = 'mean'

  def of(self, w_OI, found):
    import jax.numpy as jnp
    return jnp.abs(w_OI * found['mean'])


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Taylor(Score):
  """The mean over the calibration batches of (w * g)^2, with the gradient g of a batch's loss: the first-order importance of
  Molchanov et al. 2019 (arXiv 1906.10771, eq. 8), which does not cancel between batches; w^2 times the diagonal of the
  empirical Fisher information. Fewer sequences in a batch make a finer mean."""
  gradient = 'mean_square'

  def of(self, w_OI, found):
    import jax.numpy as jnp
    return jnp.square(w_OI) * found['mean_square']
