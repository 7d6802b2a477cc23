"""The grouped product as its equation, one group at a time, which takes E times the work of an implementation."""
import jax.numpy as jnp

from efficient_lm.ops.quantized_matmul.storage import quantize_rows


def grouped_matmul(x_MI, w_EIO, sizes_E, scale_EO=None):
  """y_m = x_m @ w_e, times scale_e if there is one, for the group e that holds row m; 0 for a row past the last group."""
  end_E = jnp.cumsum(sizes_E)
  row_M1 = jnp.arange(x_MI.shape[0])[:, None]
  # Rows past the end may hold NaN, and 0 * NaN would reach the gradient of w: rows are selected before the product.
  x_MI = jnp.where(row_M1 < end_E[-1], x_MI, 0)
  y_MO = jnp.zeros((x_MI.shape[0], w_EIO.shape[-1]), x_MI.dtype)
  for e in range(w_EIO.shape[0]):
    inside_M1 = (end_E[e] - sizes_E[e] <= row_M1) & (row_M1 < end_E[e])
    # Numbers of eight bits are exact in every float dtype that x may have.
    w_IO = w_EIO[e].astype(x_MI.dtype)
    y_e_MO = jnp.matmul(jnp.where(inside_M1, x_MI, 0), w_IO, precision='highest', preferred_element_type=jnp.float32)
    if scale_EO is not None: y_e_MO *= scale_EO[e]
    y_MO += jnp.where(inside_M1, y_e_MO, 0).astype(y_MO.dtype)
  return y_MO


def rounded(x_MI, w_EIO, sizes_E, scale_EO, activations: str):
  """The grouped product of x, each row of which is rounded first."""
  q_MI, scale_M1 = quantize_rows(x_MI, jnp.dtype(activations))
  return grouped_matmul((q_MI.astype(jnp.float32) * scale_M1), w_EIO, sizes_E, scale_EO).astype(x_MI.dtype)
