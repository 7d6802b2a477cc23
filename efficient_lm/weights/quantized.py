"""Weights in few bits: `FakeQuantized` trains as floats and multiplies as their rounding, `Quantized` is stored so.

Both see a weight as a matrix (..., N, K) with its outputs first, its letters merged: 'DNH' with inputs 'D' is N * H outputs
by D inputs, and experts and layers stand in front. `converted` makes a Quantized of a FakeQuantized, worth the same numbers
bit for bit, unless their scale is a mean, whose sum depends on its order. Their products differ by the order of sums:
Quantized multiplies integers where it can, whose sum is exact, and scales the result; FakeQuantized multiplies floats, K of
them, each sum off by at most K * 2^-24 of the sum of magnitudes.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from efficient_lm.axes import WEIGHT
from efficient_lm.errors import Misfit
from efficient_lm.formats import MXFP8, Channel, Encoded, Float8, Format, Int
from efficient_lm.formats.format import Scales
from efficient_lm.formats.ranges import Reduce
from efficient_lm.ops.contract import is_matrix_product
from efficient_lm.ops.grouped_matmul import grouped_matmul
from efficient_lm.ops.quantized_matmul import QuantizedMatrix, quantized_matmul
from efficient_lm.weights.step_counter import Clock, ticking
from efficient_lm.weights.weight import Frozen, Weight, Wrapper


@dataclasses.dataclass(frozen=True)
class Layout:
  """How an array with the letters `axes`, summed over `inputs`, is a matrix. `inner`: the sizes of letters that are merged
  into the ones before them, by letter."""
  axes: str
  inputs: str
  inner: tuple[tuple[str, int], ...] = ()

  @classmethod
  def of(cls, weight: Weight):
    shape = jax.eval_shape(lambda weight: weight.materialize(), weight).shape[-len(weight.axes):]
    first = 'E' + _outputs(weight.axes, weight.inputs)[:1] + weight.inputs[:1]
    inner = ((letter, size) for letter, size in zip(weight.axes, shape) if letter not in first)
    return cls(weight.axes, weight.inputs, tuple(inner))

  @property
  def outputs(self) -> str: return _outputs(self.axes, self.inputs)

  @property
  def experts(self) -> str: return 'E' if self.axes.startswith('E') else ''

  @property
  def letters(self) -> str:
    """Those by which the matrix lies on a mesh: a merged dimension is cut as its first letter is."""
    return self.experts + self.outputs[0] + self.inputs[0]

  def matrix(self, array):
    """(..., axes) -> (..., N, K)."""
    array = _transposed(array, self.axes, self.experts + self.outputs + self.inputs)
    K = math.prod(array.shape[-len(self.inputs):])
    lead = array.shape[:array.ndim - len(self.outputs + self.inputs)]
    return array.reshape(*lead, array.size // (K * math.prod(lead)), K)

  def array(self, matrix):
    """The inverse of `matrix`."""
    N, K = matrix.shape[-2:]
    array = matrix.reshape(*matrix.shape[:-2], *self.split(self.outputs, N), *self.split(self.inputs, K))
    return _transposed(array, self.experts + self.outputs + self.inputs, self.axes)

  def split(self, letters: str, size: int) -> list[int]:
    """Sizes of merged letters; the first, which a mesh may have cut, is what is left."""
    rest = [dict(self.inner)[letter] for letter in letters[1:]]
    return [size // math.prod(rest), *rest]

  def reduce(self, format: Format) -> Reduce:
    """Reductions over a tile of the format, over devices too where `shard_map` has cut it."""
    _refuse_cut(format, self.outputs + self.inputs)
    spanned = {'NK': self.outputs + self.inputs, 'K': self.inputs, '': ''}[format.scales.spans]
    return reduction(spanned)


def reduction(letters: str) -> Reduce:
  """Over dimensions of which 'tensor' may have cut one into local shards."""
  manual = jax.sharding.get_abstract_mesh().manual_axes
  cut = any(WEIGHT.get(letter) == 'tensor' for letter in letters) and 'tensor' in manual
  return Reduce(('tensor',) if cut else ())


def _refuse_cut(format: Format, letters: str):
  """Raises Misfit where scales have a factor in common and `shard_map` has cut what it is for: devices would find others."""
  names = reduction(letters).names
  if names and format.joint:
    raise Misfit(f'{format.name}: its scales have a factor in common, which devices that share an expert over {names} would '
                 f'each find for themselves: choose MXFP4(), or mesh.tensor=1')


def _outputs(axes: str, inputs: str) -> str:
  return ''.join(letter for letter in axes.removeprefix('E') if letter not in inputs)


def _transposed(array, old: str, new: str):
  lead = array.ndim - len(old)
  return array.transpose(*range(lead), *(lead + old.index(letter) for letter in new))


@jax.custom_jvp
def straight_through(values, rounded):
  """`rounded`, exactly; its derivative by `values` is that of the identity (Bengio et al. 2013, arXiv 1308.3432)."""
  return rounded


@straight_through.defjvp
def _(primals, tangents):
  return primals[1], tangents[0]


class Quantizer(nnx.Module):
  """Rounds matrices (..., N, K) while training, and knows the scales with which they would be stored.

  A module because some learn: their parameters are the model's, and move as all others. `format` is a static `Format`.
  """
  format: Format

  @staticmethod
  def copied(format: Format) -> Format:
    """A copy, to be kept: static parts of a model must not change with a config."""
    return dataclasses.replace(format)

  def scales(self, matrix, reduce: Reduce) -> Scales:
    """Those of `matrix` now."""
    raise NotImplementedError

  def __call__(self, matrix, reduce: Reduce):
    """`matrix` on the grid, in its own dtype: format.rounded(matrix, scales), with a gradient."""
    raise NotImplementedError

  def settled(self) -> 'Quantizer':
    """What does the same once training is over."""
    return self


class Rounding(Quantizer):
  """Fits scales anew at each use, by the format's own range (for most, absmax); the gradient passes straight through."""

  def __init__(self, format: Format):
    self.format = self.copied(format)

  def scales(self, matrix, reduce: Reduce) -> Scales:
    return self.format.scales_for(lax.stop_gradient(matrix), reduce=reduce)

  def __call__(self, matrix, reduce: Reduce):
    rounded = self.format.rounded(lax.stop_gradient(matrix), self.scales(matrix, reduce))
    return straight_through(matrix, rounded.astype(matrix.dtype))


