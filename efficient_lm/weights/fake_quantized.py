"""Weights of quantization-aware training: they train as floats and multiply as their quantized values.

`converted` stores a FakeQuantized as a Quantized that dequantizes to the same numbers bit for bit, unless their scale is a
mean (`Ternary`): the sum of n numbers depends on its order, by less than 2^-21 of it for n = 4096.

Their products differ by rounding. Quantized multiplies integers where it can, whose sum is exact, and scales the result;
FakeQuantized multiplies floats in the dtype of the activations, to which it rounds both of them first. With u its unit
roundoff (2^-24 of float32, 2^-8 of bfloat16) and K products in a sum, they differ by at most

  (4 u + K * 2^-24) * the sum of the magnitudes of the products:

in float32 the order of the sum is all there is to see, in bfloat16 two operands and two results are rounded. There it comes
to 0.33 % rms of a product over K = 64. In a whole model some numbers of the next layer's tokens fall on the other side of
the border between two levels for it: logits of two layers come to differ by as much as those in bfloat16 and float32 do.
"""
import jax.numpy as jnp
from jax import lax

from efficient_lm.errors import IncompatibleError
from efficient_lm.weights.invariants import Bits, Zeros
from efficient_lm.weights.layout import Layout, reduction
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.quantizers import Quantizer, quantize_tokens
from efficient_lm.weights.weight import Weight, Wrapper


class FakeQuantized(Wrapper):
  """Trains as `inner`, multiplies as its quantized values. `weights` and `activations` are Quantizers, or None for
  floats."""

  def __init__(self, inner: Weight, weights: Quantizer | None, activations: Quantizer | None = None):
    self.inner, self.weights, self.activations = inner, weights, activations

  @property
  def kind(self):
    return self.inner.kind if self.weights is None else f'{self.inner.kind}, fake-quantized to {self.weights.format.name}'

  def materialize(self):
    if self.weights is None: return self.inner.materialize()
    layout = Layout.of(self.inner)
    return layout.array(self.weights(layout.matrix(self.inner.materialize()), layout.reduce(self.weights.format)))

  def prepare_input(self, x, axes: str):
    return quantize_tokens(self.activations, self.inner.prepare_input(x, axes), axes, self.inputs)

  def cast(self, dtype):
    return self   # rounding to `dtype` first would change which grid point is nearest

  def invariants(self):
    if self.weights is None: return self.inner.invariants()
    format = self.weights.format
    lost = ('bits',) if format.has_zero else ('bits', 'zeros', 'pattern')
    kept = (one for one in self.inner.invariants() if one.kind not in lost)
    return (*kept, Bits(format.bits, format.name))

  def converted(self) -> Weight:
    """The same numbers (of `Ternary`, to the last bits of a mean), stored in few bits. One whose activations alone are
    quantized stays as it is."""
    if self.weights is None: return self
    if isinstance(self.inner, Normalized):
      return self.inner.around(lambda inner: FakeQuantized(inner, self.weights, self.activations).converted())
    layout = Layout.of(self.inner)
    matrix_OI = layout.matrix(self.inner.materialize())
    scales = self.weights.scales(matrix_OI, layout.reduce(self.weights.format))
    activations = None if self.activations is None else self.activations.after_training()
    zeros = any(isinstance(one, Zeros) for one in self.invariants())
    return Quantized(self.weights.format.encode(matrix_OI, scales), self.weights.format, layout, activations, zeros)


def fake_quantized(weight: Weight, weights: Quantizer | None, activations: Quantizer | None = None) -> Weight:
  """The weight as QAT trains it. What is masked stays exactly zero: in a format without a zero the mask goes around, too.

  Raises IncompatibleError for a weight that a pruning technique of the same training prunes in such a format: its mask is
  not known yet.
  """
  made = FakeQuantized(weight, weights, activations)
  if weights is None or weights.format.has_zero: return made
  if weight.pruned:
    raise IncompatibleError(f'{weights.format.name} has no zero, and what is pruned cannot stay zero: choose Int(…)')
  return Masked(made, weight.keep.get_value(), weight.pattern) if isinstance(weight, Masked) else made


class Normalized(Wrapper):
  """Divides what `inner` is multiplied with by its root mean square over the inputs, before anything else: an RMSNorm (Zhang
  and Sennrich 2019, arXiv 1910.07467) without parameters. Quantizing tokens to few levels asks for it where a layer has no
  norm in front of a product: sub-LN (Wang et al. 2022, arXiv 2210.06423) as BitNet has it."""

  def __init__(self, inner: Weight, eps: float = 1e-6):
    self.inner, self.eps = inner, eps

  @property
  def kind(self): return f'{self.inner.kind}, after a norm'

  def around(self, change) -> 'Normalized':
    """With change(inner) in place of `inner`."""
    return Normalized(change(self.inner), self.eps)

  def cast(self, dtype): return self.around(lambda inner: inner.cast(dtype))
  def take(self, ids): return self.inner.take(ids)

  def prepare_input(self, x, axes: str):
    return self.inner.prepare_input(self.normalized(x, axes), axes)

  def contract(self, equation: str, x, dtype=None):
    return self.inner.contract(equation, self.normalized(x, equation.split(',')[0]), dtype)

  def contract_grouped(self, x_MD, sizes_E):
    return self.inner.contract_grouped(self.normalized(x_MD, 'M' + self.inputs), sizes_E)

  def nll(self, hidden_BTD, labels_BT):
    return self.inner.nll(self.normalized(hidden_BTD, 'BTD'), labels_BT)

  def normalized(self, x, axes: str):
    """x itself for a product over other dims than the inputs."""
    if not axes.endswith(self.inputs): return x
    x_32, over = x.astype(jnp.float32), tuple(range(x.ndim - len(self.inputs), x.ndim))
    mean, names = jnp.mean(jnp.square(x_32), over, keepdims=True), reduction(self.inputs).names
    if names: mean = lax.pmean(mean, names)
    return (x_32 * lax.rsqrt(mean + self.eps)).astype(x.dtype)
