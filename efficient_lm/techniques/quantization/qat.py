"""Quantization-aware training (QAT): the forward pass uses quantized weights and activations, the gradient passes
through."""
import dataclasses
from typing import Any

from efficient_lm.compression.rules import Rule, check_rules
from efficient_lm.errors import at_least
from efficient_lm.formats import Int, MeanSquaredError


@dataclasses.dataclass(kw_only=True)
class StraightThrough:
  """Scales are fitted anew at each step, by the format's own range, and gradients pass straight through (Jacob et al. 2018,
  arXiv 1712.05877, section 3)."""

  def of_weight(self, weight, format):
    from efficient_lm.weights.quantizers import Rounding
    return Rounding(format)

  def of_tokens(self, weight, format): return self.of_weight(weight, format)


@dataclasses.dataclass(kw_only=True)
class LearnedSteps:
  """Steps are learned with the weights: LSQ, `learned.LearnedStep`. `range` fits the first steps of weights: one of
  `formats`, or None for the paper's 2 <|w|> / sqrt(Q_P). Those are up to 1.8 times too wide, and steps move by the learning
  rate only: configs/baseline.py trained for 200 steps more in 4 / 3 bits comes to 1.631 / 1.668 bits per byte from the
  paper's and to 1.605 / 1.638 from the least squared error, and after 100 steps from the start to 2.977 / 3.022 and 2.944 /
  3.038 (one seed). Activations need a format with scales=Tensor()."""
  range: Any = dataclasses.field(default_factory=MeanSquaredError)

  def of_weight(self, weight, format):
    from efficient_lm.weights.learned import LearnedStep
    return LearnedStep.of_weight(weight, format, self.range)

  def of_tokens(self, weight, format):
    from efficient_lm.weights.learned import LearnedStep
    return LearnedStep.of_tokens(weight, format)


@dataclasses.dataclass(kw_only=True)
class StretchedLevels:
  """Learned levels, evenly cut out of a learned interval: SEQ of ParetoQ, `learned.Stretched`, for 2 bits on MidRise and for
  three levels on Int(bits=2). `range` fits the first ones: one of `formats`, or None for the paper's, up to the largest
  magnitude (in 2 / 1.58 bits 1.731 / 1.838 bits per byte, where `LearnedSteps` is measured, and 1.710 / 1.787 from the least
  squared error). Activations need a format with scales=Tensor()."""
  range: Any = dataclasses.field(default_factory=MeanSquaredError)

  def of_weight(self, weight, format):
    from efficient_lm.weights.learned import Stretched
    return Stretched.of_weight(weight, format, self.range)

  def of_tokens(self, weight, format):
    from efficient_lm.weights.learned import Stretched
    return Stretched.of_tokens(weight, format)


@dataclasses.dataclass(kw_only=True)
class LearnedClip:
  """Activations are clipped at a learned limit: PACT, `learned.ClippedActivation`, for a format with scales=Tensor(). For
  activations only."""

  def of_tokens(self, weight, format):
    from efficient_lm.weights.learned import ClippedActivation
    return ClippedActivation.of_tokens(weight, format)


@dataclasses.dataclass(kw_only=True)
class QuantAware:
  """Trains the weights that `rules` give a format as floats that multiply as their quantized values. `method` says where the
  scales of weights come from and how gradients pass, `activation_method` the same of activations. Quantization begins after
  `start` steps, and until then all products are of the float model's numbers, bit for bit. (Learned steps are fitted when
  the model is made: let them start at 0, from a trained model.) Rules without any format leave the float model itself.
  Routers, embedding and head stay float unless a rule names them."""
  rules: tuple[Rule, ...] = (Rule(weights=Int(bits=8)),)
  method: Any = dataclasses.field(default_factory=StraightThrough)
  activation_method: Any = dataclasses.field(default_factory=StraightThrough)
  start: int = 0

  touches = 'model'

  def check(self):
    yield from check_rules(self.rules)
    yield from at_least(self, start=0)
    for field, verb in (('method', 'of_weight'), ('activation_method', 'of_tokens')):
      if not hasattr(getattr(self, field), verb):
        yield field, getattr(self, field), f'must be a method for {"weights" if verb == "of_weight" else "activations"}'

  def check_training(self, training):
    """Quantization that would never begin."""
    if self.start and self.start >= training.steps:
      yield 'start', self.start, f'must be below the {training.steps} steps of the training: quantization would never begin'

  def __call__(self, learner, key):
    from efficient_lm.compression import rewriting
    model = rewriting.apply(learner.model, self.rules, self.rewritten)
    if model is learner.model: return learner
    note = rewriting.describe(learner.model, self.rules, f'QuantAware ({type(self.method).__name__})')
    return learner.replace(model=model, notes=(*learner.notes, note))

  def rewritten(self, path: str, weight, rule: Rule):
    """The weight as it is trained by a rule; of one whose inputs are rotated, what is multiplied with them. Raises
    IncompatibleError for one that is quantized already."""
    from efficient_lm.compression.rewriting import require_float
    from efficient_lm.weights.rotated import within
    require_float(weight)
    return within(weight, lambda inner: self.fake_quantized(inner, rule))

  def fake_quantized(self, weight, rule: Rule):
    """One that is not rotated."""
    from efficient_lm.weights.fake_quantized import fake_quantized
    from efficient_lm.weights.quantized import check_fits
    check_fits(weight, rule.weights, rule.activations)
    weights = None if rule.weights is None else self.method.of_weight(weight, rule.weights)
    activations = None if rule.activations is None else self.activation_method.of_tokens(weight, rule.activations)
    return fake_quantized(weight, self.delayed(weights, weight), self.delayed(activations, weight))

  def delayed(self, quantizer, weight):
    """The quantizer, begun at `start`."""
    from efficient_lm.weights.quantizers import Delayed
    return quantizer if quantizer is None or self.start == 0 else Delayed(quantizer, self.start, weight.stack)
