"""Quantization-aware training: the forward pass uses rounded weights and activations, the gradient passes through."""
import dataclasses

from efficient_lm.lazy import lazy

coverage = lazy('efficient_lm.coverage')
tree = lazy('efficient_lm.tree')
weights = lazy('efficient_lm.weights')


@dataclasses.dataclass(kw_only=True)
class QuantAware:
  """Absmax straight-through quantization (Jacob et al. 2018) of the weights whose path matches `where`, one scale an
  output channel; with `activation_bits`, also of what they multiply, one scale a token. 16 bits or more is the float
  model, bit for bit. Routers, embedding and head stay float unless `where` is widened."""
  bits: int = 8
  activation_bits: int | None = None
  where: str = r'stacks/.*/(query|key|value|output|latent|gate|up|down)\w*$'

  touches = 'model'

  def check(self):
    if self.bits < 2: yield 'bits', self.bits, 'must be at least 2: one bit has no straight-through absmax grid'
    if self.activation_bits is not None and self.activation_bits < 2:
      yield 'activation_bits', self.activation_bits, 'must be at least 2, or None for float activations'

  def __call__(self, learner, key):
    def quantize(_, weight):
      return weights.FakeQuantized(weight, self.bits, self.activation_bits)
    model = tree.rewrite(learner.model, weights.Weight, quantize, self.where)
    if self.bits >= 16 and (self.activation_bits or 16) >= 16: return learner
    note = coverage.coverage(learner.model, self.where).describe(f'QuantAware ({self.bits} bits)')
    return learner.replace(model=model, notes=(*learner.notes, note))
