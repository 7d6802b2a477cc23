"""The block-sparse product in plain JAX: one dense product for each column of blocks, on those inputs that it keeps.

The inputs of a column's blocks are copied side by side, `chunk` blocks at a time, and multiplied by the blocks put one
below the other: small products waste a CPU's time, so a column is one product wherever columns keep equally many blocks.
A column that keeps more takes another turn, and what reaches past its end is multiplied by zeros. The gradient of x is
the same sweep over rows with transposed blocks; that of the blocks is one product a column too, the copied inputs
transposed times the column of the gradient.

On accelerators such a loop of small products is slower than one dense product, which is what `dense` is for.
"""
import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.block_sparse_matmul.pattern import Pattern, Sweep, to_dense

MAX_CHUNK = 64   # Copies in the body of the loop: more of them only make compilation longer.


@jax.custom_vjp
def block_sparse_matmul(x_MK, blocks_QIJ, pattern: Pattern):
  """See the API."""
  return _rows(x_MK, blocks_QIJ, pattern.by_column(), transposed=False)


def _forward(x_MK, blocks_QIJ, pattern):
  return block_sparse_matmul(x_MK, blocks_QIJ, pattern), (x_MK, blocks_QIJ, pattern)


def _backward(saved, g_MN):
  x_MK, blocks_QIJ, pattern = saved
  return _rows(g_MN, blocks_QIJ, pattern.by_row(), transposed=True), _blocks(x_MK, g_MN, blocks_QIJ, pattern), None


block_sparse_matmul.defvjp(_forward, _backward)


def dense(x_MK, blocks_QIJ, pattern: Pattern):
  """The product with the matrix written out: all of the dense work, on any device."""
  return jnp.matmul(x_MK, to_dense(blocks_QIJ, pattern), preferred_element_type=jnp.float32).astype(x_MK.dtype)


def chunk_blocks(num_blocks: int, num_outputs: int) -> int:
  """Blocks in one product: those of a column, if all columns keep equally many."""
  return min(max(1, -(-num_blocks // num_outputs)), MAX_CHUNK)


def _inputs(x_MK, inputs_Q, q, chunk: int, size: int):
  """The input blocks number q … q + chunk - 1 of a sweep, side by side: (M, chunk * size)."""
  return jnp.concatenate([lax.dynamic_slice_in_dim(x_MK, inputs_Q[q + i] * size, size, axis=1)
                          for i in range(chunk)], axis=1)


def _rows(x_MK, blocks_QIJ, sweep: Sweep, transposed: bool):
  """y_o = the sum of x_i w_q over the sweep's blocks of each output block o, or of x_i w_q^T if `transposed`."""
  (M, _), (Q, I, J), num_outputs = x_MK.shape, blocks_QIJ.shape, sweep.starts.shape[0] - 1
  read, write = (J, I) if transposed else (I, J)
  chunk = chunk_blocks(Q, num_outputs)
  starts = jnp.asarray(sweep.starts)
  inputs_P, blocks_P = (jnp.pad(jnp.asarray(numbers), (0, chunk)) for numbers in (sweep.inputs_Q, sweep.blocks_Q))

  def part(q, end):
    w = jnp.concatenate([jnp.where(q + i < end, blocks_QIJ[blocks_P[q + i]], 0) for i in range(chunk)],
                        axis=int(transposed))
    contract = ((1,), (int(transposed),)), ((), ())
    return lax.dot_general(_inputs(x_MK, inputs_P, q, chunk, read), w, contract, preferred_element_type=jnp.float32)

  def output(o, y_MN):
    end = starts[o + 1]
    turn = lambda carry: (carry[0] + chunk, carry[1] + part(carry[0], end))
    # The first turn apart, because adding it to zeros would be another pass over the result.
    _, y = lax.while_loop(lambda carry: carry[0] < end, turn, (starts[o] + chunk, part(starts[o], end)))
    return lax.dynamic_update_slice_in_dim(y_MN, y.astype(y_MN.dtype), o * write, axis=1)

  return lax.fori_loop(0, num_outputs, output, jnp.zeros((M, num_outputs * write), x_MK.dtype))


def _blocks(x_MK, g_MN, blocks_QIJ, pattern: Pattern):
  """dw_q = x_r^T g_c for the row r and the column c of each kept block."""
  (Q, I, J), C = blocks_QIJ.shape, pattern.shape[1]
  chunk = chunk_blocks(Q, C)
  starts, rows_P = jnp.asarray(pattern.column_starts), jnp.pad(jnp.asarray(pattern.rows_Q), (0, chunk))

  def column(c, dw_PIJ):
    g_MJ = lax.dynamic_slice_in_dim(g_MN, c * J, J, axis=1)

    def turn(carry):
      q, dw_PIJ = carry
      dw = lax.dot_general(_inputs(x_MK, rows_P, q, chunk, I), g_MJ, (((0,), (0,)), ((), ())),
                           preferred_element_type=jnp.float32)
      # What reaches past the column's end is overwritten by the next columns, or lies past the last block.
      dw = dw.reshape(chunk, I, J).astype(dw_PIJ.dtype)
      return q + chunk, lax.dynamic_update_slice_in_dim(dw_PIJ, dw, q, axis=0)

    return lax.while_loop(lambda carry: carry[0] < starts[c + 1], turn, (starts[c], dw_PIJ))[1]

  return lax.fori_loop(0, C, column, jnp.zeros((Q + chunk, I, J), blocks_QIJ.dtype))[:Q]
