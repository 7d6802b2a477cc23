"""Which tiles of rows a grouped product visits: a list that is computed on the device, since sizes are known only there.

A tile is `block` consecutive rows that begin at a multiple of `align`. Each group visits the tiles that hold its rows, the
first one from its own first row rounded down, so where two groups meet both visit rows of the other and must leave them
alone. How far down: to 1 in plain JAX, to what a copy engine can address on a GPU (8), to whole blocks on a TPU, whose
tiles lie on a grid. The rows past the last group are a group of their own, number E: somebody has to write their zeros.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Visits(NamedTuple):
  """int32 arrays, one entry a visit, in order of rows. Entries from `count` on hold group E + 1 and no rows.

  group: 0 to E; E is the rows past the last group.
  row: first row of the tile.
  low, high: the rows [row + low, row + high) of the tile are the group's.
  count: how many visits there are, a scalar.
  """
  group: jax.Array
  row: jax.Array
  low: jax.Array
  high: jax.Array
  count: jax.Array


def most_visits(M: int, E: int, block: int, align: int) -> int:
  """No E groups and a tail within M rows need more: a group of s rows takes at most (s + align + block - 2) / block, and
  where tiles lie on a grid each of the E borders adds at most one to those of the grid."""
  on_grid = -(-M // block) + E
  return on_grid if align == block else (M + (E + 1) * (align + block - 2)) // block


def visits(sizes_E, M: int, block: int, align: int = 1, *, empty: bool = False, tail: bool = True) -> Visits:
  """The visits of groups of these sizes within M rows.

  Args:
    sizes_E: int32 rows of each group.
    block: rows of a tile, a multiple of `align`.
    empty: a group without rows makes one visit too (a gradient of zeros has to be written).
    tail: the rows past the last group are visited.
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
