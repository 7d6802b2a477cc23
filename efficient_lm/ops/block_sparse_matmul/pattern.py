"""Where the kept blocks of a block-sparse matrix lie, and the way from a dense matrix to its kept blocks and back.

Coordinates are arrays, not constants of the program: a scan over layers carries one pattern a layer. What is static is
their number Q, so that layers in one stack need equally many blocks, but not in the same places. The blocks are stored
without padding, sorted by column, and columns may keep different numbers of them. Equal numbers are faster: no device
waits for the fullest column, and the plain JAX path then multiplies nothing but kept blocks.
"""
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Sweep(NamedTuple):
  """The kept blocks in the order of one product, all int32: output block o sums over starts[o] <= q < starts[o + 1].

  starts: one more than there are output blocks. inputs_Q: the input block that each reads. blocks_Q: which stored block
  multiplies it.
  """
  starts: np.ndarray
  inputs_Q: np.ndarray
  blocks_Q: np.ndarray


class Pattern(NamedTuple):
  """Places of Q blocks in a matrix of R rows and C columns of blocks, all int32; a pytree of arrays.

  rows_Q, columns_Q: of each stored block; sorted by column, and within one by row.
  column_starts: C + 1 numbers; the blocks of column c are those from column_starts[c] to before column_starts[c + 1].
  by_row_Q: the same blocks sorted by row, and within one by column, as numbers of stored blocks.
  row_starts: R + 1 numbers; the blocks of row r are by_row_Q[row_starts[r]:row_starts[r + 1]].
  """
  rows_Q: np.ndarray
  columns_Q: np.ndarray
  column_starts: np.ndarray
  by_row_Q: np.ndarray
  row_starts: np.ndarray

  @property
  def shape(self) -> tuple[int, int]:
    """(R, C)."""
    return self.row_starts.shape[0] - 1, self.column_starts.shape[0] - 1

  def by_column(self) -> Sweep:
    """For y = x w: output blocks are columns."""
    return Sweep(self.column_starts, self.rows_Q, jnp.arange(self.rows_Q.shape[0], dtype=jnp.int32))

  def by_row(self) -> Sweep:
    """For dx = dy w^T: output blocks are rows."""
    return Sweep(self.row_starts, self.columns_Q[self.by_row_Q], self.by_row_Q)


def pattern_of(mask_RC) -> Pattern:
  """The pattern of a concrete bool mask, True where a block is kept."""
  mask_RC = np.asarray(mask_RC, bool)
  columns_Q, rows_Q = np.nonzero(mask_RC.T)
  starts = lambda counts: np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
  by_row_Q = np.lexsort((columns_Q, rows_Q))
  return Pattern(rows_Q.astype(np.int32), columns_Q.astype(np.int32), starts(mask_RC.sum(0)),
                 by_row_Q.astype(np.int32), starts(mask_RC.sum(1)))


def from_dense(w_KN, mask_RC):
  """blocks_QUV and the pattern: the kept blocks of a matrix that is cut evenly into R x C blocks.

  Raises:
    ValueError: the mask does not cut the matrix evenly.
  """
  (K, N), (R, C) = w_KN.shape, mask_RC.shape
  if K % R or N % C: raise ValueError(f'a mask of {R} x {C} blocks does not cut a {K} x {N} matrix evenly')
  pattern = pattern_of(mask_RC)
  w_RCUV = w_KN.reshape(R, K // R, C, N // C).swapaxes(1, 2)
  return w_RCUV[pattern.rows_Q, pattern.columns_Q], pattern


def to_dense(blocks_QUV, pattern: Pattern):
  """w_KN with zeros where no block is kept; differentiable in the blocks."""
  (R, C), (_, U, V) = pattern.shape, blocks_QUV.shape
  w_RCUV = jnp.zeros((R, C, U, V), blocks_QUV.dtype)
  w_RCUV = w_RCUV.at[pattern.rows_Q, pattern.columns_Q].set(blocks_QUV, unique_indices=True)
  return w_RCUV.swapaxes(1, 2).reshape(R * U, C * V)
