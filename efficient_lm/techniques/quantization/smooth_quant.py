"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): move what is hard to round from activations into weights.

Activations have a few channels that are far larger than all others, and one token's numbers share a scale. Dividing channel
k by s_k, and multiplying the weights that read it, leaves the products; s_k = peak_k^alpha / w_k^(1 - alpha) (eq. 4), where
peak_k is the largest magnitude of the channel in calibration and w_k that of the weights.
"""
import dataclasses
import functools
import re

from efficient_lm.compression import calibration
from efficient_lm.compression.calibration import compiled
from efficient_lm.errors import Misfit
from efficient_lm.lazy import lazy

jnp = lazy('jax.numpy')
transformer = lazy('efficient_lm.models.transformer')
tree = lazy('efficient_lm.tree')
weights = lazy('efficient_lm.weights.weight')
wiring = lazy('efficient_lm.compression.coupling')


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class SmoothQuant:
  """A stage, to stand in front of rounding. With `alpha` 1 channels of activations come out equally large, with 0 those of
  weights. `where`: the sources (norms, values, `up`) whose channels are scaled, by path; the paper's are r'norm$'."""
  alpha: float = 0.5
  where: str = ''
  sequences: int = 128

  def check(self):
    if not 0 <= self.alpha <= 1: yield 'alpha', self.alpha, 'must be from 0 to 1'
    if self.sequences < 1: yield 'sequences', self.sequences, 'must be at least 1'
    try: re.compile(self.where)
    except re.error as error: yield 'where', self.where, f'must be a regular expression: {error}'

  def __call__(self, model, context):
    """The model with channels scaled, which computes the same, and a line on how far they were apart."""
    wanted = self.wanted(model)
    batches = calibration.first_batches(context.batches(self.sequences), self.sequences)
    peaks = calibration.statistics(model, batches, wanted)
    spread = [float(jnp.max(jnp.max(one['peak'], -1) / jnp.maximum(jnp.median(one['peak'], -1), 1e-9)))
              for one in peaks.values()]
    note = f'SmoothQuant: the largest channel of an input was up to {max(spread):.0f} times the median one'
    return compiled(_smoothed, static_argnames='stage')(model, peaks, stage=self), (note,)

  def abstract(self, model):
    """The same structure, from shapes alone."""
    return _smoothed(model, calibration.unseen(model, self.wanted(model)), stage=self)

  def wanted(self, model) -> dict[str, tuple[str, ...]]:
    """The weights to be observed. Raises Misfit if no source matches `where`."""
    found = {}
    for prefix, layer in tree.select(model, transformer.Block):
      first = calibration.sharing(layer)
      for fan in self.fans(layer): found |= {f'{prefix}/{first[path]}': ('peak',) for path in fan.readers}
    if not found: raise Misfit(f'SmoothQuant: no source of scales matches {self.where!r}')
    return found

  def fans(self, layer):
    """Those that are scaled."""
    return [fan for fan in wiring.fans(layer) if re.search(self.where, fan.source) and wiring.foldable(layer, fan)]


def _smoothed(model, peaks, *, stage: SmoothQuant):
  def change(prefix, layer):
    first = calibration.sharing(layer)
    for fan in stage.fans(layer):
      seen = {path: peaks[f'{prefix}/{first[path]}']['peak'] for path in fan.readers}
      layer = wiring.divided(layer, fan, _scale(layer, fan, seen, stage.alpha))
    return layer
  return tree.rewrite(model, transformer.Block, change)


def _scale(layer, fan, seen, alpha: float):
  """s_C of the source: peak^alpha / weight^(1 - alpha), the largest over all that read the channel; 1 where either is 0."""
  nodes = dict(tree.select(layer, weights.Weight))
  own = wiring.of_experts(nodes.get(fan.source))

  def largest(values):
    over = [fan.gather(jnp.max(x, -2) if wiring.of_experts(nodes[path]) and not own else x, jnp.max)
            for path, x in values.items()]
    return functools.reduce(jnp.maximum, over)

  peak_C = largest(seen)
  # A router stays float, and decides nothing about what rounding costs.
  weight_C = largest({path: jnp.max(jnp.abs(wiring.matrix_of(nodes[path])), -2) for path in fan.readers
                      if not path.endswith('router')})
  return jnp.where((peak_C > 0) & (weight_C > 0), peak_C ** alpha / weight_C ** (1 - alpha), 1)
