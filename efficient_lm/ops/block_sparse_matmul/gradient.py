"""The gradient that kernels of the block-sparse product share: two more products over the same kept blocks."""
from collections.abc import Callable

import jax


def differentiable(rows: Callable, weights: Callable) -> Callable:
  """product(x_MK, blocks_QUV, pattern) with its gradients by x and by the blocks.

  Args:
    rows: (x, blocks, sweep, transposed=) -> x times the blocks, swept by column, or times their transposes, by row.
    weights: (x, g, blocks, pattern) -> x^T g at the kept blocks.
  """
  @jax.custom_vjp
  def product(x_MK, blocks_QUV, pattern):
    return rows(x_MK, blocks_QUV, pattern.by_column())

  def forward(x_MK, blocks_QUV, pattern):
    return product(x_MK, blocks_QUV, pattern), (x_MK, blocks_QUV, pattern)

  def backward(saved, g_MN):
    x_MK, blocks_QUV, pattern = saved
    return rows(g_MN, blocks_QUV, pattern.by_row(), transposed=True), weights(x_MK, g_MN, blocks_QUV, pattern), None

  product.defvjp(forward, backward)
  return product
