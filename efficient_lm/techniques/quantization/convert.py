"""What quantization-aware training has trained, stored: the stage after it."""
import dataclasses

from efficient_lm.lazy import lazy

low_precision = lazy('efficient_lm.weights.low_precision')
quantized = lazy('efficient_lm.weights.quantized')
tree = lazy('efficient_lm.tree')


@dataclasses.dataclass(kw_only=True)
class Convert:
  """Stores every weight that was trained as rounded in the few bits that it was rounded to: the same numbers, and products
  that read them as they are stored. Weights whose activations alone were rounded stay floats. A model that has none is an
  error."""

  def __call__(self, model, context):
    return self.abstract(model), ('Convert: rounded weights are stored in few bits',)

  def abstract(self, model):
    if dict(tree.select(model, low_precision.LowPrecision)):   # how gradients are computed is of no use any more
      model = tree.rewrite(model, low_precision.LowPrecision, lambda _, weight: weight.inner)
    return tree.rewrite(model, quantized.FakeQuantized, lambda _, weight: weight.converted())
