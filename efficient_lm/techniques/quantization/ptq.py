"""Post-training quantization (PTQ), as a stage: calibrate on a few batches, then store weights in few bits.

  Quantize(rules=(Rule(weights=Int(bits=4, scales=Group(size=32))),), method=Gptq())

Rules say which weight gets which format. `before` makes the float model easier to quantize without changing what it
computes; `method` quantizes, layer by layer. What lies outside the layers, embedding and head, is quantized by
round-to-nearest (RTN) where a rule names it.
"""
import dataclasses
from typing import Any

from efficient_lm.compression.method import RoundToNearest
from efficient_lm.compression.rules import Rule, check_rules
from efficient_lm.formats import Group, Int


@dataclasses.dataclass(kw_only=True)
class Quantize:
  """The stage. `sequences` of the training distribution are calibrated on, rounded up to whole batches. A matrix that saw
  fewer than `least_tokens` of their tokens, as an unpopular expert may, is quantized by RTN, and named in the notes. Pruned
  entries stay zero. Products of low-precision training end here: a model is calibrated as it will be run."""
  rules: tuple[Rule, ...] = (Rule(weights=Int(bits=4, scales=Group(size=128))),)
  method: Any = dataclasses.field(default_factory=RoundToNearest)
  before: tuple[Any, ...] = ()
  sequences: int = 128
  least_tokens: int = 64

  def check(self):
    yield from check_rules(self.rules)
    if self.sequences < 1: yield 'sequences', self.sequences, 'must be at least 1'
    if self.least_tokens < 0: yield 'least_tokens', self.least_tokens, 'must be 0 or more'

  def __call__(self, model, context):
    """The model in few bits, and what there is to say of it."""
    import jax

    from efficient_lm.compression import calibration, layerwise, rewriting, search
    from efficient_lm.parallel.sharding import shardings
    model = original = rewriting.without_low_precision(model)
    notes = []
    for stage in self.before:
      model, said = stage(model, context)
      notes += said
    jax.eval_shape(self.to_nearest, model)   # refuses what does not fit before anything is calibrated
    notes.append(rewriting.describe(model, self.rules, f'Quantize ({type(self.method).__name__})'))
    layers = layerwise.Layers(self.method, rewriting.assign(model, self.rules), self.least_tokens)
    if self.method.needs:
      batches = calibration.first_batches(context.batches(self.sequences), self.sequences)
      model = calibration.layer_by_layer(model, batches, layers)
      notes += layers.notes(calibration.num_tokens(batches))
    rest = lambda path, weight, rule: weight if path in layers.done else layerwise.nearest(path, weight, rule, self.method)
    model = rewriting.apply(model, self.rules, rest)
    if self.method.needs: notes.append(search.divergence_note(original, model, batches[:1]))
    return jax.device_put(model, shardings(model, context.mesh)) if context.mesh is not None else model, tuple(notes)

  def abstract(self, model):
    """A model of the same structure and shapes, from shapes alone under `jax.eval_shape`."""
    from efficient_lm.compression.rewriting import without_low_precision
    model = without_low_precision(model)
    for stage in self.before: model = stage.abstract(model)
    return self.to_nearest(model)

  def to_nearest(self, model):
    """All that rules name quantized by RTN. Raises IncompatibleError, with its path, for a weight that cannot be stored
    so."""
    from efficient_lm.compression import layerwise, rewriting
    return rewriting.apply(model, self.rules,
                           lambda path, weight, rule: layerwise.nearest(path, weight, rule, self.method))
