"""The block-sparse product in plain JAX: one dense product for each column of blocks, with the inputs of its kept blocks.

The inputs of a column's blocks are copied side by side, `chunk` blocks at a time, and multiplied by the blocks, which lie
one below the other. Small products are slow on a CPU; this way a column takes one product or two, if columns have equally
many blocks. A column with more blocks takes more products, and the part of the last chunk that exceeds the column is
multiplied by zeros. The gradient of x is the same over rows, with blocks that are sorted by row and transposed first. The
gradient of the blocks takes one product for each chunk too. It transposes x once; transposing for each column would take
twice the time.

On accelerators such a loop of small products is slower than one dense product, which `dense` computes. P = Z + chunk counts
kept blocks with padding.
"""
import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.block_sparse_matmul.pattern import Pattern, to_dense

FEW = 16         # rows up to which all columns are one batch of products: a loop costs more than copies of so few
MAX_CHUNK = 64   # copies in the body of the loop; more of them would only make compilation longer


@jax.custom_vjp
def block_sparse_matmul(x_MI, blocks_ZUV, pattern: Pattern):
  """See the API."""
  return _rows(x_MI, blocks_ZUV, pattern.column_starts, pattern.rows_Z)


@jax.custom_vjp
def balanced(x_MI, blocks_ZUV, pattern: Pattern):
  """The same of columns that keep equally many blocks: a column is one product, nothing is padded or left out of a chunk,
  and a few rows are one product of all columns."""
  (M, I), (Z, U, V), C = x_MI.shape, blocks_ZUV.shape, pattern.shape[1]
  K = Z // C
  rows_CK, blocks_CIV = jnp.asarray(pattern.rows_Z).reshape(C, K), blocks_ZUV.reshape(C, K * U, V)
  if M <= FEW:
    x_CMI = jnp.take(x_MI.reshape(M, I // U, U), rows_CK.reshape(-1), axis=1).reshape(M, C, K * U).swapaxes(0, 1)
    y_CMV = lax.dot_general(x_CMI, blocks_CIV, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
    return y_CMV.swapaxes(0, 1).reshape(M, C * V).astype(x_MI.dtype)

  def column(c, y_MO):
    x = jnp.concatenate([lax.dynamic_slice_in_dim(x_MI, rows_CK[c, i] * U, U, axis=1) for i in range(K)], axis=1)
    y_MV = jnp.dot(x, blocks_CIV[c], preferred_element_type=jnp.float32).astype(x_MI.dtype)
    return lax.dynamic_update_slice_in_dim(y_MO, y_MV, c * V, axis=1)
  return lax.fori_loop(0, C, column, jnp.zeros((M, C * V), x_MI.dtype))


def _forward(x_MI, blocks_ZUV, pattern):
  return block_sparse_matmul(x_MI, blocks_ZUV, pattern), (x_MI, blocks_ZUV, pattern)


def _balanced_forward(x_MI, blocks_ZUV, pattern):
  return balanced(x_MI, blocks_ZUV, pattern), (x_MI, blocks_ZUV, pattern)


def _backward(saved, g_MO):
  x_MI, blocks_ZUV, pattern = saved
  transposed_ZVU = blocks_ZUV[pattern.by_row_Z].swapaxes(1, 2)
  dx_MI = _rows(g_MO, transposed_ZVU, pattern.row_starts, pattern.columns_Z[pattern.by_row_Z])
  return dx_MI, _blocks(x_MI, g_MO, blocks_ZUV, pattern), None


block_sparse_matmul.defvjp(_forward, _backward)
balanced.defvjp(_balanced_forward, _backward)


def dense(x_MI, blocks_ZUV, pattern: Pattern):
  """The product with the dense matrix, on any device: it takes the work of a dense product."""
  return jnp.matmul(x_MI, to_dense(blocks_ZUV, pattern), preferred_element_type=jnp.float32).astype(x_MI.dtype)


def chunk_blocks(num_blocks: int, num_outputs: int) -> int:
  """Blocks in one product: all blocks of an average column if those are few, half of them otherwise, because columns of
  unequal numbers waste half a product on average."""
  average = -(-num_blocks // num_outputs)
  return min(max(1, average if average <= 4 else -(-average // 2)), MAX_CHUNK)


def _rows(x_MI, blocks_ZUV, starts, inputs_Z):
  """y_o = the sum over starts[o] <= z < starts[o + 1] of input block inputs_Z[z] times block z."""
  (M, _), (Z, U, V), num_outputs = x_MI.shape, blocks_ZUV.shape, starts.shape[0] - 1
  chunk = chunk_blocks(Z, num_outputs)
  starts, inputs_P = jnp.asarray(starts), jnp.pad(jnp.asarray(inputs_Z), (0, chunk))
  blocks_PUV = jnp.pad(blocks_ZUV, ((0, chunk), (0, 0), (0, 0)))

  def part(z, end):
    x = jnp.concatenate([lax.dynamic_slice_in_dim(x_MI, inputs_P[z + i] * U, U, axis=1) for i in range(chunk)], axis=1)
    inside = (z + jnp.arange(chunk) < end)[:, None, None]
    w = jnp.where(inside, lax.dynamic_slice_in_dim(blocks_PUV, z, chunk), 0).reshape(chunk * U, V)
    return jnp.dot(x, w, preferred_element_type=jnp.float32)

  def output(o, y_MO):
    end = starts[o + 1]
    step = lambda carry: (carry[0] + chunk, carry[1] + part(carry[0], end))
    # The first product stands before the loop, because adding it to zeros would be another pass over the result.
    _, y = lax.while_loop(lambda carry: carry[0] < end, step, (starts[o] + chunk, part(starts[o], end)))
    return lax.dynamic_update_slice_in_dim(y_MO, y.astype(y_MO.dtype), o * V, axis=1)

  return lax.fori_loop(0, num_outputs, output, jnp.zeros((M, num_outputs * V), x_MI.dtype))


def _blocks(x_MI, g_MO, blocks_ZUV, pattern: Pattern):
  """dw_z = x_r^T g_c for the row r and the column c of each kept block."""
  (Z, U, V), C = blocks_ZUV.shape, pattern.shape[1]
  chunk = chunk_blocks(Z, C)
  starts, rows_P = jnp.asarray(pattern.column_starts), jnp.pad(jnp.asarray(pattern.rows_Z), (0, chunk))
  x_IM = x_MI.T

  def column(c, dw_PUV):
    g_MV = lax.dynamic_slice_in_dim(g_MO, c * V, V, axis=1)

    def step(carry):
      z, dw_PUV = carry
      x = jnp.concatenate([lax.dynamic_slice_in_dim(x_IM, rows_P[z + i] * U, U) for i in range(chunk)])
      dw = jnp.dot(x, g_MV, preferred_element_type=jnp.float32)
      # Blocks past the column's end are overwritten by the next columns, or lie past the last block.
      dw = dw.reshape(chunk, U, V).astype(dw_PUV.dtype)
      return z + chunk, lax.dynamic_update_slice_in_dim(dw_PUV, dw, z, axis=0)

    return lax.while_loop(lambda carry: carry[0] < starts[c + 1], step, (starts[c], dw_PUV))[1]

  return lax.fori_loop(0, C, column, jnp.zeros((Z + chunk, U, V), blocks_ZUV.dtype))[:Z]
