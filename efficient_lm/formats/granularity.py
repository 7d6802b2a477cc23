"""Which numbers of a matrix (N, K), outputs first, share a scale: the tiles that it is cut into."""
import dataclasses

from efficient_lm.errors import Misfit

config = dataclasses.dataclass(kw_only=True, unsafe_hash=True)


@config
class Tensor:
  """All numbers of a matrix. Each layer and each expert has its own."""

  def counts(self, N: int, K: int) -> tuple[int, int]:
    """How many tiles lie along the outputs and along the inputs."""
    return 1, 1

  name = 'tensor'
  spans = 'NK'   # what a tile extends over without end: where devices share it, its extremes are theirs together


@config
class Channel:
  """All inputs of one output; of activations, one token."""

  def counts(self, N: int, K: int) -> tuple[int, int]:
    return N, 1

  name = 'channel'
  spans = 'K'


@config
class Group:
  """`size` successive inputs of one output."""
  size: int = 128

  spans = ''

  @property
  def name(self) -> str: return f'group of {self.size}'

  def check(self):
    if self.size < 1: yield 'size', self.size, 'must be at least 1 input'

  def counts(self, N: int, K: int) -> tuple[int, int]:
    if K % self.size: raise Misfit(f'groups of {self.size} do not divide {K} inputs: choose a divisor of {K}')
    return N, K // self.size


@config
class Block:
  """`outputs` x `inputs` numbers, as DeepSeek-V3 (arXiv 2412.19437, section 3.3.2) scales float8 weights."""
  outputs: int = 128
  inputs: int = 128

  spans = ''

  @property
  def name(self) -> str: return f'block of {self.outputs} x {self.inputs}'

  def check(self):
    if self.outputs < 1: yield 'outputs', self.outputs, 'must be at least 1'
    if self.inputs < 1: yield 'inputs', self.inputs, 'must be at least 1'

  def counts(self, N: int, K: int) -> tuple[int, int]:
    if N % self.outputs or K % self.inputs:
      raise Misfit(f'blocks of {self.outputs} x {self.inputs} do not divide {N} outputs x {K} inputs')
    return N // self.outputs, K // self.inputs


def tile(w, counts: tuple[int, int]):
  """(..., N, K) -> (..., n, N / n, q, K / q)."""
  *lead, N, K = w.shape
  n, q = counts
  return w.reshape(*lead, n, N // n, q, K // q)


def untile(tiles):
  """The inverse of `tile`."""
  *lead, n, a, q, b = tiles.shape
  return tiles.reshape(*lead, n * a, q * b)
