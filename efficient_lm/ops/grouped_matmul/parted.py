"""The grouped product with matrices as a CPU decodes: `ops.quantized_matmul.PartedMatrix`, in few bits or floats.

Few rows: a loop over the rows that exist, each of which is multiplied by the matrix of its group alone. XLA:CPU fuses the
choice of a matrix, what widens it, and the product, so that matrices of groups without rows are neither read nor widened,
and the time does not depend on the number of groups. Many rows: tiles as in `xla_scaled`, each by the product of one matrix
(`ops.quantized_matmul`), which holds a block of it in float32 at a time.
"""
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.grouped_matmul import xla_scaled
from efficient_lm.ops.grouped_matmul.schedule import visits
from efficient_lm.ops.quantized_matmul import PartedMatrix, quantized_matmul

FEW_ROWS = 16   # up to this number, and up to PER_GROUP for each group, rows are multiplied one by one
PER_GROUP = 2


def few_rows(x_MI, w: PartedMatrix, sizes_E, activations: str | None = None):
  """Row by row, as many as there are."""
  M, O = x_MI.shape[0], w.shape[-2]
  end_E = jnp.cumsum(sizes_E)
  group_M = jnp.searchsorted(end_E, jnp.arange(M), side='right')
  def row(m, y_MO):
    x_1I = lax.dynamic_slice_in_dim(x_MI, m, 1)
    y_1O = quantized_matmul(x_1I, w.at(group_M[m]), activations=activations)
    return lax.dynamic_update_slice_in_dim(y_MO, y_1O, m, axis=0)
  return lax.fori_loop(0, end_E[-1], row, jnp.zeros((M, O), x_MI.dtype))


def tiles(x_MI, w: PartedMatrix, sizes_E, activations: str | None = None):
  """Tile by tile of rows: see `xla_scaled`."""
  (M, _), (E, O, _) = x_MI.shape, w.shape
  block = xla_scaled.block_rows(M, E)
  plan = visits(sizes_E, M, block, tail=False)
  x_PI = jnp.pad(x_MI, ((0, block), (0, 0)))
  def tile(i, y_PO):
    x_tile = lax.dynamic_slice_in_dim(x_PI, plan.row[i], block)
    y_tile = quantized_matmul(x_tile, w.at(plan.group[i]), activations=activations)
    return lax.dynamic_update_slice_in_dim(y_PO, y_tile, plan.row[i], axis=0)
  y_PO = lax.fori_loop(0, plan.count, tile, jnp.zeros((M + block, O), x_MI.dtype))
  return jnp.where(jnp.arange(M)[:, None] < jnp.sum(sizes_E), y_PO[:M], 0)


def reference(x_MI, w: PartedMatrix, sizes_E, activations: str | None = None):
  """Every row by every matrix, of which its own counts."""
  row_M1, end_E = jnp.arange(x_MI.shape[0])[:, None], jnp.cumsum(sizes_E)
  x_MI, y_MO = jnp.where(row_M1 < end_E[-1], x_MI, 0), 0
  for e in range(w.shape[0]):
    inside_M1 = (end_E[e] - sizes_E[e] <= row_M1) & (row_M1 < end_E[e])
    y_MO += jnp.where(inside_M1, quantized_matmul(x_MI, w.at(e), activations=activations, implementation='reference'), 0)
  return y_MO


def too_many_rows(x_MI, w: PartedMatrix, sizes_E, activations: str | None = None) -> str:
  """Why rows are not multiplied one by one, or ''."""
  most = max(FEW_ROWS, PER_GROUP * w.shape[0])
  return f'{x_MI.shape[0]} rows are more than {most}' if x_MI.shape[0] > most else ''
