"""What goes together when weights are pruned, and what share of each matrix: single weights, blocks, N of every M.

A structure sees a weight as groups of units, (…, U): of each group so many units go. `layout` says which dims of the array
are a matrix's outputs and which its inputs, wherever they stand: layers and experts are never one group.
"""
import dataclasses
from typing import Any

from efficient_lm.errors import IncompatibleError
from efficient_lm.lazy import lazy

jnp = lazy('jax.numpy')


@dataclasses.dataclass(kw_only=True)
class UniformShares:
  """Every matrix loses the same share."""

  def shares(self, sparsity: float, sizes: dict[str, tuple[int, int, int]]) -> dict[str, float]:
    """The share of each weight, by path, of matrices as (how many, outputs, inputs)."""
    return dict.fromkeys(sizes, sparsity)


@dataclasses.dataclass(kw_only=True)
class ErdosRenyi:
  """A matrix keeps a share in proportion to (outputs + inputs) / (outputs * inputs), at most all of it, so that small ones
  lose less, and `sparsity` is the share of all of them together (Mocanu et al. 2018, arXiv 1707.04780; ERK of Evci et al.
  2020, arXiv 1911.11134, section 3, which is this for matrices)."""

  def shares(self, sparsity: float, sizes: dict[str, tuple[int, int, int]]) -> dict[str, float]:
    """As `UniformShares.shares`."""
    numbers = {path: count * outputs * inputs for path, (count, outputs, inputs) in sizes.items()}
    kept, whole = (1 - sparsity) * sum(numbers.values()), set()
    while rest := set(sizes) - whole:
      left = kept - sum(numbers[path] for path in whole)
      scale = left / sum(count * (outputs + inputs) for count, outputs, inputs in (sizes[path] for path in rest))
      density = {path: scale * sum(sizes[path][1:]) / (sizes[path][1] * sizes[path][2]) for path in rest}
      over = {path for path in rest if density[path] > 1}
      if not over: return {path: 1 - density.get(path, 1.) for path in sizes}
      whole |= over   # what these cannot use goes to the others, which raises all of theirs
    return dict.fromkeys(sizes, 0.)


@dataclasses.dataclass(kw_only=True)
class Unstructured:
  """Single weights, anywhere in a matrix, each of which loses the share that `allocation` gives it."""
  allocation: Any = dataclasses.field(default_factory=UniformShares)

  pattern = None
  name = ''

  def fits(self, weight): """Raises IncompatibleError for a weight that has no such units."""

  def check_sparsity(self, sparsity: float):
    """Problems of a share of zeros."""
    return ()

  def shares(self, sparsity: float, sizes):
    """The share of zeros of each weight in the end, by path (see `UniformShares.shares`)."""
    return self.allocation.shares(sparsity, sizes)

  def units(self, layout, array, pool=None):
    """(…, U) of an array; `pool(array, dims)` makes one number of those of a unit."""
    return array.reshape(*array.shape[:array.ndim - len(layout.axes) + len(layout.experts)], -1)

  def spread(self, layout, units, shape):
    """The inverse of `units`: an array of that shape, the numbers of a unit alike."""
    return units.reshape(shape)

  def count(self, share: float, ramp, size: int):
    """How many units of `size` are gone, when the share of `share` that is to be gone by now is `ramp`, 0 to 1."""
    return jnp.floor(share * ramp * size).astype(jnp.int32)


@dataclasses.dataclass(kw_only=True)
class WeightBlocks(Unstructured):
  """Blocks of `outputs` x `inputs` weights, which go and stay as one, by the sum of their scores: what a block-sparse
  product leaves out. Both must divide the matrix."""
  outputs: int = 16
  inputs: int = 16

  @property
  def name(self): return f'blocks of {self.outputs}x{self.inputs}'

  def check(self):
    for field in ('outputs', 'inputs'):
      if getattr(self, field) < 1: yield field, getattr(self, field), 'must be at least 1'

  def fits(self, weight):
    from efficient_lm.weights.layout import matrix_shape
    outputs, inputs = matrix_shape(weight)
    if outputs % self.outputs or inputs % self.inputs:
      raise IncompatibleError(f'{self.name} do not divide {outputs} outputs x {inputs} inputs')

  def units(self, layout, array, pool=None):
    matrix_OI = layout.matrix(array)
    *lead, outputs, inputs = matrix_OI.shape
    cut = matrix_OI.reshape(*lead, outputs // self.outputs, self.outputs, inputs // self.inputs, self.inputs)
    return (pool or jnp.sum)(cut, (-3, -1)).reshape(*lead, -1)

  def spread(self, layout, units, shape):
    *lead, outputs, inputs = layout.matrix(jnp.empty(shape, bool)).shape
    blocks = units.reshape(*lead, outputs // self.outputs, 1, inputs // self.inputs, 1)
    whole = (*lead, outputs // self.outputs, self.outputs, inputs // self.inputs, self.inputs)
    return layout.array(jnp.broadcast_to(blocks, whole).reshape(*lead, outputs, inputs))


@dataclasses.dataclass(kw_only=True)
class NofM:
  """At most `n` of every `m` successive inputs of an output are not zero."""
  n: int = 2
  m: int = 4

  @property
  def name(self): return f'{self.n}:{self.m}'

  @property
  def pattern(self):
    """What is promised of a weight."""
    from efficient_lm.weights.invariants import Pattern
    return Pattern(self.n, self.m)

  def check(self):
    if self.m < 2: yield 'm', self.m, 'must be at least 2'
    if not 1 <= self.n < self.m: yield 'n', self.n, f'must be at least 1 and below m = {self.m}'

  def fits(self, weight):
    """As `Unstructured.fits`."""
    from efficient_lm.weights.layout import matrix_shape
    _, inputs = matrix_shape(weight)
    if inputs % self.m: raise IncompatibleError(f'{self.name}: {self.m} does not divide {inputs} inputs')

  def check_sparsity(self, sparsity: float):
    """As `Unstructured.check_sparsity`."""
    if sparsity not in (0, share := 1 - self.n / self.m):
      yield 'sparsity', sparsity, f'must be {share:g}, which {self.n} of every {self.m} leave out (or 0)'

  def shares(self, sparsity: float, sizes):
    """As `Unstructured.shares`."""
    return dict.fromkeys(sizes, sparsity)

  def units(self, layout, array, pool=None):
    """As `Unstructured.units`: the groups are m successive inputs."""
    matrix_OI = layout.matrix(array)
    return matrix_OI.reshape(*matrix_OI.shape[:-1], -1, self.m)

  def spread(self, layout, units, shape):
    """As `Unstructured.spread`."""
    return layout.array(units.reshape(*units.shape[:-2], -1))

  def count(self, share: float, ramp, size: int):
    """As `Unstructured.count`."""
    return jnp.floor(ramp * (self.m - self.n)).astype(jnp.int32)
