"""Granularities: which numbers of a matrix (O, I), its outputs first, share a scale. They form the tiles of the matrix."""
import dataclasses

from efficient_lm.errors import IncompatibleError

config = dataclasses.dataclass(kw_only=True, unsafe_hash=True)


@config
class Tensor:
  """All numbers of a matrix share a scale; each layer and each expert has its own."""

  def counts(self, outputs: int, inputs: int) -> tuple[int, int]:
    """The numbers of tiles along the outputs and along the inputs. Raises IncompatibleError where tiles do not divide the
    matrix."""
    return 1, 1

  def fitted(self, outputs: int, inputs: int) -> 'Tensor':
    """This granularity, its groups or blocks shortened where they do not divide a matrix: see `Format.fitted`."""
    return self

  name = 'tensor'
  # The dimensions that a tile covers whole. Devices that share one of them need the extremes over all their shards.
  spans = 'OI'


@config
class Channel:
  """All inputs of one output share a scale; of activations, all numbers of one token."""

  def counts(self, outputs: int, inputs: int) -> tuple[int, int]: return outputs, 1

  def fitted(self, outputs: int, inputs: int) -> 'Channel': return self

  name = 'channel'
  spans = 'I'


@config
class Group:
  """`size` successive inputs of one output share a scale."""
  size: int = 128

  spans = ''

  @property
  def name(self) -> str: return f'group of {self.size}'

  def check(self):
    if self.size < 1: yield 'size', self.size, 'must be at least 1 input'

  def counts(self, outputs: int, inputs: int) -> tuple[int, int]:
    if inputs % self.size:
      raise IncompatibleError(f'groups of {self.size} do not divide {inputs} inputs: choose a divisor of {inputs}')
    return outputs, inputs // self.size

  def fitted(self, outputs: int, inputs: int) -> 'Group': return Group(size=_fitted('size', self.size, inputs, 'inputs'))


@config
class Block:
  """`outputs` x `inputs` numbers share a scale, as in DeepSeek-V3's float8 weights (arXiv 2412.19437, section 3.3.2)."""
  outputs: int = 128
  inputs: int = 128

  spans = ''

  @property
  def name(self) -> str: return f'block of {self.outputs} x {self.inputs}'

  def check(self):
    if self.outputs < 1: yield 'outputs', self.outputs, 'must be at least 1'
    if self.inputs < 1: yield 'inputs', self.inputs, 'must be at least 1'

  def counts(self, outputs: int, inputs: int) -> tuple[int, int]:
    if outputs % self.outputs or inputs % self.inputs:
      raise IncompatibleError(f'blocks of {self.outputs} x {self.inputs} do not divide {outputs} outputs x {inputs} inputs')
    return outputs // self.outputs, inputs // self.inputs

  def fitted(self, outputs: int, inputs: int) -> 'Block':
    return Block(outputs=_fitted('outputs', self.outputs, outputs, 'outputs'),
                 inputs=_fitted('inputs', self.inputs, inputs, 'inputs'))


def _fitted(field: str, size: int, dimension: int, what: str) -> int:
  """The size of a group or block that divides `dimension`: the smaller of `size` and the dimension if it divides. Otherwise,
  of the divisors between a quarter of `size` and `size`, the largest multiple of 8, or the largest if there is no such
  multiple. Raises IncompatibleError where there is no such divisor: shorter groups would need several times as many
  scales."""
  if size >= dimension: return dimension
  if dimension % size == 0: return size
  divisors = [divisor for divisor in range(-(-size // 4), size) if dimension % divisor == 0]
  if divisors: return max([divisor for divisor in divisors if divisor % 8 == 0] or divisors)
  longer = next(divisor for divisor in range(size, dimension + 1) if dimension % divisor == 0)
  raise IncompatibleError(f'{dimension} {what} have no divisor from {-(-size // 4)} to {size}, for {field}={size}: '
               f'choose {field}={longer}')


def tile(w, counts: tuple[int, int]):
  """(..., O, I) -> (..., n, O / n, q, I / q), cut into n x q tiles."""
  *lead, O, I = w.shape
  n, q = counts
  return w.reshape(*lead, n, O // n, q, I // q)


def untile(tiles):
  """The inverse of `tile`."""
  *lead, n, a, q, b = tiles.shape
  return tiles.reshape(*lead, n * a, q * b)
