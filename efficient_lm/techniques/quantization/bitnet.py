"""BitNet b1.58: ternary weights and 8-bit activations from the first step of training to the last."""
import dataclasses
import re

from efficient_lm.compression.rules import LAYERS, Rule, check_pattern
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Int, Ternary


@dataclasses.dataclass(kw_only=True)
class BitNet:
  """Weights whose path matches `where` are -1, 0 or 1 times the mean magnitude of their matrix, their inputs 8 bits token by
  token; those that `normalized` matches too divide their inputs by their root mean square first, since no norm of the
  layer stands in front of them (Ma et al. 2024, arXiv 2402.17764, section 2; the scaled layer is that of Wang et al. 2023,
  arXiv 2310.11453). Gradients pass straight through. Embedding and head stay float.

  The recipe asks for more than layers: a higher peak learning rate than that of a float model of the size, since a weight
  that moves a little mostly rounds to what it was, and weight decay 0 in the second half of training, when small weights
  shall no longer be drawn to the border between two levels: AdamW(schedule=…, decay_until=0.5). It is for training from the
  start: a float model loses most of what it knows.
  """
  where: str = LAYERS
  normalized: str = r'/(output|down)$'

  touches = 'model'

  def check(self):
    for field in ('where', 'normalized'): yield from check_pattern(self, field)

  def __call__(self, learner, key):
    from efficient_lm.compression import rewriting
    from efficient_lm.weights.fake_quantized import Normalized, fake_quantized
    from efficient_lm.weights.quantizers import Rounding
    rule, found = Rule(where=self.where, weights=Ternary(), activations=Int()), []

    def ternary(path, weight, rule):
      rewriting.require_float(weight)
      made = fake_quantized(weight, Rounding(rule.weights), Rounding(rule.activations))
      if not re.search(self.normalized, path): return made
      found.append(path)
      return Normalized(made)

    model = rewriting.apply(learner.model, (rule,), ternary)
    if not found:
      paths = ', '.join(rewriting.assign(learner.model, (rule,)))
      raise IncompatibleError(f'normalized={self.normalized!r} matches none of the weights that become ternary: {paths}')
    note = f'{rewriting.describe(learner.model, (rule,), "BitNet")}; a norm before {", ".join(found)}'
    return learner.replace(model=model, notes=(*learner.notes, note))
