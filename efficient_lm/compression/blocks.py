"""Which blocks of a matrix are kept: equally many in each column of blocks, so that layers of a stack have equal shapes, and
a CPU multiplies a column at once (`weights.block_sparse`)."""
import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from efficient_lm.errors import IncompatibleError
from efficient_lm.parallel.processes import fetched
from efficient_lm.weights.block_sparse import BlockSparse, grid, in_blocks, kept_in
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.low_precision import LowPrecision
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.rotated import Rotated
from efficient_lm.weights.weight import Weight


def kept_of(num_rows: int, sparsity: float) -> int:
  """How many of a column's blocks are kept so that at least a share of `sparsity` is zero. Raises IncompatibleError where
  none would be."""
  kept = math.floor((1 - sparsity) * num_rows + 1e-9)   # what the subtraction rounds off is no block
  if kept: return kept
  raise IncompatibleError(f'has {num_rows} blocks along its inputs, of which sparsity = {sparsity} leaves none: choose a '
                          f'smaller `block` or a lower `sparsity`')


def pruned(weight: Weight, block: tuple[int, int], sparsity: float) -> BlockSparse:
  """The blocks of the largest L2 norms in each column of blocks (of each layer). Raises IncompatibleError."""
  if isinstance(weight, LowPrecision): return pruned(weight.inner, block, sparsity)
  if isinstance(weight, Rotated): raise IncompatibleError('has rotated inputs: prune before rotating')
  if isinstance(weight, Masked): raise IncompatibleError('is masked already: StoreBlocks(…) stores a mask of whole blocks')
  kept = kept_of(grid(weight, block)[1], sparsity)
  norms_CR = jnp.sum(jnp.square(in_blocks(weight, block).astype(jnp.float32)), (-2, -1))
  return kept_in(weight, block, jnp.sort(lax.top_k(norms_CR, kept)[1], -1))


def stored(weight: Weight, block: tuple[int, int], sparsity: float) -> BlockSparse:
  """A weight under a mask of whole blocks, as many in each column as `sparsity` keeps, without the mask. What the mask is,
  `check` alone looks at: shapes do not depend on it. Raises IncompatibleError."""
  if not isinstance(weight, Masked): raise IncompatibleError('has no mask: PruneBlocks(…) chooses blocks')
  kept = kept_of(grid(weight, block)[1], sparsity)
  alive_CR = jnp.any(_mask_in_blocks(weight, block), (-2, -1))
  return kept_in(weight, block, jnp.sort(lax.top_k(alive_CR.astype(jnp.int32), kept)[1], -1))


def check(weight: Masked, block: tuple[int, int], sparsity: float):
  """Raises IncompatibleError for a mask of other blocks than `stored` keeps."""
  kept, keep = kept_of(grid(weight, block)[1], sparsity), np.asarray(fetched(_mask_in_blocks(weight, block)))
  alive, whole = keep.any((-2, -1)), keep.all((-2, -1))
  if (alive != whole).any():
    raise IncompatibleError(f'is masked within blocks of {block[0]} inputs by {block[1]} outputs: they cannot be stored')
  counts = alive.sum(-1)
  if (counts != kept).any():
    raise IncompatibleError(f'keeps {counts.min()} to {counts.max()} blocks in its columns, where sparsity = {sparsity} '
                            f'keeps {kept}: columns must keep equally many')


def _mask_in_blocks(weight: Masked, block):
  """As `in_blocks`, of the mask."""
  (C, R), keep_OI = grid(weight, block), Layout.of(weight).matrix(weight.keep.get_value())
  *lead, num_outputs, num_inputs = keep_OI.shape
  return jnp.moveaxis(keep_OI.reshape(*lead, C, num_outputs // C, R, num_inputs // R), -3, -1)
