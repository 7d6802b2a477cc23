"""Weights as matrices: every array, whatever its letters, seen as (..., O, I), outputs by inputs."""
import dataclasses
import math

import jax

from efficient_lm.axes import WEIGHT
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Format
from efficient_lm.formats.ranges import Reduce


@dataclasses.dataclass(frozen=True)
class Layout:
  """How an array with the letters `axes`, summed over `inputs`, is a matrix (..., O, I): 'DNH' with inputs 'D' has N * H
  outputs and D inputs; experts and layers stand in front. `inner`: the sizes of letters that are merged into the ones before
  them, by letter."""
  axes: str
  inputs: str
  inner: tuple[tuple[str, int], ...] = ()

  @classmethod
  def of(cls, weight):
    """That of a Weight."""
    shape = weight.shape[-len(weight.axes):]
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
    """(..., axes) -> (..., O, I)."""
    array = _transposed(array, self.axes, self.experts + self.outputs + self.inputs)
    num_inputs = math.prod(array.shape[-len(self.inputs):])
    lead = array.shape[:array.ndim - len(self.outputs + self.inputs)]
    return array.reshape(*lead, array.size // (num_inputs * math.prod(lead)), num_inputs)

  def array(self, matrix_OI):
    """The inverse of `matrix`."""
    array = matrix_OI.reshape(self._unmerged(matrix_OI.shape))
    return _transposed(array, self.experts + self.outputs + self.inputs, self.axes)

  def array_shape(self, matrix_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of `array` of a matrix of this shape."""
    order, sizes = self.experts + self.outputs + self.inputs, self._unmerged(matrix_shape)
    lead, last = sizes[:len(sizes) - len(order)], sizes[len(sizes) - len(order):]
    return (*lead, *(last[order.index(letter)] for letter in self.axes))

  def _unmerged(self, matrix_shape) -> tuple[int, ...]:
    *lead, num_outputs, num_inputs = matrix_shape
    return (*lead, *self.split(self.outputs, num_outputs), *self.split(self.inputs, num_inputs))

  def split(self, letters: str, size: int) -> list[int]:
    """Sizes of merged letters; the first, which a mesh may have cut, is what is left."""
    rest = [dict(self.inner)[letter] for letter in letters[1:]]
    return [size // math.prod(rest), *rest]

  def reduce(self, format: Format) -> Reduce:
    """Reductions over a tile of the format, over devices too where `shard_map` has cut it."""
    refuse_cut(format, self.outputs + self.inputs)
    spanned = {'OI': self.outputs + self.inputs, 'I': self.inputs, '': ''}[format.scales.spans]
    return reduction(spanned)


def matrix_shape(weight) -> tuple[int, int]:
  """O outputs and I inputs of a Weight's matrix."""
  shape = dict(zip(weight.axes, weight.shape[-len(weight.axes):]))
  size = lambda letters: math.prod(shape[letter] for letter in letters)
  return size(_outputs(weight.axes, weight.inputs)), size(weight.inputs)


def reduction(letters: str) -> Reduce:
  """Over dimensions of which 'tensor' may have cut one into local shards."""
  manual = jax.sharding.get_abstract_mesh().manual_axes
  cut = any(WEIGHT.get(letter) == 'tensor' for letter in letters) and 'tensor' in manual
  return Reduce(('tensor',) if cut else ())


def refuse_cut(format: Format, letters: str):
  """Raises IncompatibleError where scales have a factor in common and `shard_map` has cut the matrix: devices would find
  others."""
  names = reduction(letters).names
  if names and format.joint:
    raise IncompatibleError(f'{format.name}: its scales have a factor in common, which devices that share an expert over '
                            f'{names} would each find for themselves: choose MXFP4(), or mesh.tensor=1')


def _outputs(axes: str, inputs: str) -> str:
  return ''.join(letter for letter in axes.removeprefix('E') if letter not in inputs)


def _transposed(array, old: str, new: str):
  lead = array.ndim - len(old)
  return array.transpose(*range(lead), *(lead + old.index(letter) for letter in new))
