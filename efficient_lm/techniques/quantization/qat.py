"""Quantization-aware training: the forward pass uses rounded weights and activations, the gradient passes through."""
import dataclasses
from typing import Any

from efficient_lm.compression import rules
from efficient_lm.compression.rules import Rule
from efficient_lm.errors import too_small
from efficient_lm.formats import Int, MeanSquaredError
from efficient_lm.lazy import lazy

jax = lazy('jax')
learned = lazy('efficient_lm.weights.learned')
quantized = lazy('efficient_lm.weights.quantized')
rotation = lazy('efficient_lm.weights.rotated')


@dataclasses.dataclass(kw_only=True)
class StraightThrough:
  """Scales are fitted anew at each step, by the format's own range, and gradients pass straight through (Jacob et al. 2018,
  arXiv 1712.05877, section 3)."""

  def of_weight(self, weight, format): return quantized.Rounding(format)
  def of_tokens(self, weight, format): return quantized.Rounding(format)


@dataclasses.dataclass(kw_only=True)
class LearnedSteps:
  """Steps are learned with the weights: LSQ, `learned.LearnedStep`. `range` fits the first steps of weights: one of
  `formats`, or None for the paper's 2 <|w|> / sqrt(Q_P). Those are up to 1.8 times too wide, and steps move by the learning
  rate only: configs/baseline.py trained for 200 steps more in 4 / 3 bits comes to 1.631 / 1.668 bits per byte from the
  paper's and to 1.605 / 1.638 from the least squared error, and after 100 steps from the start to 2.977 / 3.022 and 2.944 /
  3.038 (one seed). Activations need a format with scales=Tensor()."""
  range: Any = dataclasses.field(default_factory=MeanSquaredError)

  def of_weight(self, weight, format): return learned.LearnedStep.of_weight(weight, format, self.range)
  def of_tokens(self, weight, format): return learned.LearnedStep.of_tokens(weight, format)


@dataclasses.dataclass(kw_only=True)
class StretchedLevels:
  """Learned levels, evenly cut out of a learned interval: SEQ of ParetoQ, `learned.Stretched`, for 2 bits on MidRise and for
  three levels on Int(bits=2). `range` fits the first ones: one of `formats`, or None for the paper's, up to the largest
  magnitude (in 2 / 1.58 bits 1.731 / 1.838 bits per byte, where `LearnedSteps` is measured, and 1.710 / 1.787 from the least
  squared error). Activations need a format with scales=Tensor()."""
  range: Any = dataclasses.field(default_factory=MeanSquaredError)

  def of_weight(self, weight, format): return learned.Stretched.of_weight(weight, format, self.range)
  def of_tokens(self, weight, format): return learned.Stretched.of_tokens(weight, format)


@dataclasses.dataclass(kw_only=True)
class LearnedClip:
  """Activations are clipped at a learned limit: PACT, `learned.ClippedActivation`, for a format with scales=Tensor(). For
  activations only."""

  def of_tokens(self, weight, format): return learned.ClippedActivation.of_tokens(weight, format)


@dataclasses.dataclass(kw_only=True)
class QuantAware:
  """Trains the weights that `rules` give a format as floats that multiply as their rounding. `method` says where the scales
  of weights come from and how gradients pass, `activation_method` the same of activations. Rounding begins after `start`
  steps, and until then all products are of the float model's numbers, bit for bit. (Learned steps are fitted when the model
  is made: let them start at 0, from a trained model.) Rules without any format leave the float model itself. Routers,
  embedding and head stay float unless a rule names them."""
  rules: tuple[Rule, ...] = (Rule(weights=Int(bits=8)),)
  method: Any = dataclasses.field(default_factory=StraightThrough)
  activation_method: Any = dataclasses.field(default_factory=StraightThrough)
  start: int = 0

  touches = 'model'

  def check(self):
    yield from rules.check_rules(self.rules)
    yield from too_small(self, start=0)
    for field, verb in (('method', 'of_weight'), ('activation_method', 'of_tokens')):
      if not hasattr(getattr(self, field), verb):
        yield field, getattr(self, field), f'must be a method for {"weights" if verb == "of_weight" else "activations"}'

  def __call__(self, learner, key):
    model = rules.apply(learner.model, self.rules, self.rounding)
    if model is learner.model: return learner
    note = rules.describe(learner.model, self.rules, f'QuantAware ({type(self.method).__name__})')
    return learner.replace(model=model, notes=(*learner.notes, note))

  def rounding(self, path: str, weight, rule: Rule):
    """The weight as it is trained by a rule; of one whose inputs are rotated, what is multiplied with them."""
    return rotation.within(weight, lambda inner: self.rounded(inner, rule))

  def rounded(self, weight, rule: Rule):
    """One that is not rotated."""
    quantized.check_fits(weight, rule.weights, rule.activations)
    weights = None if rule.weights is None else self.method.of_weight(weight, rule.weights)
    activations = None if rule.activations is None else self.activation_method.of_tokens(weight, rule.activations)
    return quantized.FakeQuantized(weight, self.delayed(weights, weight), self.delayed(activations, weight))

  def delayed(self, quantizer, weight):
    """The quantizer, begun at `start`."""
    if quantizer is None or self.start == 0: return quantizer
    shape = jax.eval_shape(lambda weight: weight.materialize(), weight).shape
    return quantized.Delayed(quantizer, self.start, shape[:len(shape) - len(weight.axes)])
