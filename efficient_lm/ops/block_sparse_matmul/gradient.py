"""The gradient that the kernels of the block-sparse product share: two more products over the kept blocks."""
from collections.abc import Callable

import jax


def differentiable(rows: Callable, weights: Callable) -> Callable:
  """product(x_MI, blocks_ZUV, pattern) with its gradients by x and by the blocks.

  Args:
    rows: (x, blocks, sweep, transposed=) -> x times the blocks, swept by column, or times the transposed blocks, by row.
    weights: (x, g, blocks, pattern) -> the kept blocks of x^T g.
  """
  @jax.custom_vjp
  def product(x_MI, blocks_ZUV, pattern):
    return rows(x_MI, blocks_ZUV, pattern.by_column())

  def forward(x_MI, blocks_ZUV, pattern):
    return product(x_MI, blocks_ZUV, pattern), (x_MI, blocks_ZUV, pattern)

  def backward(saved, g_MO):
    x_MI, blocks_ZUV, pattern = saved
    return rows(g_MO, blocks_ZUV, pattern.by_row(), transposed=True), weights(x_MI, g_MO, blocks_ZUV, pattern), None

  product.defvjp(forward, backward)
  return product
