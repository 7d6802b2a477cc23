"""The product with a matrix of which whole blocks are zero: zero blocks are neither stored nor multiplied.

`weights.block_sparse` multiplies by it.
"""
import jax.numpy as jnp

from efficient_lm.ops import dispatch, mosaic
from efficient_lm.ops.block_sparse_matmul import reference, xla
from efficient_lm.ops.block_sparse_matmul.pattern import Pattern, balanced, from_dense, pattern_of, to_dense

__all__ = ['IMPLEMENTATIONS', 'Pattern', 'balanced', 'block_sparse_matmul', 'from_dense', 'pattern_of', 'to_dense']


def block_sparse_matmul(x_MI, blocks_ZUV, pattern: Pattern, *, equal_columns: bool = False, implementation: str = 'auto'):
  """y_MO = x_MI @ to_dense(blocks_ZUV, pattern). Differentiable in x and in the blocks.

  The gradient of x reads the same blocks, and the gradient of the matrix is computed for the kept blocks alone.

  Args:
    x_MI: rows of I = R * U inputs.
    blocks_ZUV: the Z kept blocks, U x V each, in the pattern's order and in the dtype of x. There may be none.
    pattern: where they lie among R x C blocks: `pattern_of(mask)`, or the second result of `from_dense`.
    equal_columns: promises that all columns keep equally many blocks, which arrays of a pattern cannot say to a compiler:
      'xla' is then faster.
    implementation: 'auto', 'pallas_gpu' (Hopper), 'pallas_tpu', 'xla', 'dense' or 'reference'.

  Returns:
    y_MO with O = C * V, in the dtype of x, accumulated in float32.

  Raises:
    ValueError: the sizes of x, blocks and pattern do not agree, or the dtypes of x and blocks differ.
  """
  (R, C), (Z, U, V) = pattern.shape, blocks_ZUV.shape
  if x_MI.shape[1] != R * U or pattern.rows_Z.shape != (Z,):
    raise ValueError(f'{x_MI.shape[1]} inputs and {Z} blocks of {U} x {V} on a pattern of {pattern.rows_Z.shape[0]} '
                     f'blocks in {R} x {C}: there must be {R} * {U} inputs, and as many blocks as places')
  if x_MI.dtype != blocks_ZUV.dtype:
    raise ValueError(f'rows are {x_MI.dtype}, blocks {blocks_ZUV.dtype}: cast one of them')
  if not Z: return jnp.zeros((x_MI.shape[0], C * V), x_MI.dtype)
  if equal_columns and Z % C: raise ValueError(f'{Z} blocks in {C} columns: they cannot keep equally many')
  known = EQUAL_COLUMNS if equal_columns else IMPLEMENTATIONS
  return dispatch.run('block_sparse_matmul', known, implementation, x_MI, blocks_ZUV, pattern)


def _pallas_gpu():
  from efficient_lm.ops.block_sparse_matmul import pallas_gpu
  return pallas_gpu


def _pallas_tpu():
  from efficient_lm.ops.block_sparse_matmul import pallas_tpu
  return pallas_tpu


IMPLEMENTATIONS = {
  'pallas_gpu': mosaic.kernel(_pallas_gpu, 'block_sparse_matmul', 'hopper'),
  'pallas_tpu': mosaic.kernel(_pallas_tpu, 'block_sparse_matmul', 'tpu'),
  # A loop of small products is fast on a CPU. On an accelerator each iteration would be several launches.
  'xla': dispatch.Implementation(xla.block_sparse_matmul, auto=('cpu',)),
  'dense': dispatch.Implementation(xla.dense),
  'reference': dispatch.Implementation(reference.block_sparse_matmul),
}
EQUAL_COLUMNS = IMPLEMENTATIONS | {'xla': dispatch.Implementation(xla.balanced, auto=('cpu',))}
