"""Quantization-aware training: the forward pass uses rounded weights and activations, the gradient passes through."""
import dataclasses

from efficient_lm import rules
from efficient_lm.formats import Int
from efficient_lm.lazy import lazy
from efficient_lm.rules import Rule

quantized = lazy('efficient_lm.quantized')


@dataclasses.dataclass(kw_only=True)
class QuantAware:
  """Trains the weights that `rules` give a format as floats that multiply as their rounding: scales are fitted anew at each
  step, gradients pass straight through (Jacob et al. 2018, arXiv 1712.05877, section 3). Rules without any format leave the
  float model, bit for bit. Routers, embedding and head stay float unless a rule names them."""
  rules: tuple[Rule, ...] = (Rule(weights=Int(bits=8)),)

  touches = 'model'

  def check(self): yield from rules.check_rules(self.rules)

  def __call__(self, learner, key):
    model = rules.apply(learner.model, self.rules, self.rounding)
    if model is learner.model: return learner
    note = rules.describe(learner.model, self.rules, 'QuantAware')
    return learner.replace(model=model, notes=(*learner.notes, note))

  def rounding(self, path: str, weight, rule: Rule):
    """The weight as it is trained by a rule."""
    quantizer = lambda format: None if format is None else quantized.Rounding(format)
    return quantized.FakeQuantized(weight, quantizer(rule.weights), quantizer(rule.activations))
