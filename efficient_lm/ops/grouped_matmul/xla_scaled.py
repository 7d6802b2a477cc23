"""The grouped product with frozen weights of eight bits and their scales, in plain JAX, on any backend.

As in `xla`, tiles of rows are computed in order, each by a small dense product. The matrix of a tile's group is converted to
the dtype of x for each tile, so that no copy of all weights ever exists. Numbers of eight bits are exact in bfloat16 and
float32. In the forward product the scales multiply the float32 sums. In the gradient of x their dimension is summed over, so
that they multiply the rows before the product, which are then rounded to the dtype of x once.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops import dispatch
from efficient_lm.ops.grouped_matmul.gradient import differentiable
from efficient_lm.ops.grouped_matmul.schedule import UNKNOWN_ROWS, visits
from efficient_lm.ops.quantized_matmul.storage import quantize_rows


def grouped_matmul(x_MI, w_EIO, sizes_E, scale_EO):
  """y_m = x_m @ w_e * scale_e for the group e that holds row m, and 0 for a row past the last group; see the API."""
  return differentiable(_rows)(x_MI, w_EIO, sizes_E, scale_EO)


def block_rows(M: int, E: int) -> int:
  """Rows of a tile: about as many as an average group has. Tiles are longer than in `xla`, because each converts a whole
  matrix."""
  if not isinstance(M, int): return UNKNOWN_ROWS
  return min(max(8, 2 ** round(math.log2(max(M / E, 1)))), 512)


def _rows(x_MI, w_EIO, sizes_E, scale_EO, transposed: bool = False):
  """y_m = x_m @ w_e * scale_e, or (x_m * scale_e) @ w_e^T if `transposed`."""
  (M, _), O = x_MI.shape, w_EIO.shape[1 if transposed else 2]
  block = block_rows(M, w_EIO.shape[0])
  plan = visits(sizes_E, M, block, tail=False)
  # Dynamic slices are moved back where they exceed the array; padding of one tile keeps every slice in place.
  x_PI = jnp.pad(x_MI, ((0, block), (0, 0)))
  contract = ((1,), (1 if transposed else 0,)), ((), ())

  def tile(i, y_PO):
    e, row = plan.group[i], plan.row[i]
    x_tile = lax.dynamic_slice_in_dim(x_PI, row, block)
    w_IO = lax.dynamic_index_in_dim(w_EIO, e, keepdims=False).astype(x_MI.dtype)
    scale_O = lax.dynamic_index_in_dim(scale_EO, e, keepdims=False).astype(jnp.float32)
    if transposed: x_tile = (x_tile * scale_O).astype(x_MI.dtype)
    y_tile = lax.dot_general(x_tile, w_IO, contract, preferred_element_type=jnp.float32)
    if not transposed: y_tile *= scale_O
    # The last tile of a group also covers rows of the next groups, whose own tiles are computed later and overwrite it.
    return lax.dynamic_update_slice_in_dim(y_PO, y_tile.astype(y_PO.dtype), row, axis=0)

  y_PO = lax.fori_loop(0, plan.count, tile, jnp.zeros((M + block, O), x_MI.dtype))
  return jnp.where(jnp.arange(M)[:, None] < jnp.sum(sizes_E), y_PO[:M], 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def rounded(x_MI, w_EIO, sizes_E, scale_EO, activations: str):
  """The product of rows that are rounded to the dtype `activations` first; integers are summed in int32. The gradient of x
  is that without rounding."""
  (M, _), O = x_MI.shape, w_EIO.shape[2]
  block = block_rows(M, w_EIO.shape[0])
  plan = visits(sizes_E, M, block, tail=False)
  q_PI, scale_P1 = (jnp.pad(a, ((0, block), (0, 0))) for a in quantize_rows(x_MI, jnp.dtype(activations)))
  integers = jnp.issubdtype(q_PI.dtype, jnp.integer)
  # XLA:CPU has no product of float8 numbers, which are exact in float32.
  widened = (lambda a: a) if integers or not dispatch.device().may_be_cpu else (lambda a: a.astype(jnp.float32))

  def tile(i, y_PO):
    e, row = plan.group[i], plan.row[i]
    q_tile, scale_tile = (lax.dynamic_slice_in_dim(a, row, block) for a in (q_PI, scale_P1))
    w_IO, scale_O = (lax.dynamic_index_in_dim(a, e, keepdims=False) for a in (w_EIO, scale_EO))
    y_tile = lax.dot_general(widened(q_tile), widened(w_IO), (((1,), (0,)), ((), ())),
                           preferred_element_type=jnp.int32 if integers else jnp.float32)
    y_tile = y_tile.astype(jnp.float32) * scale_tile * scale_O
    return lax.dynamic_update_slice_in_dim(y_PO, y_tile.astype(y_PO.dtype), row, axis=0)

  y_PO = lax.fori_loop(0, plan.count, tile, jnp.zeros((M + block, O), x_MI.dtype))
  return jnp.where(jnp.arange(M)[:, None] < jnp.sum(sizes_E), y_PO[:M], 0)


def _rounded_forward(x_MI, w_EIO, sizes_E, scale_EO, activations):
  return rounded(x_MI, w_EIO, sizes_E, scale_EO, activations), (w_EIO, sizes_E, scale_EO)


def _rounded_backward(activations, saved, g_MO):
  return _rows(g_MO, *saved, transposed=True), None, None, None


rounded.defvjp(_rounded_forward, _rounded_backward)
