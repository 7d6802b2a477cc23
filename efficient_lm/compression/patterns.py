"""Sparsity patterns: which entries of a matrix (O, I) are compared with which, and which fall together.

A pattern cuts a matrix of scores into candidates (..., groups, n): of each group the lowest go. It knows neither what the
scores are nor how many zeros each matrix is to have; both are given. Inputs are what a product sums over, wherever they
stand in the array (`weights.layout.Layout`): experts and layers stand in front, each a matrix by itself.
"""
import dataclasses
from typing import Any

from efficient_lm.errors import IncompatibleError
from efficient_lm.formats.granularity import tile, untile
from efficient_lm.lazy import lazy

jax, jnp, lax = lazy('jax'), lazy('jax.numpy'), lazy('jax.lax')
config = dataclasses.dataclass(kw_only=True, unsafe_hash=True)
GONE = float('-inf')   # the score of what an earlier mask has taken: below all others
FEW = 16     # candidates that are compared each with each, where bisecting would pass over them 31 times


class SparsityPattern:
  """Subclasses are dataclasses that a config can hold.

  unit: successive inputs that no order of columns may part. at_once: whether a choice may be among many columns (the column
  solver then takes a block of them), or is made for each unit. promised: the invariant that it leaves beside the zeros.
  free: whether a matrix may have any share of zeros.
  """
  unit = 1
  at_once = True
  free = True
  promised: Any = None

  def candidates(self, score_OI):
    """(..., O, I) -> (..., groups, n)."""
    raise NotImplementedError

  def spread(self, keep, num_outputs: int, num_inputs: int):
    """bool (..., groups, n) of candidates -> (..., O, I) of their entries."""
    raise NotImplementedError

  def in_column(self, num_outputs: int) -> float:
    """Candidates of a group that a column of the matrix has."""
    raise NotImplementedError

  def share(self, sparsity: float | None) -> float:
    """The share of zeros that is asked for, `sparsity` where the pattern does not say it itself."""
    return sparsity

  def problems(self, sparsity: float | None):
    """What would be right where it cannot give a share of `sparsity` of a matrix."""
    if sparsity is None: yield 'give a share of zeros above 0 and below 1'
    elif not 0 < sparsity < 1: yield 'must be above 0 and below 1'

  def check_divides(self, num_outputs: int, num_inputs: int):
    """Raises IncompatibleError where a matrix cannot be cut so."""

  def count(self, share: float, ramp, size: int):
    """How many of a group's `size` candidates are gone, int32, when `ramp`, 0 to 1, of the final `share` is to be."""
    return jnp.floor(share * ramp * size).astype(jnp.int32)

  def check_fits(self, num_outputs: int, num_inputs: int, share: float):
    """Raises IncompatibleError where a matrix cannot be cut so, or so few zeros would be none."""
    self.check_divides(num_outputs, num_inputs)
    count = share * self.in_column(num_outputs) * num_inputs
    if count < 1: raise IncompatibleError(
      f'a sparsity of {share:g} is not one zero in {self} of {num_outputs} outputs x {num_inputs} inputs: raise it')

  def keep(self, score_OI, share, columns: tuple | None = None):
    """bool (..., O, I): False for the floor(share * n) lowest scores of every n candidates that are compared; of equal ones
    the first go.

    share: (...,), of each matrix, or one for all. columns: (first, last), where score_OI are the columns from first to
    before last of a matrix that is chosen from piece by piece: over all pieces, the counts are those of the whole.
    """
    candidates = self.candidates(score_OI)
    first, last = columns or (0, score_OI.shape[-1])
    until = lambda column: jnp.floor(jnp.asarray(share, jnp.float32) * (self.in_column(score_OI.shape[-2]) * column))
    count = (until(last) - until(first)).astype(jnp.int32)
    return self.spread(~lowest(candidates, count[..., None, None]), *score_OI.shape[-2:])


@config
class PerMatrix(SparsityPattern):
  """All entries of a matrix (of each layer, of each expert) are compared."""

  def candidates(self, score_OI): return score_OI.reshape(*score_OI.shape[:-2], 1, -1)
  def spread(self, keep, num_outputs, num_inputs): return keep.reshape(*keep.shape[:-2], num_outputs, num_inputs)
  def in_column(self, num_outputs): return num_outputs
  def __str__(self): return 'a matrix'


@config
class PerOutput(SparsityPattern):
  """The inputs of an output are compared: each output keeps as many."""

  def candidates(self, score_OI): return score_OI
  def spread(self, keep, num_outputs, num_inputs): return keep
  def in_column(self, num_outputs): return 1
  def __str__(self): return 'an output'


