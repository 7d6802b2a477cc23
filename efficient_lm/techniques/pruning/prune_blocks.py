"""Pruning whole blocks of a trained model, as a stage: what is left is stored, trained and multiplied without the zeros."""
import dataclasses
import math

from efficient_lm.compression.rules import LAYERS, check_pattern


@dataclasses.dataclass(kw_only=True)
class _Blocks:
  """U inputs by V outputs are a `block`. At least a share of `sparsity` of each matrix whose path matches `where` is zero:
  equally many blocks of each column of blocks."""
  sparsity: float
  block: tuple[int, int] = (32, 64)
  where: str = LAYERS

  def check(self):
    yield from check_pattern(self, 'where')
    if not 0 < self.sparsity < 1: yield 'sparsity', self.sparsity, 'must be between 0 and 1'
    if len(self.block) != 2 or min(self.block) < 1: yield 'block', self.block, 'must be two sizes, inputs and outputs'

  def _changed(self, model, change):
    from efficient_lm.compression import rewriting
    def changed(path, weight):
      rewriting.require_float(weight)
      return change(weight, tuple(self.block), self.sparsity)
    return rewriting.apply_where(model, self.where, changed)

  def _note(self, model, changed) -> str:
    """What was reached, and what of it is left."""
    from efficient_lm import tree
    from efficient_lm.compression.coverage import coverage
    from efficient_lm.weights.block_sparse import BlockSparse
    name = f'{type(self).__name__} ({self.sparsity:.0%} in blocks of {self.block[0]} x {self.block[1]})'
    weights = [weight for _, weight in tree.select(changed, BlockSparse)]
    left = sum(weight.num_multiplied for weight in weights) / sum(math.prod(weight.shape) for weight in weights)
    return f'{coverage(model, self.where).describe(name)}; {left:.1%} of these matrices is stored and multiplied'


@dataclasses.dataclass(kw_only=True)
class PruneBlocks(_Blocks):
  """Keeps the blocks of the largest L2 norms in each column of blocks, of each layer, and drops the others for good (Gray et
  al. 2017, GPU Kernels for Block-Sparse Weights, has such matrices). Nothing makes up for what is lost: let a Train(…)
  follow, which trains the blocks that are left. Experts are not taken.

  Wide blocks are faster on a CPU, since the inputs of a column of blocks are copied once for all its outputs; small ones
  lose less."""

  def __call__(self, model, context):
    changed = self.abstract(model)
    return changed, (self._note(model, changed),)

  def abstract(self, model):
    from efficient_lm.compression import blocks
    return self._changed(model, blocks.pruned)


@dataclasses.dataclass(kw_only=True)
class StoreBlocks(_Blocks):
  """Stores weights whose masks keep whole blocks, equally many in each column of blocks, without the masks: the same
  numbers, of which zeros are neither stored nor multiplied. A mask of other blocks is an error."""

  def __call__(self, model, context):
    from efficient_lm.compression import blocks
    changed = self.abstract(model)   # refuses what has no mask
    self._changed(model, lambda weight, *settings: blocks.check(weight, *settings) or weight)
    return changed, (self._note(model, changed),)

  def abstract(self, model):
    from efficient_lm.compression import blocks
    return self._changed(model, blocks.stored)
