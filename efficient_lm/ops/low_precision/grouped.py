"""Low-precision products of experts in plain JAX: tiles of rows as in `ops.grouped_matmul.xla`, each of them a product of
eight-bit numbers. A tile never holds more rows than an int32 sum can."""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.grouped_matmul import grouped_matmul
from efficient_lm.ops.grouped_matmul.schedule import visits
from efficient_lm.ops.low_precision.rounding import FORMATS, noise, rounded, run_of_rows
from efficient_lm.ops.low_precision.xla import dot, product


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def matmul(x_MK, w_EKN, sizes_E, key, passes):
  """See the API."""
  if passes.forward is None: return grouped_matmul(x_MK, w_EKN, sizes_E)
  operand = FORMATS[passes.forward]
  return _rows(rounded(x_MK, 1, operand), rounded(w_EKN, 1, operand), 0, sizes_E, x_MK.dtype)


def _forward(x_MK, w_EKN, sizes_E, key, passes):
  return matmul(x_MK, w_EKN, sizes_E, key, passes), (x_MK, w_EKN, sizes_E, key)


def _backward(passes, saved, g_MN):
  x_MK, w_EKN, sizes_E, key = saved
  noise_MN = None if key is None else noise(key, g_MN.shape)
  if None in (passes.dgrad, passes.wgrad):
    dx_MK, dw_EKN = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_E), x_MK, w_EKN)[1](g_MN)
  if passes.dgrad is not None:
    matrices = rounded(w_EKN, 2, FORMATS[passes.dgrad])
    dx_MK = _rows(rounded(g_MN, 1, passes.dgrad, noise_MN), matrices, 1, sizes_E, x_MK.dtype)
  if passes.wgrad is not None: dw_EKN = _weights(x_MK, g_MN, sizes_E, passes.wgrad, noise_MN).astype(w_EKN.dtype)
  return dx_MK, dw_EKN, None, None


matmul.defvjp(_forward, _backward)


def _rows(rows, matrices, axis: int, sizes_E, dtype):
  """y_m = x_m @ w_e (axis 0) or x_m @ w_e^T (axis 1) for the group e of row m, of rounded rows and matrices with scales."""
  (x_MS, scale_M1), (w_E, scale_E) = rows, matrices
  (M, _), E, N = x_MS.shape, w_E.shape[0], w_E.shape[2 - axis]
  block = run_of_rows(M, E)
  plan = visits(sizes_E, M, block, tail=False)
  # A slice near the end would be moved back to fit, and so would its rows: make room for the longest overhang.
  x_PS, scale_P1 = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_MS, scale_M1))

  def tile(i, y_PN):
    e, row = plan.group[i], plan.row[i]
    x_QS, scale_Q1 = (lax.dynamic_slice_in_dim(a, row, block) for a in (x_PS, scale_P1))
    w, scale = (lax.dynamic_index_in_dim(a, e, keepdims=False) for a in (w_E, scale_E))
    y_QN = dot(x_QS, w, axis) * scale_Q1 * scale.reshape(1, -1)
    # The last tile of a group reaches into the next ones, whose own tiles come later and overwrite it.
    return lax.dynamic_update_slice_in_dim(y_PN, y_QN.astype(dtype), row, axis=0)

  y_PN = lax.fori_loop(0, plan.count, tile, jnp.zeros((M + block, N), dtype))
  return jnp.where(jnp.arange(M)[:, None] < jnp.sum(sizes_E), y_PN[:M], 0)


def _weights(x_MK, g_MN, sizes_E, format: str, noise_MN):
  """Float32 dw_e, the sum of x_m^T g_m over the rows m of group e: each tile's rows rounded by themselves."""
  (M, K), N, E = x_MK.shape, g_MN.shape[1], sizes_E.shape[0]
  block = run_of_rows(M, E)
  plan = visits(sizes_E, M, block, tail=False)
  padded = [None if a is None else jnp.pad(a, ((0, block), (0, 0))) for a in (x_MK, g_MN, noise_MN)]

  def tile(i, dw_EKN):
    e, inside_Q1 = plan.group[i], jnp.arange(block)[:, None] < plan.high[i]
    x_QK, g_QN, noise_QN = (None if a is None else lax.dynamic_slice_in_dim(a, plan.row[i], block) for a in padded)
    # Both sides, because a row outside may hold NaN and 0 * NaN is NaN.
    x_QK, g_QN = jnp.where(inside_Q1, x_QK, 0), jnp.where(inside_Q1, g_QN, 0)
    dw_KN = product(x_QK, g_QN, (0, 0), (FORMATS[format], format), (None, noise_QN))
    dw_KN += lax.dynamic_index_in_dim(dw_EKN, e, keepdims=False)
    return lax.dynamic_update_index_in_dim(dw_EKN, dw_KN, e, axis=0)

  return lax.fori_loop(0, plan.count, tile, jnp.zeros((E, K, N), jnp.float32))
