"""What quantization-aware training has trained, stored: the stage after it."""
import dataclasses

from efficient_lm.errors import IncompatibleError


@dataclasses.dataclass(kw_only=True)
class Convert:
  """Stores every weight of quantization-aware training in the few bits of its format: the same numbers, bit for bit (of
  `Ternary`, whose scale is a mean, up to the order of its sum), and products that read them as they are stored. Weights
  whose activations alone were quantized stay floats. A model that has none is an error.

  Of a model that computes in float32, products differ by the order of their sums alone. One that computes in bfloat16 trains
  on operands that are rounded once more, to 8 bits, and a stored one multiplies integers (or float8) and rounds the sum: the
  two differ by at most 2^-7 of the sum of |x| |w|, and 2^-7 of the result."""
  across_processes = True

  def __call__(self, model, context):
    return self.abstract(model), ('Convert: fake-quantized weights are stored in few bits',)

  def abstract(self, model):
    from efficient_lm import tree
    from efficient_lm.compression.rewriting import without_low_precision
    from efficient_lm.weights.fake_quantized import FakeQuantized
    if not dict(tree.select(model, FakeQuantized)):
      raise IncompatibleError('Convert: no weight is trained by QuantAware or BitNet, so there is nothing to store')
    return tree.rewrite(without_low_precision(model), FakeQuantized, lambda _, weight: weight.converted())