class Delayed(Quantizer):
  """Leaves numbers as they are, bit for bit, for the first `start` steps of training, and is `inner` from then on. `stack`:
  the shape of the stack of layers that it is made for."""

  def __init__(self, inner: Quantizer, start: int, stack: tuple[int, ...]):
    self.inner, self.start, self.clock = inner, start, Clock.new(stack)

  @property
  def format(self): return self.inner.format

  def scales(self, matrix, reduce: Reduce) -> Scales:
    return self.inner.scales(matrix, reduce)

  def __call__(self, matrix, reduce: Reduce):
    steps = self.clock.get_value()
    begun = (steps >= self.start).reshape(*steps.shape, *[1] * (matrix.ndim - steps.ndim))
    return ticking(jnp.where(begun, self.inner(matrix, reduce), matrix), self.clock)

  def settled(self): return self.inner.settled()


def rounded_rows(quantizer: Quantizer | None, x, axes: str, inputs: str):
  """Activations as a product over `inputs` reads them: each token's numbers are a row. x itself without a quantizer, and for
  a product over other dims than those (queries taken into a latent space, say)."""
  if quantizer is None or not axes.endswith(inputs): return x
  _refuse_cut(quantizer.format, inputs)
  rows = x.reshape(*x.shape[:x.ndim - len(inputs)], -1)
  # What tokens share, each would see of those after it: where a format has such, every token is a matrix of its own.
  if quantizer.format.by_rows: rounded = quantizer(rows, reduction(inputs))
  else: rounded = quantizer(rows[..., None, :], reduction(inputs))
  return rounded.reshape(x.shape)


class FakeQuantized(Wrapper):
  """Trains as `inner`, multiplies as its rounding. `weights` and `activations` are Quantizers, or None for floats."""

  def __init__(self, inner: Weight, weights: Quantizer | None, activations: Quantizer | None = None):
    self.inner, self.weights, self.activations = inner, weights, activations

  @property
  def kind(self):
    return self.inner.kind if self.weights is None else f'{self.inner.kind}, rounded to {self.weights.format.name}'

  def materialize(self):
    if self.weights is None: return self.inner.materialize()
    layout = Layout.of(self.inner)
    return layout.array(self.weights(layout.matrix(self.inner.materialize()), layout.reduce(self.weights.format)))

  def rounded(self, x, axes: str):
    return rounded_rows(self.activations, self.inner.rounded(x, axes), axes, self.inputs)

  def converted(self) -> Weight:
    """The same numbers, stored in few bits."""
    if self.weights is None: return self
    if isinstance(self.inner, Normalized):
      return self.inner.around(lambda inner: FakeQuantized(inner, self.weights, self.activations).converted())
    layout = Layout.of(self.inner)
    matrix = layout.matrix(self.inner.materialize())
    scales = self.weights.scales(matrix, layout.reduce(self.weights.format))
    activations = None if self.activations is None else self.activations.settled()
    return Quantized(self.weights.format.encode(matrix, scales), self.weights.format, layout, activations)


