"""The grouped product in plain JAX: one small dense product a tile of rows, on any backend.

A tile is `block` consecutive rows that begin in one group, and is multiplied by that group's matrix. The last tile of a
group reaches into the next groups. Tiles are visited in order of rows, so what it writes there is overwritten by the
tiles of those groups: no row is moved, padded or masked, and the work is that of sum(ceil(size / block)) tiles, a
number known only at run time. The gradient of x is such a product with transposed matrices; that of w adds up
x_tile^T @ g_tile for each group, and there the rows of other groups do have to be masked.

The visits follow MegaBlocks (Gale et al. 2022, arXiv 2211.15841) and the megablox kernels of JAX, without the kernel.
"""
import math

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def grouped_matmul(x_MK, w_EKN, sizes_E):
  """y_m = x_m @ w_e for the group e that holds row m, and 0 for a row past the last group; see the API."""
  return _rows(x_MK, w_EKN, sizes_E, transposed=False)


def _forward(x_MK, w_EKN, sizes_E):
  return grouped_matmul(x_MK, w_EKN, sizes_E), (x_MK, w_EKN, sizes_E)


def _backward(saved, g_MN):
  x_MK, w_EKN, sizes_E = saved
  return _rows(g_MN, w_EKN, sizes_E, transposed=True), weights(x_MK, g_MN, w_EKN, sizes_E), None


grouped_matmul.defvjp(_forward, _backward)


def block_rows(M: int, E: int) -> int:
  """Rows of a tile: about those of an average group, since a group wastes half a tile on average."""
  return min(max(8, 2 ** round(math.log2(max(M / E, 1)))), 256)


def _visits(sizes_E, block: int):
  """How many tiles there are, and a function from a tile's number to its group, its first row and its group's end."""
  end_E = jnp.cumsum(sizes_E)
  tiles_E = -(-sizes_E // block)
  last_E = jnp.cumsum(tiles_E)

  def visit(i):
    e = jnp.sum(i >= last_E, dtype=jnp.int32)
    return e, end_E[e] - sizes_E[e] + (i - (last_E[e] - tiles_E[e])) * block, end_E[e]

  return last_E[-1], visit


def _rows(x_MK, w_EKN, sizes_E, transposed: bool):
  """y_m = x_m @ w_e, or x_m @ w_e^T if `transposed`."""
  (M, _), N = x_MK.shape, w_EKN.shape[1 if transposed else 2]
  block = block_rows(M, w_EKN.shape[0])
  num_tiles, visit = _visits(sizes_E, block)
  # A slice near the end would be moved back to fit, and so would its rows: make room for the longest overhang.
  x_PK = jnp.pad(x_MK, ((0, block), (0, 0)))
  contract = ((1,), (1 if transposed else 0,)), ((), ())

  def tile(i, y_PN):
    e, row, _ = visit(i)
    x_QK = lax.dynamic_slice_in_dim(x_PK, row, block)
    w_KN = lax.dynamic_index_in_dim(w_EKN, e, keepdims=False)
    y_QN = lax.dot_general(x_QK, w_KN, contract, preferred_element_type=jnp.float32)
    return lax.dynamic_update_slice_in_dim(y_PN, y_QN.astype(y_PN.dtype), row, axis=0)

  y_PN = lax.fori_loop(0, num_tiles, tile, jnp.zeros((M + block, N), x_MK.dtype))
  return jnp.where(jnp.arange(M)[:, None] < jnp.sum(sizes_E), y_PN[:M], 0)


def weights(x_MK, g_MN, w_EKN, sizes_E):
  """dw_e = the sum of x_m^T g_m over the rows m of group e, in the dtype of w."""
  block = block_rows(x_MK.shape[0], w_EKN.shape[0])
  num_tiles, visit = _visits(sizes_E, block)
  x_PK, g_PN = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_MK, g_MN))

  def tile(i, dw_EKN):
    e, row, end = visit(i)
    inside_Q1 = row + jnp.arange(block)[:, None] < end
    # Both sides, because a row outside may hold NaN and 0 * NaN is NaN.
    x_QK = jnp.where(inside_Q1, lax.dynamic_slice_in_dim(x_PK, row, block), 0)
    g_QN = jnp.where(inside_Q1, lax.dynamic_slice_in_dim(g_PN, row, block), 0)
    dw_KN = lax.dot_general(x_QK, g_QN, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    dw_KN += lax.dynamic_index_in_dim(dw_EKN, e, keepdims=False)
    return lax.dynamic_update_index_in_dim(dw_EKN, dw_KN, e, axis=0)

  dw_EKN = lax.fori_loop(0, num_tiles, tile, jnp.zeros(w_EKN.shape, jnp.float32))
  return dw_EKN.astype(w_EKN.dtype)

