"""BitNet b1.58: ternary weights and 8-bit activations from the first step of training to the last."""
import dataclasses
import re

from efficient_lm.compression import rules
from efficient_lm.compression.rules import Rule
from efficient_lm.errors import Misfit
from efficient_lm.formats import Int, Ternary
from efficient_lm.lazy import lazy

quantized = lazy('efficient_lm.weights.quantized')


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
  where: str = rules.LAYERS
  normalized: str = r'/(output|down)$'

  touches = 'model'

  def check(self):
    for field in ('where', 'normalized'):
      try: re.compile(getattr(self, field))
      except re.error as error: yield field, getattr(self, field), f'must be a regular expression: {error}'

  def __call__(self, learner, key):
    rule = Rule(where=self.where, weights=Ternary(), activations=Int())
    found = []

    def ternary(path, weight, rule):
      made = quantized.FakeQuantized(weight, quantized.Rounding(rule.weights), quantized.Rounding(rule.activations))
      if not re.search(self.normalized, path): return made
      found.append(path)
      return quantized.Normalized(made)

    model = rules.apply(learner.model, (rule,), ternary)
    if not found:
      paths = ', '.join(rules.assign(learner.model, (rule,)))
      raise Misfit(f'normalized={self.normalized!r} matches none of the weights that become ternary: {paths}')
    note = f'{rules.describe(learner.model, (rule,), "BitNet")}; a norm before {", ".join(found)}'
    return learner.replace(model=model, notes=(*learner.notes, note))
