"""Weights of which whole blocks are zero: the kept blocks are all that is stored, multiplied and trained."""
import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.errors import IncompatibleError
from efficient_lm.ops.block_sparse_matmul import balanced, block_sparse_matmul
from efficient_lm.ops.contract import is_matrix_product
from efficient_lm.parallel.sharding import by_shard
from efficient_lm.weights.invariants import Zeros
from efficient_lm.weights.layout import Layout, matrix_shape
from efficient_lm.weights.weight import Frozen, Weight


class BlockSparse(Weight):
  """K of the R blocks of U inputs by V outputs in each of the C columns of blocks; the others are exactly zero.

  All columns keep equally many: so the layers of a stack have equal shapes, whichever blocks each keeps, and on a CPU a
  column is one product without padding. Every block that is kept is trained. Over a mesh of devices blocks are replicated,
  and rows of tokens are cut. A product that sums over the outputs (an absorbed one of latent attention) is dense.

  blocks: (..., C, K, U, V), those of a column by ascending input. rows: (..., C, K) int32, their places among the
  R = num_rows blocks of inputs. layout: the letters of the matrix.
  """

  def __init__(self, blocks, rows, num_rows: int, layout: Layout):
    if layout.experts: raise IncompatibleError(EXPERTS)
    # Letters of no mesh axis; `inputs` says that it is a matrix, which decays (and which Muon leaves to AdamW).
    self.blocks, self.rows = nnx.Param(blocks, axes='1111', inputs='1'), Frozen(rows, axes='11')
    self.num_rows, self.layout = num_rows, layout

  @property
  def axes(self): return self.layout.axes

  @property
  def inputs(self): return self.layout.inputs

  @property
  def kind(self):
    (K, U, V), dtype = self.blocks.get_value().shape[-3:], jnp.dtype(self.blocks.get_value().dtype).name
    return f'{dtype}, {K / self.num_rows:.1%} of its {U} x {V} blocks'

  @property
  def product(self): return 'float, kept blocks alone'

  @property
  def shape(self):
    *lead, C, _, U, V = self.blocks.get_value().shape
    return self.layout.array_shape((*lead, C * V, self.num_rows * U))

  @property
  def num_multiplied(self): return math.prod(self.blocks.get_value().shape)

  def materialize(self):
    return self._array(self.blocks.get_value())

  def invariants(self):
    return (*super().invariants(), Zeros(self._array(jnp.ones(self.blocks.get_value().shape, bool))))

  def contract(self, equation: str, x, dtype=None):
    if not (is_matrix_product(equation) and equation.split(',')[0].endswith(self.inputs)):
      return super().contract(equation, x, dtype)
    rows = x.shape[:x.ndim - len(self.inputs)]
    multiply = by_shard(self._product, ('M1', '111', '11'), 'M1')
    C, K, U, V = self.blocks.get_value().shape
    blocks_ZUV = self.blocks.get_value().astype(x.dtype).reshape(C * K, U, V)
    y_MO = multiply(x.reshape(math.prod(rows), -1), blocks_ZUV, self.rows.get_value())
    return y_MO.reshape(*rows, *self.layout.split(self.layout.outputs, C * V)).astype(dtype or x.dtype)

  def cast(self, dtype):
    return BlockSparse(self.blocks.get_value().astype(dtype), self.rows.get_value(), self.num_rows, self.layout)

  def _product(self, x_MI, blocks_ZUV, rows_CK):
    return block_sparse_matmul(x_MI, blocks_ZUV, balanced(rows_CK, self.num_rows), equal_columns=True)

  def _array(self, blocks):
    """The array of which these are the blocks, all else zero."""
    *lead, C, K, U, V = blocks.shape
    empty_RUV = jnp.zeros((self.num_rows, U, V), blocks.dtype)
    put = lambda blocks_KUV, rows_K: empty_RUV.at[rows_K].set(blocks_KUV, unique_indices=True)
    columns = jax.vmap(put)(blocks.reshape(-1, K, U, V), self.rows.get_value().reshape(-1, K))
    matrix_OI = jnp.moveaxis(columns, -1, 1).reshape(*lead, C * V, self.num_rows * U)
    return self.layout.array(matrix_OI)


EXPERTS = 'is stacked by expert: the grouped product has no blocks; choose `where` without experts'


def in_blocks(weight: Weight, block: tuple[int, int]):
  """(..., C, R, U, V): the blocks of a weight's matrix, by outputs and inputs. Raises IncompatibleError where they do not
  divide it, and for experts."""
  C, R = grid(weight, block)
  matrix_OI = Layout.of(weight).matrix(weight.materialize())
  *lead, num_outputs, num_inputs = matrix_OI.shape
  return jnp.moveaxis(matrix_OI.reshape(*lead, C, num_outputs // C, R, num_inputs // R), -3, -1)


def grid(weight: Weight, block: tuple[int, int]) -> tuple[int, int]:
  """(C, R): how many blocks of U inputs by V outputs its outputs and its inputs are. Raises as `in_blocks`."""
  (num_outputs, num_inputs), (U, V) = matrix_shape(weight), block
  if weight.axes.startswith('E'): raise IncompatibleError(EXPERTS)
  if num_inputs % U or num_outputs % V:
    raise IncompatibleError(f'blocks of {U} inputs by {V} outputs do not divide its {num_inputs} x {num_outputs}: choose a '
                            f'`block` that does, or leave it out by `where`')
  return num_outputs // V, num_inputs // U


def kept_in(weight: Weight, block: tuple[int, int], rows) -> BlockSparse:
  """The weight's blocks in these rows, (..., C, K) ascending."""
  blocks = in_blocks(weight, block)
  kept = jnp.take_along_axis(blocks, rows[..., None, None], axis=-3)
  return BlockSparse(kept, rows.astype(jnp.int32), blocks.shape[-3], Layout.of(weight))
