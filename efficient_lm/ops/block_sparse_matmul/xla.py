"""The block-sparse product in plain JAX: one dense product for each column of blocks, on those inputs that it keeps.

The inputs of a column's blocks are copied side by side, `chunk` blocks at a time, and multiplied by the blocks put one
below the other: small products waste a CPU's time, so a column is one product or two wherever columns keep equally many
blocks. A column that keeps more takes another turn, and what reaches past its end is multiplied by zeros. The gradient of
x is the same over rows, of blocks that are sorted by row and transposed first; that of the blocks is one product a chunk
too, and reads x transposed, once: for each column anew it would take twice the time.

On accelerators such a loop of small products is slower than one dense product, which is what `dense` is for.
"""
import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.block_sparse_matmul.pattern import Pattern, to_dense

MAX_CHUNK = 64   # Copies in the body of the loop: more of them only make compilation longer.


@jax.custom_vjp
def block_sparse_matmul(x_MK, blocks_QUV, pattern: Pattern):
  """See the API."""
  return _rows(x_MK, blocks_QUV, pattern.column_starts, pattern.rows_Q)


def _forward(x_MK, blocks_QUV, pattern):
  return block_sparse_matmul(x_MK, blocks_QUV, pattern), (x_MK, blocks_QUV, pattern)


def _backward(saved, g_MN):
  x_MK, blocks_QUV, pattern = saved
  transposed_QVU = blocks_QUV[pattern.by_row_Q].swapaxes(1, 2)
  dx_MK = _rows(g_MN, transposed_QVU, pattern.row_starts, pattern.columns_Q[pattern.by_row_Q])
  return dx_MK, _blocks(x_MK, g_MN, blocks_QUV, pattern), None


block_sparse_matmul.defvjp(_forward, _backward)


def dense(x_MK, blocks_QUV, pattern: Pattern):
  """The product with the matrix written out: all of the dense work, on any device."""
  return jnp.matmul(x_MK, to_dense(blocks_QUV, pattern), preferred_element_type=jnp.float32).astype(x_MK.dtype)


def chunk_blocks(num_blocks: int, num_outputs: int) -> int:
  """Blocks in one product: all of a column that keeps as many as the average if those are few, else half of them, because
  where columns are unequal each wastes half a product on average."""
  average = -(-num_blocks // num_outputs)
  return min(max(1, average if average <= 4 else -(-average // 2)), MAX_CHUNK)


def _rows(x_MK, blocks_QUV, starts, inputs_Q):
  """y_o = the sum over starts[o] <= q < starts[o + 1] of input block inputs_Q[q] times block q."""
  (M, _), (Q, U, V), num_outputs = x_MK.shape, blocks_QUV.shape, starts.shape[0] - 1
  chunk = chunk_blocks(Q, num_outputs)
  starts, inputs_P = jnp.asarray(starts), jnp.pad(jnp.asarray(inputs_Q), (0, chunk))
  blocks_PUV = jnp.pad(blocks_QUV, ((0, chunk), (0, 0), (0, 0)))

  def part(q, end):
    x = jnp.concatenate([lax.dynamic_slice_in_dim(x_MK, inputs_P[q + i] * U, U, axis=1) for i in range(chunk)], axis=1)
    inside = (q + jnp.arange(chunk) < end)[:, None, None]
    w = jnp.where(inside, lax.dynamic_slice_in_dim(blocks_PUV, q, chunk), 0).reshape(chunk * U, V)
    return jnp.dot(x, w, preferred_element_type=jnp.float32)

  def output(o, y_MN):
    end = starts[o + 1]
    turn = lambda carry: (carry[0] + chunk, carry[1] + part(carry[0], end))
    # The first turn apart, because adding it to zeros would be another pass over the result.
    _, y = lax.while_loop(lambda carry: carry[0] < end, turn, (starts[o] + chunk, part(starts[o], end)))
    return lax.dynamic_update_slice_in_dim(y_MN, y.astype(y_MN.dtype), o * V, axis=1)

  return lax.fori_loop(0, num_outputs, output, jnp.zeros((M, num_outputs * V), x_MK.dtype))


def _blocks(x_MK, g_MN, blocks_QUV, pattern: Pattern):
  """dw_q = x_r^T g_c for the row r and the column c of each kept block."""
  (Q, U, V), C = blocks_QUV.shape, pattern.shape[1]
  chunk = chunk_blocks(Q, C)
  starts, rows_P = jnp.asarray(pattern.column_starts), jnp.pad(jnp.asarray(pattern.rows_Q), (0, chunk))
  x_KM = x_MK.T

  def column(c, dw_PUV):
    g_MV = lax.dynamic_slice_in_dim(g_MN, c * V, V, axis=1)

    def turn(carry):
      q, dw_PUV = carry
      x = jnp.concatenate([lax.dynamic_slice_in_dim(x_KM, rows_P[q + i] * U, U) for i in range(chunk)])
      dw = jnp.dot(x, g_MV, preferred_element_type=jnp.float32)
      # What reaches past the column's end is overwritten by the next columns, or lies past the last block.
      dw = dw.reshape(chunk, U, V).astype(dw_PUV.dtype)
      return q + chunk, lax.dynamic_update_slice_in_dim(dw_PUV, dw, q, axis=0)

    return lax.while_loop(lambda carry: carry[0] < starts[c + 1], turn, (starts[c], dw_PUV))[1]

  return lax.fori_loop(0, C, column, jnp.zeros((Q + chunk, U, V), blocks_QUV.dtype))[:Q]
