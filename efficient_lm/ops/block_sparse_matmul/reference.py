"""The block-sparse product as its equation: the product with the dense matrix, which is zero outside the kept blocks."""
import jax.numpy as jnp

from efficient_lm.ops.block_sparse_matmul.pattern import to_dense


def block_sparse_matmul(x_MI, blocks_ZUV, pattern):
  """y = x w, accumulated in float32. Autodiff gives the gradients of x and of the kept blocks."""
  y_MO = jnp.matmul(x_MI, to_dense(blocks_ZUV, pattern), precision='highest', preferred_element_type=jnp.float32)
  return y_MO.astype(x_MI.dtype)
