"""The grouped product as its equation, one group at a time: E times the work of an implementation."""
import jax.numpy as jnp

from efficient_lm.ops.quantized_matmul.storage import quantize_rows


def grouped_matmul(x_MK, w_EKN, sizes_E, scale_EN=None):
  """y_m = x_m @ w_e, times scale_e if there is one, for the group e that holds row m; 0 for a row past the last group."""
  end_E = jnp.cumsum(sizes_E)
  row_M1 = jnp.arange(x_MK.shape[0])[:, None]
  # Rows past the end may hold anything, NaN included, and 0 * NaN would reach the gradient of w: select, then multiply.
  x_MK = jnp.where(row_M1 < end_E[-1], x_MK, 0)
  y_MN = jnp.zeros((x_MK.shape[0], w_EKN.shape[-1]), x_MK.dtype)
  for e in range(w_EKN.shape[0]):
    inside_M1 = (end_E[e] - sizes_E[e] <= row_M1) & (row_M1 < end_E[e])
    # Numbers of eight bits are exact in any float that x may be.
    w_KN = w_EKN[e].astype(x_MK.dtype)
    y_e_MN = jnp.matmul(jnp.where(inside_M1, x_MK, 0), w_KN, precision='highest', preferred_element_type=jnp.float32)
    if scale_EN is not None: y_e_MN *= scale_EN[e]
    y_MN += jnp.where(inside_M1, y_e_MN, 0).astype(y_MN.dtype)
  return y_MN


def rounded(x_MK, w_EKN, sizes_E, scale_EN, activations: str):
  """The same of x rounded row by row."""
  q_MK, scale_M1 = quantize_rows(x_MK, jnp.dtype(activations))
  return grouped_matmul((q_MK.astype(jnp.float32) * scale_M1), w_EKN, sizes_E, scale_EN).astype(x_MK.dtype)
