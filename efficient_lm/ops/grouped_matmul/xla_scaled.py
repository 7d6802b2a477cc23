"""The grouped product with frozen weights of eight bits and their scales, in plain JAX, on any backend.

As in `xla`, tiles of rows are visited in order and each is a small dense product; here the matrix of a tile's group is
widened to the dtype of x as the tile needs it, so no copy of all weights ever exists. Every number of eight bits is exact
in bfloat16 and float32. Forward, the scales multiply the float32 sums. In the gradient of x they belong to what is summed
over and so multiply its rows before the product, where they are rounded to the dtype of x once.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops import dispatch
from efficient_lm.ops.grouped_matmul.gradient import differentiable
from efficient_lm.ops.grouped_matmul.schedule import visits
from efficient_lm.ops.quantized_matmul.storage import quantize_rows


def grouped_matmul(x_MK, w_EKN, sizes_E, scale_EN):
  """y_m = x_m @ w_e * scale_e for the group e that holds row m, and 0 for a row past the last group; see the API."""
  return differentiable(_rows)(x_MK, w_EKN, sizes_E, scale_EN)


def block_rows(M: int, E: int) -> int:
  """Rows of a tile: about those of an average group. Long ones are worth it: each tile widens a whole matrix."""
  return min(max(8, 2 ** round(math.log2(max(M / E, 1)))), 512)


def _rows(x_MK, w_EKN, sizes_E, scale_EN, transposed: bool = False):
  """y_m = x_m @ w_e * scale_e, or (x_m * scale_e) @ w_e^T if `transposed`."""
  (M, _), N = x_MK.shape, w_EKN.shape[1 if transposed else 2]
  block = block_rows(M, w_EKN.shape[0])
  plan = visits(sizes_E, M, block, tail=False)
  # A slice near the end would be moved back to fit, and so would its rows: make room for the longest overhang.
  x_PK = jnp.pad(x_MK, ((0, block), (0, 0)))
  contract = ((1,), (1 if transposed else 0,)), ((), ())

  def tile(i, y_PN):
    e, row = plan.group[i], plan.row[i]
    x_QK = lax.dynamic_slice_in_dim(x_PK, row, block)
    w_KN = lax.dynamic_index_in_dim(w_EKN, e, keepdims=False).astype(x_MK.dtype)
    scale_N = lax.dynamic_index_in_dim(scale_EN, e, keepdims=False).astype(jnp.float32)
    if transposed: x_QK = (x_QK * scale_N).astype(x_MK.dtype)
    y_QN = lax.dot_general(x_QK, w_KN, contract, preferred_element_type=jnp.float32)
    if not transposed: y_QN *= scale_N
    # The last tile of a group reaches into the next ones, whose own tiles come later and overwrite it.
    return lax.dynamic_update_slice_in_dim(y_PN, y_QN.astype(y_PN.dtype), row, axis=0)

  y_PN = lax.fori_loop(0, plan.count, tile, jnp.zeros((M + block, N), x_MK.dtype))
  return jnp.where(jnp.arange(M)[:, None] < jnp.sum(sizes_E), y_PN[:M], 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def rounded(x_MK, w_EKN, sizes_E, scale_EN, activations: str):
  """The same of rows that are rounded to the dtype `activations` first: integers are summed in int32. The gradient of x is
  that without rounding."""
  (M, _), N = x_MK.shape, w_EKN.shape[2]
  block = block_rows(M, w_EKN.shape[0])
  plan = visits(sizes_E, M, block, tail=False)
  q_PK, scale_P1 = (jnp.pad(a, ((0, block), (0, 0))) for a in quantize_rows(x_MK, jnp.dtype(activations)))
  integers = jnp.issubdtype(q_PK.dtype, jnp.integer)
  # XLA:CPU has no product of float8; widened it is exact.
  widened = (lambda a: a) if integers or dispatch.device().platform != 'cpu' else (lambda a: a.astype(jnp.float32))

  def tile(i, y_PN):
    e, row = plan.group[i], plan.row[i]
    q_QK, scale_Q1 = (lax.dynamic_slice_in_dim(a, row, block) for a in (q_PK, scale_P1))
    w_KN, scale_N = (lax.dynamic_index_in_dim(a, e, keepdims=False) for a in (w_EKN, scale_EN))
    y_QN = lax.dot_general(widened(q_QK), widened(w_KN), (((1,), (0,)), ((), ())),
                           preferred_element_type=jnp.int32 if integers else jnp.float32)
    y_QN = y_QN.astype(jnp.float32) * scale_Q1 * scale_N
    return lax.dynamic_update_slice_in_dim(y_PN, y_QN.astype(y_PN.dtype), row, axis=0)

  y_PN = lax.fori_loop(0, plan.count, tile, jnp.zeros((M + block, N), x_MK.dtype))
  return jnp.where(jnp.arange(M)[:, None] < jnp.sum(sizes_E), y_PN[:M], 0)


def _rounded_forward(x_MK, w_EKN, sizes_E, scale_EN, activations):
  return rounded(x_MK, w_EKN, sizes_E, scale_EN, activations), (w_EKN, sizes_E, scale_EN)


def _rounded_backward(activations, saved, g_MN):
  return _rows(g_MN, *saved, transposed=True), None, None, None


rounded.defvjp(_rounded_forward, _rounded_backward)
