"""Low-precision products of experts in plain JAX: tiles of rows as in `ops.grouped_matmul.xla`, each of which is a product
of eight-bit numbers. A tile never has so many rows that their sum exceeds int32.

Beside the letters of matrices, S is the dimension that a product sums over, and P = M + block counts rows with padding."""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.grouped_matmul import grouped_matmul
from efficient_lm.ops.grouped_matmul.schedule import visits
from efficient_lm.ops.low_precision_matmul.rounding import FORMATS, noise, rounded, run_of_rows
from efficient_lm.ops.low_precision_matmul.xla import dot, product


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def matmul(x_MI, w_EIO, sizes_E, key, passes):
  """See the API."""
  if passes.forward is None: return grouped_matmul(x_MI, w_EIO, sizes_E)
  operand = FORMATS[passes.forward]
  return _rows(rounded(x_MI, 1, operand), rounded(w_EIO, 1, operand), 0, sizes_E, x_MI.dtype)


def _forward(x_MI, w_EIO, sizes_E, key, passes):
  return matmul(x_MI, w_EIO, sizes_E, key, passes), (x_MI, w_EIO, sizes_E, key)


def _backward(passes, saved, g_MO):
  x_MI, w_EIO, sizes_E, key = saved
  noise_MO = None if key is None else noise(key, g_MO.shape)
  if None in (passes.dgrad, passes.wgrad):
    dx_MI, dw_EIO = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_E), x_MI, w_EIO)[1](g_MO)
  if passes.dgrad is not None:
    matrices = rounded(w_EIO, 2, FORMATS[passes.dgrad])
    dx_MI = _rows(rounded(g_MO, 1, passes.dgrad, noise_MO), matrices, 1, sizes_E, x_MI.dtype)
  if passes.wgrad is not None: dw_EIO = _weights(x_MI, g_MO, sizes_E, passes.wgrad, noise_MO).astype(w_EIO.dtype)
  return dx_MI, dw_EIO, None, None


matmul.defvjp(_forward, _backward)


def _rows(rows, matrices, axis: int, sizes_E, dtype):
  """y_m = x_m @ w_e (axis 0) or x_m @ w_e^T (axis 1) for the group e of row m. `rows` and `matrices` are rounded values with
  their scales."""
  (x_MS, scale_M1), (w_E, scale_E) = rows, matrices
  (M, _), E, O = x_MS.shape, w_E.shape[0], w_E.shape[2 - axis]
  block = run_of_rows(M, E)
  plan = visits(sizes_E, M, block, tail=False)
  # Dynamic slices are moved back where they exceed the array; padding of one tile keeps every slice in place.
  x_PS, scale_P1 = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_MS, scale_M1))

  def tile(i, y_PO):
    e, row = plan.group[i], plan.row[i]
    x_tile, scale_tile = (lax.dynamic_slice_in_dim(a, row, block) for a in (x_PS, scale_P1))
    w, scale = (lax.dynamic_index_in_dim(a, e, keepdims=False) for a in (w_E, scale_E))
    y_tile = dot(x_tile, w, axis) * scale_tile * scale.reshape(1, -1)
    # The last tile of a group also covers rows of the next groups, whose own tiles are computed later and overwrite it.
    return lax.dynamic_update_slice_in_dim(y_PO, y_tile.astype(dtype), row, axis=0)

  y_PO = lax.fori_loop(0, plan.count, tile, jnp.zeros((M + block, O), dtype))
  return jnp.where(jnp.arange(M)[:, None] < jnp.sum(sizes_E), y_PO[:M], 0)


def _weights(x_MI, g_MO, sizes_E, format: str, noise_MO):
  """Float32 dw_e, the sum of x_m^T g_m over the rows m of group e. The rows of each tile have scales of their own."""
  (M, I), O, E = x_MI.shape, g_MO.shape[1], sizes_E.shape[0]
  block = run_of_rows(M, E)
  plan = visits(sizes_E, M, block, tail=False)
  padded = [None if a is None else jnp.pad(a, ((0, block), (0, 0))) for a in (x_MI, g_MO, noise_MO)]

  def tile(i, dw_EIO):
    e, inside = plan.group[i], jnp.arange(block)[:, None] < plan.high[i]
    x_tile, g_tile, noise_tile = (None if a is None else lax.dynamic_slice_in_dim(a, plan.row[i], block) for a in padded)
    # Both operands are masked, because a row outside may hold NaN, and 0 * NaN is NaN.
    x_tile, g_tile = jnp.where(inside, x_tile, 0), jnp.where(inside, g_tile, 0)
    dw_IO = product(x_tile, g_tile, (0, 0), (FORMATS[format], format), (None, noise_tile))
    dw_IO += lax.dynamic_index_in_dim(dw_EIO, e, keepdims=False)
    return lax.dynamic_update_index_in_dim(dw_EIO, dw_IO, e, axis=0)

  return lax.fori_loop(0, plan.count, tile, jnp.zeros((E, I, O), jnp.float32))
