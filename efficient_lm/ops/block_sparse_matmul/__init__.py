"""The product with a matrix of which whole blocks are zero: those are neither stored nor multiplied."""
import jax.numpy as jnp

from efficient_lm.lazy import lazy
from efficient_lm.ops import dispatch, mosaic
from efficient_lm.ops.block_sparse_matmul import reference, xla
from efficient_lm.ops.block_sparse_matmul.pattern import Pattern, from_dense, pattern_of, to_dense

pallas_gpu = lazy('efficient_lm.ops.block_sparse_matmul.pallas_gpu')
pallas_tpu = lazy('efficient_lm.ops.block_sparse_matmul.pallas_tpu')
__all__ = ['IMPLEMENTATIONS', 'Pattern', 'block_sparse_matmul', 'from_dense', 'pattern_of', 'to_dense']


def block_sparse_matmul(x_MK, blocks_QUV, pattern: Pattern, *, implementation: str = 'auto'):
  """y_MN = x_MK @ to_dense(blocks_QUV, pattern). Differentiable in x and in the blocks; what is not kept has no gradient.

  The gradient of x reads the same blocks, and the gradient of the blocks is computed for those alone.

  Args:
    x_MK: rows of K = R * U inputs.
    blocks_QUV: the kept blocks of U x V in the pattern's order, in the dtype of x. There may be none.
    pattern: where they lie among R x C blocks: `pattern_of(mask)`, or the second result of `from_dense`.
    implementation: 'auto', 'pallas_gpu' (Hopper), 'pallas_tpu', 'xla', 'dense' or 'reference'.

  Returns:
    y_MN with N = C * V, in the dtype of x, accumulated in float32.

  Raises:
    ValueError: sizes or dtypes do not go together.
  """
  (R, C), (Q, U, V) = pattern.shape, blocks_QUV.shape
  if x_MK.shape[1] != R * U or pattern.rows_Q.shape != (Q,):
    raise ValueError(f'{x_MK.shape[1]} inputs and {Q} blocks of {U} x {V} on a pattern of {pattern.rows_Q.shape[0]} '
                     f'blocks in {R} x {C}: there must be {R} * {U} inputs, and as many blocks as places')
  if x_MK.dtype != blocks_QUV.dtype:
    raise ValueError(f'rows are {x_MK.dtype}, blocks {blocks_QUV.dtype}: cast one of them')
  if not Q: return jnp.zeros((x_MK.shape[0], C * V), x_MK.dtype)
  return dispatch.run('block_sparse_matmul', IMPLEMENTATIONS, implementation, x_MK, blocks_QUV, pattern)


IMPLEMENTATIONS = {
  'pallas_gpu': mosaic.kernel(pallas_gpu, 'block_sparse_matmul', 'hopper'),
  'pallas_tpu': mosaic.kernel(pallas_tpu, 'block_sparse_matmul', 'tpu'),
  # A loop of small products: right for a CPU, launch after launch for an accelerator.
  'xla': dispatch.Implementation(xla.block_sparse_matmul, auto=('cpu',)),
  'dense': dispatch.Implementation(xla.dense),
  'reference': dispatch.Implementation(reference.block_sparse_matmul),
}
