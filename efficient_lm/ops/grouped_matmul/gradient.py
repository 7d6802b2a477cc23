"""The grouped product of kernels with its gradients: forward, by x and by w."""
from collections.abc import Callable

import jax


def differentiable(rows: Callable, weights: Callable | None = None) -> Callable:
  """The grouped product (x_MI, w_EIO, sizes_E, scale_EO or None) -> y_MO with its gradients.

  Args:
    rows: (x, w, sizes, scale, transposed=False) -> y_m = x_m @ w_e * scale_e. With transposed=True its first argument is the
      gradient g_MO by y, and it returns the gradient by x: (g_m * scale_e) @ w_e^T.
    weights: (x_MI, g_MO, sizes_E) -> float dw_EIO, the sum of x_m^T g_m over the rows of each group. It is not needed if
      weights have scales, because they are frozen then.
  """
  @jax.custom_vjp
  def product(x_MI, w_EIO, sizes_E, scale_EO):
    return rows(x_MI, w_EIO, sizes_E, scale_EO)

  def forward(x_MI, w_EIO, sizes_E, scale_EO):
    saved = x_MI if scale_EO is None else None
    return product(x_MI, w_EIO, sizes_E, scale_EO), (saved, w_EIO, sizes_E, scale_EO)

  def backward(saved, g_MO):
    x_MI, w_EIO, sizes_E, scale_EO = saved
    dx_MI = rows(g_MO, w_EIO, sizes_E, scale_EO, transposed=True)
    dw_EIO = weights(x_MI, g_MO, sizes_E).astype(w_EIO.dtype) if scale_EO is None else None
    return dx_MI, dw_EIO, None, None

  product.defvjp(forward, backward)
  return product
