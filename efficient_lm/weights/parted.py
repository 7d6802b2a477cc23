"""Weights as decoding on a CPU reads them: the values of stored ones, as `ops.quantized_matmul.PartedMatrix` orders them."""
import math

import jax.numpy as jnp

from efficient_lm.ops import packing
from efficient_lm.ops.contract import is_matrix_product
from efficient_lm.ops.grouped_matmul import grouped_matmul
from efficient_lm.ops.quantized_matmul import PartedMatrix, in_parts, quantized_matmul
from efficient_lm.weights.quantizers import quantize_tokens
from efficient_lm.weights.weight import Frozen, Weight


class Parted(Weight):
  """A `Quantized` weight for decoding. It is as large as that one, but for codes of 3 bits, which take 4, and for scales of
  groups that would cross parts, which there are more of.

  It widens to the very numbers of the stored form, float32 (those of `Affine`, which has no zero point, differ by at most
  2^-22 of a tile's largest magnitude); products sum them in another order, so that results differ by roundings of float32
  sums: at most I * 2^-23 * sum |x_i w_oi| for I inputs (Higham 2002, eq. 3.5). With activations of 8 bits and few rows, sums
  of integers are rounded in the same way.
  """

  def __init__(self, stored):
    self.layout, self.activations = stored.layout, stored.activations
    self.integer_activations, self.stored_kind, self.product = stored.integer_activations, stored.kind, stored.product
    matrix, axes = matrix_of(stored), stored.layout.experts + stored.layout.outputs[0] + stored.layout.inputs[0]
    self.bits = matrix.bits
    self.values, self.scale = Frozen(matrix.values, axes=axes), Frozen(matrix.scale_OQ, axes=axes)
    self.zero = None if matrix.zero_OQ is None else Frozen(matrix.zero_OQ, axes=axes)

  @property
  def axes(self): return self.layout.axes

  @property
  def inputs(self): return self.layout.inputs

  @property
  def kind(self): return self.stored_kind

  @property
  def matrix(self) -> PartedMatrix:
    """(O, I), or (E, O, I)."""
    return PartedMatrix(self.values.get_value(), self.scale.get_value(),
                        None if self.zero is None else self.zero.get_value(), self.bits)

  @property
  def shape(self): return self.layout.array_shape(self.matrix.shape)

  def materialize(self): return self.layout.array(self.matrix.dequantize())

  def prepare_input(self, x, axes: str): return quantize_tokens(self.activations, x, axes, self.inputs)

  def contract(self, equation: str, x, dtype=None):
    x_axes = equation.split(',')[0]
    if self.layout.experts or not (is_matrix_product(equation) and x_axes.endswith(self.inputs)):
      return super().contract(equation, x, dtype)
    rows = x.shape[:x.ndim - len(self.inputs)]
    x = self._rounded(x, x_axes)
    y_MO = quantized_matmul(x.reshape(math.prod(rows), -1), self.matrix, activations=self.integer_activations)
    return y_MO.reshape(*rows, *self.layout.split(self.layout.outputs, y_MO.shape[1])).astype(dtype or x.dtype)

  def contract_grouped(self, x_MD, sizes_E):
    x_MD = self._rounded(x_MD, 'M' + self.inputs)
    return grouped_matmul(x_MD, self.matrix, sizes_E, activations=self.integer_activations)

  def take(self, ids):
    """Rows of an embedding: only those are widened."""
    values, scale, zero = (None if a is None else a[ids.reshape(-1)] for a in (
      self.matrix.values, self.matrix.scale_OQ, self.matrix.zero_OQ))
    return PartedMatrix(values, scale, zero, self.bits).dequantize().reshape(*ids.shape, -1)

  def _rounded(self, x, axes: str):
    """Inputs as the product reads them: some products round them themselves."""
    return x if self.integer_activations else self.prepare_input(x, axes)


def matrix_of(stored) -> PartedMatrix:
  """The matrix of a `Quantized` weight whose numbers are codes plus a constant."""
  values, scales = stored.encoded
  codes, format = packing.unpack(values, stored.format.bits), stored.format
  step, zero = format.integer_steps(scales)
  whole = lambda x: None if x is None else jnp.repeat(x, codes.shape[-2] // x.shape[-2], axis=-2)
  return in_parts(codes, whole(step), whole(zero), format.bits)
