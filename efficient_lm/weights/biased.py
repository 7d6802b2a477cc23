"""Biased weights: a product plus one number an output.

A bias is a vector: no technique rewrites it. Rewrites of weights change what it stands around (`beneath`), so that a
quantized or pruned weight keeps its bias in floats.
"""
from flax import nnx

from efficient_lm.errors import IncompatibleError
from efficient_lm.weights.weight import Weight, Wrapper


class Biased(Wrapper):
  """inner's product + bias over the outputs ('NH' of 'DNH'). Its values, as a matrix, are those of `inner`."""

  def __init__(self, inner: Weight, bias):
    outputs = ''.join(letter for letter in inner.axes if letter not in inner.inputs)
    if 'E' in outputs: raise IncompatibleError('biases of experts are not supported')
    self.inner, self.bias = inner, bias if isinstance(bias, nnx.Variable) else nnx.Param(bias, axes=outputs)

  def around(self, change) -> 'Biased':
    """With change(inner) in place of `inner`, and the same bias."""
    return Biased(change(self.inner), self.bias)

  def for_decoding(self):
    inner = self.inner.for_decoding()
    return self if inner is self.inner else Biased(inner, self.bias)

  def contract(self, equation: str, x, dtype=None):
    return self._shifted(equation, self.inner.contract(equation, x, dtype))

  def multiply(self, equation: str, x, array, dtype=None):
    return self._shifted(equation, self.inner.multiply(equation, x, array, dtype))

  def contract_grouped(self, x_MD, sizes_E):
    raise IncompatibleError('biases of experts are not supported')

  def nll(self, hidden_BTD, labels_BT):
    raise IncompatibleError('a head with a bias is not supported')

  def _shifted(self, equation: str, y):
    if not equation.split(',')[0].endswith(self.inputs):
      raise IncompatibleError(f'a product over the outputs of a weight with a bias: {equation}')
    return y + self.bias.get_value().astype(y.dtype)


def beneath(weight: Weight, change) -> Weight:
  """`change` applied to what a bias stands around; to the weight itself without one."""
  return weight.around(change) if isinstance(weight, Biased) else change(weight)


def unbiased(weight: Weight) -> Weight:
  """What `beneath` changes."""
  return weight.inner if isinstance(weight, Biased) else weight