@config
class NofM(SparsityPattern):
  """At most `n` of every `m` successive inputs of an output are not zero (Mishra et al. 2021, arXiv 2104.08378)."""
  n: int = 2
  m: int = 4

  at_once = False
  free = False

  def check(self):
    if self.m < 2: yield 'm', self.m, 'must be at least 2'
    if not 1 <= self.n < self.m: yield 'n', self.n, f'must be at least 1 and below m = {self.m}'

  @property
  def unit(self): return self.m

  @property
  def promised(self):
    from efficient_lm.weights.invariants import Pattern
    return Pattern(self.n, self.m)

  def candidates(self, score_OI):
    *lead, num_outputs, num_inputs = score_OI.shape
    return score_OI.reshape(*lead, num_outputs * (num_inputs // self.m), self.m)

  def spread(self, keep, num_outputs, num_inputs): return keep.reshape(*keep.shape[:-2], num_outputs, num_inputs)

  def share(self, sparsity): return 1 - self.n / self.m

  def problems(self, sparsity):
    if sparsity is not None and abs(sparsity - self.share(None)) > 1e-6:
      yield f'leave it out: {self} is {self.share(None):g}'

  def count(self, share, ramp, size): return jnp.floor(ramp * (self.m - self.n)).astype(jnp.int32)

  def check_fits(self, num_outputs, num_inputs, share): self.check_divides(num_outputs, num_inputs)

  def check_divides(self, num_outputs, num_inputs):
    if num_inputs % self.m: raise IncompatibleError(f'{self}: {self.m} does not divide {num_inputs} inputs')

  def keep(self, score_OI, share, columns=None):
    return self.spread(~lowest(self.candidates(score_OI), self.m - self.n), *score_OI.shape[-2:])

  def __str__(self): return f'{self.n}:{self.m}'


@config
class Blocks(SparsityPattern):
  """Tiles of `outputs` x `inputs` entries fall together, by the sum of their scores; all tiles of a matrix are compared."""
  outputs: int = 16
  inputs: int = 16

  def check(self):
    if self.outputs < 1: yield 'outputs', self.outputs, 'must be at least 1'
    if self.inputs < 1: yield 'inputs', self.inputs, 'must be at least 1'

  @property
  def unit(self): return self.inputs

  def candidates(self, score_OI):
    num_outputs, num_inputs = score_OI.shape[-2:]
    tiles = tile(score_OI, (num_outputs // self.outputs, num_inputs // self.inputs))
    # A tile of which an earlier mask has taken all stays below those of which it has not.
    gone = tiles == GONE
    score = jnp.sum(jnp.where(gone, 0, tiles), (-3, -1))
    return jnp.where(jnp.all(gone, (-3, -1)), GONE, score).reshape(*score.shape[:-2], 1, -1)

  def spread(self, keep, num_outputs, num_inputs):
    tiles = keep.reshape(*keep.shape[:-2], num_outputs // self.outputs, 1, num_inputs // self.inputs, 1)
    return untile(jnp.broadcast_to(tiles, (*keep.shape[:-2], num_outputs // self.outputs, self.outputs,
                                           num_inputs // self.inputs, self.inputs)))

  def in_column(self, num_outputs): return num_outputs / self.outputs / self.inputs

  def check_divides(self, num_outputs, num_inputs):
    if num_outputs % self.outputs or num_inputs % self.inputs:
      raise IncompatibleError(f'{self} do not divide {num_outputs} outputs x {num_inputs} inputs')

  def __str__(self): return f'blocks of {self.outputs} x {self.inputs}'


# ------------------------------------------------------------------ the lowest of many

def lowest(score, count):
  """bool (..., n), True for the `count` lowest of the last dimension; of equal ones, the first. Scores are of either sign,
  infinite ones too, no NaN; they are compared as float32. count: an int32 array that broadcasts against (..., 1), or a
  number."""
  rank = ranks(score)
  if score.shape[-1] <= FEW:
    mine, other, place = rank[..., :, None], rank[..., None, :], jnp.arange(score.shape[-1])
    before = (other < mine) | ((other == mine) & (place[None, :] < place[:, None]))
    return jnp.sum(before, -1) < count
  edge = threshold(lambda value: jnp.sum(rank < value, -1, dtype=jnp.int32, keepdims=True), count, (*rank.shape[:-1], 1))
  equal, below = rank == edge, jnp.sum(rank < edge, -1, dtype=jnp.int32, keepdims=True)
  return (rank < edge) | (equal & (jnp.cumsum(equal, -1, dtype=jnp.int32) <= count - below))


def ranks(score):
  """uint32 that are ordered as the scores are: the bits of floats are, once those of negative ones are flipped. Zeros of
  either sign are equal."""
  bits, sign = lax.bitcast_convert_type(score.astype(jnp.float32), jnp.uint32), jnp.uint32(1 << 31)
  bits = jnp.where(bits == sign, 0, bits)
  return jnp.where(bits & sign, ~bits, bits | sign)


def threshold(smaller, count, shape=()):
  """The largest rank with at most `count` ranks below it, which `smaller(rank)` counts. It is found bit by bit: 32 passes,
  where sorting takes many more."""
  def bisected(i, found):
    higher = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
    return jnp.where(smaller(higher) <= count, higher, found)
  return lax.fori_loop(0, 32, bisected, jnp.zeros(shape, jnp.uint32))
