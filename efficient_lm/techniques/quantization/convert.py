"""What quantization-aware training has trained, stored: the stage after it."""
import dataclasses


@dataclasses.dataclass(kw_only=True)
class Convert:
  """Stores every weight of quantization-aware training in the few bits of its format: the same numbers, and products that
  read them as they are stored. Weights whose activations alone were quantized stay floats. A model that has none is an
  error."""

  def __call__(self, model, context):
    return self.abstract(model), ('Convert: fake-quantized weights are stored in few bits',)

  def abstract(self, model):
    from efficient_lm import tree
    from efficient_lm.compression.rewriting import without_low_precision
    from efficient_lm.weights.fake_quantized import FakeQuantized
    return tree.rewrite(without_low_precision(model), FakeQuantized, lambda _, weight: weight.converted())
