"""How zeros are shared out among the matrices of a model: the same share for each, or more where they cost less."""
import dataclasses
import math

from efficient_lm.errors import IncompatibleError
from efficient_lm.lazy import lazy

jax, jnp, np = lazy('jax'), lazy('jax.numpy'), lazy('numpy')


@dataclasses.dataclass(frozen=True)
class Matrices:
  """A weight as the matrices that it is made of: `lead`, how many in front (layers of a stack, experts); O x I of each."""
  lead: tuple[int, ...]
  num_outputs: int
  num_inputs: int

  @classmethod
  def of(cls, weight):
    from efficient_lm.weights.layout import Layout, matrix_shape
    return cls(weight.shape[:len(weight.stack) + len(Layout.of(weight).experts)], *matrix_shape(weight))

  @property
  def size(self) -> int: return self.num_outputs * self.num_inputs

  @property
  def count(self) -> int: return math.prod(self.lead)


class Allocation:
  """Subclasses are dataclasses that a config can hold. uniform: whether it gives every matrix the same share. compares:
  whether it compares the scores of all matrices with each other, which are then those of the model as it was. needs:
  statistics of the inputs of that model."""
  uniform = False
  compares = False
  needs: tuple[str, ...] = ()

  def shares(self, matrices: dict[str, Matrices], sparsity: float, *, candidates=None, layers=None) -> dict:
    """Shares of zeros, of each matrix, by path: arrays of the shape `lead`. Together they are `sparsity` of all entries.

    candidates: by path, (..., n) scores of what falls together, for one that compares. layers: scores by layer, for one that
    needs statistics; see `Owl`."""
    raise NotImplementedError


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Uniform(Allocation):
  """Every matrix loses the same share."""
  uniform = True

  def shares(self, matrices, sparsity, **_):
    return {path: np.full(one.lead, sparsity, np.float32) for path, one in matrices.items()}


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Erk(Allocation):
  """Erdos-Renyi (Mocanu et al. 2018; the kernels of Evci et al. 2020, arXiv 1911.11134, are matrices here): the share that
  is kept of a matrix is proportional to (O + I) / (O * I), so that large ones lose more; of those that would keep more than
  all, all is kept."""

  def shares(self, matrices, sparsity, **_):
    raw = {path: (one.num_outputs + one.num_inputs) / one.size for path, one in matrices.items()}
    total = sum(one.size * one.count for one in matrices.values())
    whole = set()
    while True:
      left = (1 - sparsity) * total - sum(matrices[path].size * matrices[path].count for path in whole)
      scale = left / sum(raw[path] * one.size * one.count for path, one in matrices.items() if path not in whole)
      full = {path for path in matrices if path not in whole and scale * raw[path] > 1}
      if not full: break
      whole |= full
    density = {path: 1. if path in whole else scale * raw[path] for path in matrices}
    return {path: np.full(one.lead, 1 - density[path], np.float32) for path, one in matrices.items()}


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Global(Allocation):
  """One threshold for all matrices: the lowest scores go, wherever they are."""
  compares = True

  def shares(self, matrices, sparsity, *, candidates=None, **_):
    from efficient_lm.compression import patterns
    rank = {path: jax.jit(patterns.ranks)(one) for path, one in candidates.items()}
    wanted = math.floor(sparsity * sum(one.size for one in rank.values()))
    below = lambda value: {path: np.asarray(_below(one, value)).astype(np.int64) for path, one in rank.items()}
    edge = 0
    for bit in reversed(range(32)):
      higher = edge | 1 << bit
      if sum(int(count.sum()) for count in below(np.uint32(higher)).values()) <= wanted: edge = higher
    gone, until = below(np.uint32(edge)), below(np.uint32(min(edge + 1, 2 ** 32 - 1)))
    rest = wanted - sum(int(count.sum()) for count in gone.values())
    shares = {}
    for path, count in gone.items():
      ties, flat = (until[path] - count).reshape(-1), count.reshape(-1)
      taken = np.minimum(ties, np.maximum(rest - (np.cumsum(ties) - ties), 0))   # of equal ones the first
      rest -= int(taken.sum())
      # Half a candidate more, so that the floor of share * n is the count in float32, too.
      share = (flat + taken + 0.5 * (flat + taken > 0)) / rank[path].shape[-1]
      shares[path] = np.minimum(share, 1).astype(np.float32).reshape(count.shape)
    return shares


def _below(rank, value):
  return jnp.sum(rank < value, -1, dtype=jnp.int32)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Owl(Allocation):
  """Outlier-weighed layerwise sparsity (Yin et al. 2024, arXiv 2310.05175, section 3): a layer keeps more, the more of its
  entries have a score of Wanda's above `outlier` times the layer's mean; its share differs from the mean of all by at most
  `most`, twice, and all matrices of a layer have the same."""
  outlier: float = 5.0
  most: float = 0.08

  needs = ('square',)

  def check(self):
    if self.outlier <= 1: yield 'outlier', self.outlier, 'must be above 1, in means of a layer\'s scores'
    if not 0 <= self.most < 1: yield 'most', self.most, 'must be a share of at least 0 and below 1'

  def shares(self, matrices, sparsity, *, layers=None, **_):
    """layers: an iterable, of each layer by path (its place in a stack or None, scores (..., O, I) of Wanda's)."""
    ratios, sizes, places = [], [], []
    for layer in layers:
      scores = [score for _, score in layer.values()]
      places.append({path: place for path, (place, _) in layer.items()})
      size = sum(one.size for one in scores)
      mean = sum(float(jnp.sum(one)) for one in scores) / size
      ratios.append(sum(int(jnp.sum(one > self.outlier * mean)) for one in scores) / size)
      sizes.append(size)
    ratios = np.array(ratios)
    spread = np.ptp(ratios)
    more = (ratios - ratios.min()) / (spread if spread else 1) * 2 * self.most
    found = sparsity - more + np.average(more, weights=sizes)
    if not 0 <= found.min() <= found.max() < 1:
      raise IncompatibleError(f'Owl: shares of zeros from {found.min():.2f} to {found.max():.2f}: lower `most`')
    shares = {path: np.full(one.lead, sparsity, np.float32) for path, one in matrices.items()}
    for share, layer in zip(found, places):
      for path, place in layer.items(): shares[path][... if place is None else place] = share
    return shares
