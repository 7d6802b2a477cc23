"""Weights stored in few bits: frozen codes and scales, multiplied as they are stored where there is such a product."""
import dataclasses
import math

import jax
import jax.numpy as jnp

from efficient_lm.formats import MXFP8, Channel, Encoded, Float8, Format, Int
from efficient_lm.formats.format import Scales
from efficient_lm.ops.contract import is_matrix_product
from efficient_lm.ops.grouped_matmul import grouped_matmul
from efficient_lm.ops.quantized_matmul import QuantizedMatrix, quantized_matmul
from efficient_lm.weights.invariants import Bits, Pattern, Zeros
from efficient_lm.weights.layout import Layout, matrix_shape
from efficient_lm.weights.parted import Parted
from efficient_lm.weights.quantizers import Quantizer, Rounding, quantize_tokens
from efficient_lm.weights.weight import Frozen, Weight


def round_to_nearest(weight: Weight, format: Format, activations: Quantizer | None = None, range=None) -> 'Quantized':
  """`weight` stored by round-to-nearest (RTN), its scales fitted by `range` (default: the format's own)."""
  layout = Layout.of(weight)
  matrix_OI = layout.matrix(weight.materialize())
  return Quantized(format.encode(matrix_OI, format.scales_for(matrix_OI, range)), format, layout, activations)


def check_fits(weight: Weight, weights: Format | None = None, activations: Format | None = None):
  """Raises IncompatibleError where the weight, or one token of its inputs, cannot be cut into tiles as these formats ask."""
  matrix_OI = jax.ShapeDtypeStruct(matrix_shape(weight), jnp.float32)
  token_1I = jax.ShapeDtypeStruct((1, matrix_OI.shape[1]), jnp.float32)
  if weights is not None: jax.eval_shape(weights.scales_for, matrix_OI)
  if activations is not None: jax.eval_shape(activations.scales_for, token_1I)


