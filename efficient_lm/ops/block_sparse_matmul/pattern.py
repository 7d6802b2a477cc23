"""The places of the kept blocks of a block-sparse matrix, and the conversion of dense matrices to kept blocks and back.

Z counts kept blocks ("nonzero"), which are U x V each, in a matrix of R x C blocks. Coordinates are arrays and not constants
of the program, so that a scan over layers carries one pattern for each layer. Only Z is static: the layers of a stack need
equally many blocks, but not in the same places. The blocks are stored without padding, sorted by column, and columns may
have different numbers of them. Equal numbers are faster: no device waits for the fullest column, and the plain JAX path
multiplies the kept blocks alone.
"""
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

# In a balanced matrix each of the C columns keeps K blocks (Z = C * K), and the pattern is told by rows_CK alone.


class Sweep(NamedTuple):
  """The kept blocks in the order of one product, all int32: output block o sums over starts[o] <= z < starts[o + 1].

  starts: one number more than there are output blocks. inputs_Z: the input block of each product. blocks_Z: the number of
    the stored block that multiplies it.
  """
  starts: np.ndarray
  inputs_Z: np.ndarray
  blocks_Z: np.ndarray


class Pattern(NamedTuple):
  """Places of Z blocks in a matrix of R rows and C columns of blocks, all int32; a pytree of arrays.

  rows_Z, columns_Z: the coordinates of each stored block; sorted by column, and within a column by row.
  column_starts: C + 1 numbers; the blocks of column c are those from column_starts[c] to before column_starts[c + 1].
  by_row_Z: the numbers of the stored blocks, sorted by row, and within a row by column.
  row_starts: R + 1 numbers; the blocks of row r are by_row_Z[row_starts[r]:row_starts[r + 1]].
  """
  rows_Z: np.ndarray
  columns_Z: np.ndarray
  column_starts: np.ndarray
  by_row_Z: np.ndarray
  row_starts: np.ndarray

  @property
  def shape(self) -> tuple[int, int]:
    """(R, C)."""
    return self.row_starts.shape[0] - 1, self.column_starts.shape[0] - 1

  def by_column(self) -> Sweep:
    """The sweep for y = x w, whose output blocks are columns."""
    return Sweep(self.column_starts, self.rows_Z, jnp.arange(self.rows_Z.shape[0], dtype=jnp.int32))

  def by_row(self) -> Sweep:
    """The sweep for dx = dy w^T, whose output blocks are rows."""
    return Sweep(self.row_starts, self.columns_Z[self.by_row_Z], self.by_row_Z)


def pattern_of(mask_RC) -> Pattern:
  """The pattern of a concrete bool mask, which is True where a block is kept."""
  mask_RC = np.asarray(mask_RC, bool)
  columns_Z, rows_Z = np.nonzero(mask_RC.T)
  starts = lambda counts: np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
  by_row_Z = np.lexsort((columns_Z, rows_Z))
  return Pattern(rows_Z.astype(np.int32), columns_Z.astype(np.int32), starts(mask_RC.sum(0)),
                 by_row_Z.astype(np.int32), starts(mask_RC.sum(1)))


def balanced(rows_CK, num_rows: int) -> Pattern:
  """The pattern of K blocks in each column, in rows_CK, ascending in each column, of R = num_rows: of traced arrays, too."""
  C, K = rows_CK.shape
  rows_Z, columns_Z = jnp.reshape(rows_CK, -1), jnp.repeat(jnp.arange(C, dtype=jnp.int32), K)
  counts_R = jnp.zeros(num_rows, jnp.int32).at[rows_Z].add(1)
  row_starts = jnp.pad(jnp.cumsum(counts_R, dtype=jnp.int32), (1, 0))
  by_row_Z = jnp.argsort(rows_Z, stable=True).astype(jnp.int32)
  return Pattern(rows_Z, columns_Z, jnp.arange(C + 1, dtype=jnp.int32) * K, by_row_Z, row_starts)


def from_dense(w_IO, mask_RC):
  """The kept blocks blocks_ZUV of a matrix that is cut evenly into R x C blocks, and their pattern.

  Raises:
    ValueError: the mask does not cut the matrix evenly.
  """
  (I, O), (R, C) = w_IO.shape, mask_RC.shape
  if I % R or O % C: raise ValueError(f'a mask of {R} x {C} blocks does not cut a {I} x {O} matrix evenly')
  pattern = pattern_of(mask_RC)
  w_RCUV = w_IO.reshape(R, I // R, C, O // C).swapaxes(1, 2)
  return w_RCUV[pattern.rows_Z, pattern.columns_Z], pattern


def to_dense(blocks_ZUV, pattern: Pattern):
  """w_IO with zeros outside the kept blocks; differentiable in the blocks."""
  (R, C), (_, U, V) = pattern.shape, blocks_ZUV.shape
  w_RCUV = jnp.zeros((R, C, U, V), blocks_ZUV.dtype)
  w_RCUV = w_RCUV.at[pattern.rows_Z, pattern.columns_Z].set(blocks_ZUV, unique_indices=True)
  return w_RCUV.swapaxes(1, 2).reshape(R * U, C * V)
