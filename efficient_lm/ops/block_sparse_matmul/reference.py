"""The block-sparse product as its equation: that of the dense matrix, with zeros where no block is kept."""
import jax.numpy as jnp

from efficient_lm.ops.block_sparse_matmul.pattern import to_dense


def block_sparse_matmul(x_MK, blocks_QUV, pattern):
  """y = x w, accumulated in float32. Autodiff gives the gradients of x and of the kept blocks."""
  y_MN = jnp.matmul(x_MK, to_dense(blocks_QUV, pattern), precision='highest', preferred_element_type=jnp.float32)
  return y_MN.astype(x_MK.dtype)