class Quantized(Weight):
  """A frozen weight in few bits.

  values, scale, zero, outer: those of `formats.Encoded`, as Variables that lie on a mesh as the matrix does. Experts with 8
  bits are kept inputs first, (..., E, I, O), as the grouped product reads them. `keeps_zeros`: whether its zeros are those
  of a pruned weight, which are promised to stay; `pattern`: the N:M pattern that they keep to, or None.
  """
  pattern: Pattern | None = None   # no attribute of its own where there is none

  def __init__(self, encoded: Encoded, format: Format, layout: Layout, activations: Quantizer | None = None,
               keeps_zeros: bool = False, pattern: Pattern | None = None):
    self.format, self.layout, self.activations = dataclasses.replace(format), layout, activations
    self.keeps_zeros = keeps_zeros
    if pattern is not None: self.pattern = dataclasses.replace(pattern)
    experts, (output, input) = layout.experts, layout.letters[-2:]
    by_rows, by_groups = experts + output + input, experts + input + output
    if self.inputs_first: values, axes = jnp.swapaxes(encoded.values, -1, -2), by_groups
    else: values, axes = encoded.values, by_rows
    self.values, self.scale = Frozen(values, axes=axes), Frozen(encoded.scales.scale, axes=by_groups)
    self.zero = None if encoded.scales.zero is None else Frozen(encoded.scales.zero, axes=by_groups)
    self.outer = None if encoded.scales.outer is None else Frozen(encoded.scales.outer, axes=experts + '11')

  @property
  def axes(self): return self.layout.axes

  @property
  def inputs(self): return self.layout.inputs

  @property
  def kind(self): return f'{self.format.name}, {self.pattern}' if self.pattern else self.format.name

  @property
  def shape(self):
    *lead, rows, columns = self.values.get_value().shape
    num_outputs, num_inputs = (columns, rows) if self.inputs_first else (rows, columns * 8 // self.format.bits)
    return self.layout.array_shape((*lead, num_outputs, num_inputs))

  def invariants(self):
    bits = Bits(self.format.bits, self.format.name)
    zeros = (Zeros(self.materialize() != 0),) if self.keeps_zeros else ()
    return (*super().invariants(), bits, *zeros, *([self.pattern] if self.pattern else []))

  @property
  def product(self):
    """'int8 x int4', where integers are multiplied as they are stored; 'float', where they are dequantized first."""
    if not self.direct: return 'float, dequantized first'
    return f'{self.integer_activations or "float"} x {self.format.element}'

  @property
  def direct(self) -> bool:
    """Whether there is a product that reads the weight as it is stored."""
    codes_count = self.format.offset is not None and self.values.get_value().dtype != jnp.float8_e5m2
    if not self.layout.experts: return codes_count and self.format.bits != 3
    return codes_count and self.format.bits == 8 and self.zero is None and self.format.scales == Channel()

  @property
  def inputs_first(self) -> bool: return bool(self.layout.experts) and self.format.bits == 8

  @property
  def encoded(self) -> Encoded:
    values = self.values.get_value()
    optional = (None if variable is None else variable.get_value() for variable in (self.zero, self.outer))
    return Encoded(jnp.swapaxes(values, -1, -2) if self.inputs_first else values, Scales(self.scale.get_value(), *optional))

  def materialize(self):
    return self.layout.array(self.format.decode(self.encoded))

  def prepare_input(self, x, axes: str):
    return quantize_tokens(self.activations, x, axes, self.inputs)

  def contract(self, equation: str, x, dtype=None):
    x_axes = equation.split(',')[0]
    if self.layout.experts or not (self.direct and is_matrix_product(equation) and x_axes.endswith(self.inputs)):
      return super().contract(equation, x, dtype)
    rows, integer = x.shape[:x.ndim - len(self.inputs)], self.integer_activations
    if integer is None: x = self.prepare_input(x, x_axes)
    y_MO = quantized_matmul(x.reshape(math.prod(rows), -1), self.matrix(), activations=integer)
    return y_MO.reshape(*rows, *self.layout.split(self.layout.outputs, y_MO.shape[1])).astype(dtype or x.dtype)

  def contract_grouped(self, x_MD, sizes_E):
    if not self.direct: return super().contract_grouped(x_MD, sizes_E)
    integer = self.integer_activations
    if integer is None: x_MD = self.prepare_input(x_MD, 'M' + self.inputs)
    scale_EO = self.format.stored_scale(self.scale.get_value())[:, 0]
    return grouped_matmul(x_MD, self.values.get_value(), sizes_E, scale_EO, activations=integer)

  def for_decoding(self):
    """In parts, if its numbers are integers plus a constant; a stored float8 or float4 weight stays as it is."""
    integers = self.format.offset is not None and jnp.issubdtype(self.values.get_value().dtype, jnp.integer)
    return jax.jit(Parted)(self) if integers else self

  def take(self, ids):
    """Rows of an embedding: only those are decoded."""
    values, scales = self.encoded
    rows_M, per_scale = ids.reshape(-1), values.shape[0] // scales.scale.shape[-1]
    chosen = lambda x: None if x is None else x[:, rows_M // per_scale]
    one = Scales(chosen(scales.scale), chosen(scales.zero), scales.outer)
    return self.format.decode_rows(values[rows_M], one).reshape(*ids.shape, -1)

  def matrix(self) -> QuantizedMatrix:
    """As `quantized_matmul` reads it, if `direct`."""
    values, scales = self.encoded
    step, zero = (None if x is None else jnp.swapaxes(x, -1, -2) for x in self.format.integer_steps(scales))
    whole = lambda x_QO: None if x_QO is None else jnp.repeat(x_QO, values.shape[-2] // x_QO.shape[1], axis=1)
    return QuantizedMatrix(values, whole(step), whole(zero), self.format.bits)

  @property
  def integer_activations(self) -> str | None:
    """The dtype that the product itself rounds tokens to, if that is just what the quantizer does."""
    if not isinstance(self.activations, Rounding): return None
    pairs = {(True, Float8()): 'float8_e4m3fn', (False, Int()): 'int8'}
    return pairs.get((isinstance(self.format, Float8), self.activations.format)) if self.format != MXFP8() else None