class Normalized(Wrapper):
  """Divides what `inner` is multiplied with by its root mean square over the inputs, before anything else: an RMSNorm (Zhang
  and Sennrich 2019, arXiv 1910.07467) without parameters. Rounding tokens to few levels asks for it where a layer has no
  norm in front of a product: sub-LN (Wang et al. 2022, arXiv 2210.06423) as BitNet has it."""

  def __init__(self, inner: Weight, eps: float = 1e-6):
    self.inner, self.eps = inner, eps

  @property
  def kind(self): return f'{self.inner.kind}, after a norm'

  def around(self, change) -> 'Normalized':
    """With change(inner) in place of `inner`."""
    return Normalized(change(self.inner), self.eps)

  def narrowed(self, dtype): return self.around(lambda inner: inner.narrowed(dtype))
  def take(self, ids): return self.inner.take(ids)

  def rounded(self, x, axes: str):
    return self.inner.rounded(self.normalized(x, axes), axes)

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


def quantized(weight: Weight, format: Format, activations: Quantizer | None = None, range=None) -> Weight:
  """`weight` rounded to nearest with scales fitted by `range` (default: the format's own)."""
  if isinstance(weight, Normalized): return weight.around(lambda inner: quantized(inner, format, activations, range))
  layout = Layout.of(weight)
  matrix = layout.matrix(weight.materialize())
  return Quantized(format.encode(matrix, format.scales_for(matrix, range)), format, layout, activations)


def check_fits(weight: Weight, weights: Format | None = None, activations: Format | None = None):
  """Raises Misfit where the weight, or one token of its inputs, cannot be cut into tiles as these formats ask."""
  matrix = jax.eval_shape(lambda weight: Layout.of(weight).matrix(weight.materialize()), weight)
  if weights is not None: jax.eval_shape(weights.scales_for, matrix)
  token = jax.ShapeDtypeStruct((1, matrix.shape[-1]), jnp.float32)
  if activations is not None: jax.eval_shape(activations.scales_for, token)


class Quantized(Weight):
  """A frozen weight in few bits.

  values, scale, zero, outer: those of `formats.Encoded`, as Variables that lie on a mesh as the matrix does. Experts with 8
  bits are kept inputs first, (..., E, K, N), as the grouped product reads them.
  """

  def __init__(self, encoded: Encoded, format: Format, layout: Layout, activations: Quantizer | None = None):
    self.format, self.layout, self.activations = dataclasses.replace(format), layout, activations
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
  def kind(self): return self.format.name

  @property
  def product(self):
    """'int8 x int4', where integers are multiplied as they are stored; 'float', where they are widened first."""
    if not self.direct: return 'float, multiplied out'
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

  def rounded(self, x, axes: str):
    return rounded_rows(self.activations, x, axes, self.inputs)

  def contract(self, equation: str, x, dtype=None):
    x_axes = equation.split(',')[0]
    if self.layout.experts or not (self.direct and is_matrix_product(equation) and x_axes.endswith(self.inputs)):
      return super().contract(equation, x, dtype)
    rows, integer = x.shape[:x.ndim - len(self.inputs)], self.integer_activations
    if integer is None: x = self.rounded(x, x_axes)
    y_MN = quantized_matmul(x.reshape(math.prod(rows), -1), self.matrix(), activations=integer)
    return y_MN.reshape(*rows, *self.layout.split(self.layout.outputs, y_MN.shape[1])).astype(dtype or x.dtype)

  def contract_grouped(self, x_MD, sizes_E):
    if not self.direct: return super().contract_grouped(x_MD, sizes_E)
    integer = self.integer_activations
    if integer is None: x_MD = self.rounded(x_MD, 'M' + self.inputs)
    return grouped_matmul(x_MD, self.values.get_value(), sizes_E, self.scale.get_value()[:, 0], activations=integer)

  def take(self, ids):
    """Rows of an embedding: only those are decoded."""
    values, scales = self.encoded
    M, per_scale = ids.size, values.shape[0] // scales.scale.shape[-1]
    rows = ids.reshape(M)
    chosen = lambda x: None if x is None else x[:, rows // per_scale]
    one = Scales(chosen(scales.scale), chosen(scales.zero), scales.outer)
    w_MK = self.format.decode_rows(values[rows], one)
    return w_MK.reshape(*ids.shape, -1)

  def matrix(self) -> QuantizedMatrix:
    """As `quantized_matmul` reads it, if `direct`."""
    values, scales = self.encoded
    step, zero = (None if x is None else jnp.swapaxes(x, -1, -2) for x in self.format.steps(scales))
    if self.format.offset: zero = jnp.full_like(step, -self.format.offset)
    whole = lambda x_QN: None if x_QN is None else jnp.repeat(x_QN, values.shape[-2] // x_QN.shape[1], axis=1)
    return QuantizedMatrix(values, whole(step), whole(zero), self.format.bits)

  @property
  def integer_activations(self) -> str | None:
    """The dtype that the product itself rounds tokens to, if that is just what the quantizer does."""
    if not isinstance(self.activations, Rounding): return None
    pairs = {(True, Float8()): 'float8_e4m3fn', (False, Int()): 'int8'}
    return pairs.get((isinstance(self.format, Float8), self.activations.format)) if self.format != MXFP8() else None
