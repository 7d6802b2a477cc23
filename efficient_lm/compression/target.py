"""How sparse a training is to end: so many zeros, in a pattern, shared out by an allocation."""
import dataclasses
from typing import Any

from efficient_lm.compression.allocation import Matrices
from efficient_lm.compression.patterns import PerMatrix


@dataclasses.dataclass(frozen=True)
class Target:
  """sparsity: the share of zeros; pattern: what goes together (`patterns`); allocation: see there."""
  sparsity: float
  pattern: Any
  allocation: Any

  def check(self):
    """Problems of a technique's fields of these names."""
    if not 0 <= self.sparsity < 1: yield 'sparsity', self.sparsity, 'must be a share of at least 0 and below 1'
    elif not self.pattern.free and self.sparsity not in (0, share := self.pattern.share(None)):
      yield 'sparsity', self.sparsity, f'must be {share:g}, which {self.pattern} leaves out (or 0)'
    if self.allocation.compares or self.allocation.needs:
      yield 'allocation', self.allocation, 'is for trained models: choose Uniform() or Erk()'
    elif not (self.pattern.free or self.allocation.uniform):
      yield 'allocation', self.allocation, f'{self.pattern} is the same share for every matrix: leave it out'

  def check_fits(self, weight):
    """Raises IncompatibleError for a weight that cannot be cut so."""
    matrices = Matrices.of(weight)
    self.pattern.check_divides(matrices.num_outputs, matrices.num_inputs)

  def shares(self, parameters: dict[str, Any]) -> dict[str, float]:
    """Of zeros in the end, by path, of what a `Layout` can be had of: one for all layers and experts of a weight."""
    found = self.allocation.shares({path: Matrices.of(one) for path, one in parameters.items()}, self.sparsity)
    return {path: float(share.reshape(-1)[0]) for path, share in found.items()}

  @property
  def name(self) -> str:
    """In a few words."""
    pattern = [] if isinstance(self.pattern, PerMatrix) else [str(self.pattern)]
    return ', '.join([*pattern, f'{self.sparsity:.0%}'])


def check_score(config, field: str):
  """The problem of a field that is no score by which a training can prune."""
  if not getattr(getattr(config, field), 'in_training', False):
    fix = 'ranks no weights while training: choose Magnitude(), Random(), Saliency() or Movement()'
    yield field, getattr(config, field), fix
