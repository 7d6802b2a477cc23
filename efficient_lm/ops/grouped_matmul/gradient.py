"""The three products of a layer of experts, joined: forward, and the gradients of x and of w."""
from collections.abc import Callable

import jax


def differentiable(rows: Callable, weights: Callable | None = None) -> Callable:
  """The grouped product (x_MK, w_EKN, sizes_E, scale_EN or None) -> y_MN with its gradients.

  Args:
    rows: (x, w, sizes, scale, transposed=False) -> y_m = x_m @ w_e * scale_e. With transposed=True its first argument is the
      gradient g_MN of y and it returns that of x: (g_m * scale_e) @ w_e^T.
    weights: (x_MK, g_MN, sizes_E) -> float dw_EKN, the sum of x_m^T g_m over the rows of each group. Weights that have a
      scale are frozen and do without.
  """
  @jax.custom_vjp
  def product(x_MK, w_EKN, sizes_E, scale_EN):
    return rows(x_MK, w_EKN, sizes_E, scale_EN)

  def forward(x_MK, w_EKN, sizes_E, scale_EN):
    saved = x_MK if scale_EN is None else None
    return product(x_MK, w_EKN, sizes_E, scale_EN), (saved, w_EKN, sizes_E, scale_EN)

  def backward(saved, g_MN):
    x_MK, w_EKN, sizes_E, scale_EN = saved
    dx_MK = rows(g_MN, w_EKN, sizes_E, scale_EN, transposed=True)
    dw_EKN = weights(x_MK, g_MN, sizes_E).astype(w_EKN.dtype) if scale_EN is None else None
    return dx_MK, dw_EKN, None, None

  product.defvjp(forward, backward)
  return product
