"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): move what is hard to quantize from activations into weights.

Activations have a few channels that are far larger than all others, and one token's numbers share a scale. Dividing channel
k by s_k, and multiplying the weights that read it, leaves the products; s_k = peak_k^alpha / w_k^(1 - alpha) (eq. 4), where
peak_k is the largest magnitude of the channel in calibration and w_k that of the weights.
"""
import dataclasses
import re

from efficient_lm.compression.rules import check_pattern
from efficient_lm.errors import IncompatibleError


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class SmoothQuant:
  """A stage, to stand in front of quantization. With `alpha` 1 channels of activations come out equally large, with 0 those
  of weights. `where`: the producers (norms, values, `up`) whose channels are scaled, by path; the paper's are r'norm$'."""
  alpha: float = 0.5
  where: str = ''
  sequences: int = 128

  def check(self):
    yield from check_pattern(self, 'where')
    if not 0 <= self.alpha <= 1: yield 'alpha', self.alpha, 'must be from 0 to 1'
    if self.sequences < 1: yield 'sequences', self.sequences, 'must be at least 1'

  def __call__(self, model, context):
    """The model with channels scaled, which computes the same, and a line on how far they were apart."""
    import jax
    import jax.numpy as jnp

    from efficient_lm.compression import calibration, scaling
    wanted = self.wanted(model)
    batches = calibration.first_batches(context.batches(self.sequences), self.sequences)
    peaks = calibration.statistics(model, batches, wanted)
    spread = [float(jnp.max(jnp.max(one['peak'], -1) / jnp.maximum(jnp.median(one['peak'], -1), 1e-9)))
              for one in peaks.values()]
    note = f'SmoothQuant: the largest channel of an input was up to {max(spread):.0f} times the median one'
    smooth = jax.jit(lambda model, peaks: scaling.smooth_quant(model, peaks, self.alpha, self.couplings))
    return smooth(model, peaks), (note,)

  def abstract(self, model):
    """The same structure, from shapes alone."""
    from efficient_lm.compression import calibration, scaling
    return scaling.smooth_quant(model, calibration.unseen(model, self.wanted(model)), self.alpha, self.couplings)

  def wanted(self, model) -> dict[str, tuple[str, ...]]:
    """The weights to be observed. Raises IncompatibleError if no producer matches `where`, or all that do have been
    quantized."""
    from efficient_lm import tree
    from efficient_lm.compression import calibration, coupling, rewriting
    from efficient_lm.models.transformer import Block
    found, known = {}, []
    for prefix, layer in tree.select(model, Block):
      first = calibration.sharing(layer)
      known += [one for one in coupling.couplings(layer) if re.search(self.where, one.producer)]
      for one in self.couplings(layer): found |= {f'{prefix}/{first[path]}': ('peak',) for path in one.consumers}
      if not found and known:
        nodes = dict(tree.select(layer, coupling.Weight))
        for path in known[0].consumers: rewriting.named(f'{prefix}/{path}', rewriting.require_float, nodes[path])
    if not found: raise IncompatibleError(f'SmoothQuant: no producer of channels matches {self.where!r}')
    return found

  def couplings(self, layer):
    """Those that are scaled."""
    from efficient_lm.compression.coupling import couplings, foldable
    return [one for one in couplings(layer) if re.search(self.where, one.producer) and foldable(layer, one)]
