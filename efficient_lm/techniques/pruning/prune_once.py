"""One-shot magnitude pruning of a trained model, as a stage."""
import dataclasses
from typing import Any

from efficient_lm.compression.rules import LAYERS, check_pattern
from efficient_lm.compression.structures import NofM

__all__ = ['NofM', 'PruneOnce']


@dataclasses.dataclass(kw_only=True)
class PruneOnce:
  """Masks the smallest magnitudes of each matrix (of each layer, of each expert) whose path matches `where`: a share of
  `sparsity`, or, with a `pattern`, all but n of every m along the inputs. Nothing makes up for it: let a Train(…) follow."""
  sparsity: float | None = None
  pattern: Any = None
  where: str = LAYERS

  across_processes = True

  def check(self):
    yield from check_pattern(self, 'where')
    if (self.sparsity is None) == (self.pattern is None): yield 'sparsity', self.sparsity, 'give either sparsity or pattern'
    if self.sparsity is not None and not 0 < self.sparsity < 1: yield 'sparsity', self.sparsity, 'must be between 0 and 1'

  def __call__(self, model, context):
    from efficient_lm.compression.coverage import coverage
    what = f'{self.sparsity:.0%}' if self.pattern is None else f'{self.pattern.n}:{self.pattern.m}'
    return self.abstract(model), (coverage(model, self.where).describe(f'PruneOnce ({what}, magnitude)'),)

  def abstract(self, model):
    """The masked model; of shapes, its shapes."""
    from efficient_lm.compression import masks, rewriting
    def masked(path, weight):
      rewriting.require_float(weight)
      return masks.masked_once(weight, self.sparsity, self.pattern)
    return rewriting.apply_where(model, self.where, masked)
