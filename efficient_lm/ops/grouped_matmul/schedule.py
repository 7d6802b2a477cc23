"""The tiles of rows that a grouped product visits: a list that is computed on the device, where the sizes are known.

A tile is `block` successive rows that begin at a multiple of `align`. Each group visits the tiles that hold its rows; the
first one begins at the group's first row, rounded down to a multiple of `align`. Where two groups meet, both may visit rows
of the other, which they must not write. `align` is 1 in plain JAX, 8 on a GPU, whose copies begin at multiples of 8 rows,
and `block` on a TPU, whose tiles lie on a grid. The rows past the last group count as group E, because zeros have to be
written to them.

Letters: V visits, F = E + 1 groups with the rows past the last group.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Rows of a tile where the number of rows is not known when the program is traced: few enough for a token to be decoded, and
# enough for a prompt to read its experts no more often than it must.
UNKNOWN_ROWS = 32


class Visits(NamedTuple):
  """int32 arrays with one entry for each visit, in order of rows. Entries from `count` on have group E + 1 and no rows.

  group: 0 to E; E stands for the rows past the last group.
  row: the first row of the tile.
  low, high: the rows [row + low, row + high) of the tile belong to the group.
  count: the number of visits, a scalar.
  """
  group: jax.Array
  row: jax.Array
  low: jax.Array
  high: jax.Array
  count: jax.Array


def most_visits(M: int, E: int, block: int, align: int) -> int:
  """An upper bound of the visits of E groups and the rows past them, M rows together. A group of s rows makes at most
  (s + align + block - 2) / block visits. Where tiles lie on a grid, each of the E borders adds at most one visit to those of
  the grid."""
  on_grid = -(-M // block) + E
  return on_grid if align == block else (M + (E + 1) * (align + block - 2)) // block


def visits(sizes_E, M: int, block: int, align: int = 1, *, empty: bool = False, tail: bool = True) -> Visits:
  """The visits of groups of these sizes within M rows.

  Args:
    sizes_E: int32 rows of each group.
    block: rows of a tile, a multiple of `align`.
    empty: whether a group without rows makes one visit too (a gradient of zeros has to be written).
    tail: whether the rows past the last group are visited.
  """
  E = sizes_E.shape[0]
  end_F = jnp.cumsum(jnp.append(sizes_E, 0)).at[E].set(M)   # F = E + 1 groups with the tail
  start_F = jnp.append(0, end_F[:-1])
  first_F = start_F // align * align
  tiles_F = jnp.where(end_F > start_F, -(-(end_F - first_F) // block), jnp.int32(empty))
  if not tail: tiles_F = tiles_F.at[E].set(0)
  last_F = jnp.cumsum(tiles_F)
  V = most_visits(M, E, block, align) + (E if empty else 0)
  visit_V = jnp.arange(V, dtype=jnp.int32)
  group_V = jnp.sum(visit_V[:, None] >= last_F, axis=1, dtype=jnp.int32)
  there_V = group_V <= E
  of_V = jnp.minimum(group_V, E)
  row_V = first_F[of_V] + (visit_V - (last_F - tiles_F)[of_V]) * block
  low_V = jnp.clip(start_F[of_V] - row_V, 0, block)
  high_V = jnp.clip(end_F[of_V] - row_V, 0, block)
  fields = (jnp.where(there_V, field, filler).astype(jnp.int32)
            for field, filler in ((group_V, E + 1), (row_V, 0), (low_V, 0), (high_V, 0)))
  return Visits(*fields, last_F[-1].astype(jnp.int32))
