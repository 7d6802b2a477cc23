"""The product of a mixture of experts: successive rows share a matrix.

The experts of every mixture multiply by it, with weights in floats or in eight bits.
"""
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops import dispatch, mosaic
from efficient_lm.ops.grouped_matmul import parted, reference, xla, xla_scaled
from efficient_lm.ops.quantized_matmul import PartedMatrix


def grouped_matmul(x_MI, w_EIO, sizes_E, scale_EO=None, *, activations: str | None = None, implementation: str = 'auto',
                   tiles=None):
  """y_MO[m] = x_MI[m] @ w_EIO[e] for the group e that holds row m. Differentiable in x and w.

  With `scale_EO` the weights are quantized: the matrix of a group is w_EIO[e] * scale_EO[e]. Both are frozen, and only x has
  a gradient.

  Args:
    x_MI: rows sorted by group: the first sizes_E[0] belong to group 0, and so on.
    w_EIO: one matrix a group, in the dtype of x; int8 or float8_e4m3fn if there is a scale. Or a `PartedMatrix`, of which E
      are stacked: few bits, with scales of its own, or floats, outputs first, as a CPU decodes. Its implementations are
      those of PARTED; they are not meant to be differentiated.
    sizes_E: int32 rows of each group, any of which may be 0, with sum(sizes_E) <= M. A row past the sum may hold anything:
      its result and its gradient are 0.
    scale_EO: float scale of each output of each group's matrix, or None. Products of x and w are summed before scaling.
    activations: None, or with a scale 'int8' for int8 weights or 'float8_e4m3fn' for float8 weights: first rounds each row
      of x by absmax, so that numbers of eight bits are multiplied. The gradient of x is that without rounding. There are no
      kernels for it: the implementation must be 'auto', 'xla' or 'reference'.
    implementation: 'auto', 'reference', 'xla', 'ragged_dot', 'pallas_tpu', 'pallas_gpu' or 'pallas_blackwell'.
    tiles: `tiles.TpuTiles`, `GpuTiles` or `BlackwellTiles` for each pass of a kernel, in place of the tuned ones.

  Returns:
    y_MO, in the dtype of x, accumulated in float32.

  Raises:
    ValueError: `activations` is not the dtype of the weights, or there is no scale; or see `dispatch.run`.
  """
  if isinstance(w_EIO, PartedMatrix):
    return dispatch.run('grouped_matmul', PARTED, implementation, x_MI, w_EIO, sizes_E.astype(jnp.int32), activations)
  options = {} if tiles is None else {'tiles': tiles}
  if scale_EO is not None: w_EIO, scale_EO = lax.stop_gradient((w_EIO, scale_EO))
  if activations is not None:
    if scale_EO is None or w_EIO.dtype != jnp.dtype(activations):
      raise ValueError(f'activations={activations!r} with matrices of {w_EIO.dtype}: both must be the same, and have scales')
    return dispatch.run('rounded_grouped_matmul', ROUNDED, implementation, x_MI, w_EIO, sizes_E.astype(jnp.int32), scale_EO,
                        activations)
  return dispatch.run('grouped_matmul', IMPLEMENTATIONS, implementation, x_MI, w_EIO, sizes_E.astype(jnp.int32), scale_EO,
                      **options)


def _xla(x_MI, w_EIO, sizes_E, scale_EO):
  if scale_EO is None: return xla.grouped_matmul(x_MI, w_EIO, sizes_E)
  return xla_scaled.grouped_matmul(x_MI, w_EIO, sizes_E, scale_EO)


def _ragged_dot(x_MI, w_EIO, sizes_E, scale_EO):
  # The backends leave different numbers in the rows past the last group.
  inside_M1 = jnp.arange(x_MI.shape[0])[:, None] < jnp.sum(sizes_E)
  y_MO = lax.ragged_dot(jnp.where(inside_M1, x_MI, 0), w_EIO, sizes_E, preferred_element_type=jnp.float32)
  return jnp.where(inside_M1, y_MO, 0).astype(x_MI.dtype)


def _without_tiles(x_MI, w_EIO, sizes_E, scale_EO, tiles=None) -> str:
  return '' if tiles is None else 'it has no tiles to choose'


def _without_scale(x_MI, w_EIO, sizes_E, scale_EO, tiles=None) -> str:
  return 'it takes no scales' if scale_EO is not None else _without_tiles(x_MI, w_EIO, sizes_E, scale_EO, tiles)


def _pallas_blackwell():
  from efficient_lm.ops.grouped_matmul import pallas_blackwell
  return pallas_blackwell


def _pallas_gpu():
  from efficient_lm.ops.grouped_matmul import pallas_gpu
  return pallas_gpu


def _pallas_tpu():
  from efficient_lm.ops.grouped_matmul import pallas_tpu
  return pallas_tpu


# The kernels come first where they run, because they move the least memory: rows past the groups need no extra pass. Nothing
# has been measured on those devices yet.
IMPLEMENTATIONS = {
  'pallas_gpu': mosaic.kernel(_pallas_gpu, 'grouped_matmul', 'hopper'),
  'pallas_blackwell': mosaic.kernel(_pallas_blackwell, 'grouped_matmul', 'blackwell'),
  'pallas_tpu': mosaic.kernel(_pallas_tpu, 'grouped_matmul', 'tpu'),
  # XLA has a grouped product on TPU only; elsewhere it expands ragged_dot to a dense product of E times the work.
  'ragged_dot': dispatch.Implementation(_ragged_dot, auto=('tpu',), refuses=_without_scale),
  'xla': dispatch.Implementation(_xla, refuses=_without_tiles),
  'reference': dispatch.Implementation(reference.grouped_matmul, refuses=_without_tiles),
}
ROUNDED = {'xla': dispatch.Implementation(xla_scaled.rounded), 'reference': dispatch.Implementation(reference.rounded)}
PARTED = {
  'rows': dispatch.Implementation(parted.few_rows, refuses=parted.too_many_rows),
  'tiles': dispatch.Implementation(parted.tiles),
  'reference': dispatch.Implementation(parted.reference),
}
