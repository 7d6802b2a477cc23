"""The grouped product in plain JAX: one small dense product for each tile of rows, on any backend.

A tile is `block` successive rows that begin in one group, and is multiplied by that group's matrix. The last tile of a group
also covers rows of the next groups. Tiles are computed in order of rows, so that the tiles of those groups overwrite these
rows: no row is moved, padded or masked, and the work is that of sum(ceil(size / block)) tiles, which is known only at run
time. The gradient of x is the same product with transposed matrices. The gradient of w adds x_tile^T @ g_tile for each
group, with the rows of other groups masked.

The visits follow MegaBlocks (Gale et al. 2022, arXiv 2211.15841) and the megablox kernels of JAX, without a kernel. P = M +
block counts rows with padding.
"""
import math

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.grouped_matmul.schedule import UNKNOWN_ROWS


@jax.custom_vjp
def grouped_matmul(x_MI, w_EIO, sizes_E):
  """y_m = x_m @ w_e for the group e that holds row m, and 0 for a row past the last group; see the API."""
  return _rows(x_MI, w_EIO, sizes_E, transposed=False)


def _forward(x_MI, w_EIO, sizes_E):
  return grouped_matmul(x_MI, w_EIO, sizes_E), (x_MI, w_EIO, sizes_E)


def _backward(saved, g_MO):
  x_MI, w_EIO, sizes_E = saved
  return _rows(g_MO, w_EIO, sizes_E, transposed=True), weights(x_MI, g_MO, w_EIO, sizes_E), None


grouped_matmul.defvjp(_forward, _backward)


def block_rows(M: int, E: int) -> int:
  """Rows of a tile: about as many as an average group has, because each group wastes half a tile on average."""
  if not isinstance(M, int): return UNKNOWN_ROWS
  return min(max(8, 2 ** round(math.log2(max(M / E, 1)))), 256)


def _visits(sizes_E, block: int):
  """The number of tiles, and a function from a tile's number to its group, its first row and the end of its group."""
  end_E = jnp.cumsum(sizes_E)
  tiles_E = -(-sizes_E // block)
  last_E = jnp.cumsum(tiles_E)

  def visit(i):
    e = jnp.sum(i >= last_E, dtype=jnp.int32)
    return e, end_E[e] - sizes_E[e] + (i - (last_E[e] - tiles_E[e])) * block, end_E[e]

  return last_E[-1], visit


def _rows(x_MI, w_EIO, sizes_E, transposed: bool):
  """y_m = x_m @ w_e, or x_m @ w_e^T if `transposed`."""
  (M, _), O = x_MI.shape, w_EIO.shape[1 if transposed else 2]
  block = block_rows(M, w_EIO.shape[0])
  num_tiles, visit = _visits(sizes_E, block)
  # Dynamic slices are moved back where they exceed the array; padding of one tile keeps every slice in place.
  x_PI = jnp.pad(x_MI, ((0, block), (0, 0)))
  contract = ((1,), (1 if transposed else 0,)), ((), ())

  def tile(i, y_PO):
    e, row, _ = visit(i)
    x_tile = lax.dynamic_slice_in_dim(x_PI, row, block)
    w_IO = lax.dynamic_index_in_dim(w_EIO, e, keepdims=False)
    y_tile = lax.dot_general(x_tile, w_IO, contract, preferred_element_type=jnp.float32)
    return lax.dynamic_update_slice_in_dim(y_PO, y_tile.astype(y_PO.dtype), row, axis=0)

  y_PO = lax.fori_loop(0, num_tiles, tile, jnp.zeros((M + block, O), x_MI.dtype))
  return jnp.where(jnp.arange(M)[:, None] < jnp.sum(sizes_E), y_PO[:M], 0)


def weights(x_MI, g_MO, w_EIO, sizes_E):
  """dw_e = the sum of x_m^T g_m over the rows m of group e, in the dtype of w."""
  block = block_rows(x_MI.shape[0], w_EIO.shape[0])
  num_tiles, visit = _visits(sizes_E, block)
  x_PI, g_PO = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_MI, g_MO))

  def tile(i, dw_EIO):
    e, row, end = visit(i)
    inside = row + jnp.arange(block)[:, None] < end
    # Both operands are masked, because a row outside may hold NaN, and 0 * NaN is NaN.
    x_tile = jnp.where(inside, lax.dynamic_slice_in_dim(x_PI, row, block), 0)
    g_tile = jnp.where(inside, lax.dynamic_slice_in_dim(g_PO, row, block), 0)
    dw_IO = lax.dot_general(x_tile, g_tile, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    dw_IO += lax.dynamic_index_in_dim(dw_EIO, e, keepdims=False)
    return lax.dynamic_update_index_in_dim(dw_EIO, dw_IO, e, axis=0)

  dw_EIO = lax.fori_loop(0, num_tiles, tile, jnp.zeros(w_EIO.shape, jnp.float32))
  return dw_EIO.astype(w_EIO.dtype)

