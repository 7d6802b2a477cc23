"""The product of a sparse mixture of experts: rows that follow each other share a matrix."""
import jax.numpy as jnp
from jax import lax

from efficient_lm.lazy import lazy
from efficient_lm.ops import dispatch, mosaic
from efficient_lm.ops.grouped_matmul import reference, xla, xla_scaled

pallas_blackwell = lazy('efficient_lm.ops.grouped_matmul.pallas_blackwell')
pallas_gpu = lazy('efficient_lm.ops.grouped_matmul.pallas_gpu')
pallas_tpu = lazy('efficient_lm.ops.grouped_matmul.pallas_tpu')


def grouped_matmul(x_MK, w_EKN, sizes_E, scale_EN=None, *, activations: str | None = None, implementation: str = 'auto',
                   tiles=None):
  """y_MN[m] = x_MK[m] @ w_EKN[e] for the group e that holds row m. Differentiable in x and w.

  With `scale_EN` the weights are quantized, w_EKN[e] * scale_EN[e] is meant, and both are frozen: the gradient of x alone
  is defined.

  Args:
    x_MK: rows sorted by group: the first sizes_E[0] belong to group 0, and so on.
    w_EKN: one matrix a group, in the dtype of x; int8 or float8_e4m3fn if there is a scale.
    sizes_E: int32 rows of each group, any of them 0, with sum(sizes_E) <= M. A row past the sum may hold anything: its
      result is 0 and so is its gradient.
    scale_EN: float scale of each output of each group's matrix, or None. Products of x and w are summed unscaled.
    activations: with a scale, 'int8' for int8 weights or 'float8_e4m3fn' for float8 ones first rounds each row of x to a
      grid that just holds its largest magnitude, so that numbers of eight bits are multiplied. The gradient of x is that
      without rounding. There are no kernels for it: 'auto', 'xla' or 'reference'.
    implementation: 'auto', 'reference', 'xla', 'ragged_dot', 'pallas_tpu', 'pallas_gpu' or 'pallas_blackwell'.
    tiles: for a kernel: `tiles.TpuTiles`, `GpuTiles` or `BlackwellTiles` for each of its passes, in place of tuned ones.

  Returns:
    y_MN, in the dtype of x, accumulated in float32.
  """
  options = {} if tiles is None else {'tiles': tiles}
  if scale_EN is not None: w_EKN, scale_EN = lax.stop_gradient((w_EKN, scale_EN))
  if activations is not None:
    if scale_EN is None or w_EKN.dtype != jnp.dtype(activations):
      raise ValueError(f'activations={activations!r} with matrices of {w_EKN.dtype}: both must be the same, and have scales')
    return dispatch.run('rounded_grouped_matmul', ROUNDED, implementation, x_MK, w_EKN, sizes_E.astype(jnp.int32), scale_EN,
                        activations)
  return dispatch.run('grouped_matmul', IMPLEMENTATIONS, implementation, x_MK, w_EKN, sizes_E.astype(jnp.int32), scale_EN,
                      **options)


def _xla(x_MK, w_EKN, sizes_E, scale_EN):
  if scale_EN is None: return xla.grouped_matmul(x_MK, w_EKN, sizes_E)
  return xla_scaled.grouped_matmul(x_MK, w_EKN, sizes_E, scale_EN)


def _ragged_dot(x_MK, w_EKN, sizes_E, scale_EN):
  # What it leaves in the rows past the last group is the backend's choice.
  inside_M1 = jnp.arange(x_MK.shape[0])[:, None] < jnp.sum(sizes_E)
  y_MN = lax.ragged_dot(jnp.where(inside_M1, x_MK, 0), w_EKN, sizes_E, preferred_element_type=jnp.float32)
  return jnp.where(inside_M1, y_MN, 0).astype(x_MK.dtype)


def _without_tiles(x_MK, w_EKN, sizes_E, scale_EN, tiles=None) -> str:
  return '' if tiles is None else 'it has no tiles to choose'


def _without_scale(x_MK, w_EKN, sizes_E, scale_EN, tiles=None) -> str:
  return 'it takes no scales' if scale_EN is not None else _without_tiles(x_MK, w_EKN, sizes_E, scale_EN, tiles)


# The kernels lead where they run because they move least: rows past the groups cost them no pass of their own. Nothing has
# been measured on those devices yet.
IMPLEMENTATIONS = {
  'pallas_gpu': mosaic.kernel(pallas_gpu, 'grouped_matmul', 'hopper'),
  'pallas_blackwell': mosaic.kernel(pallas_blackwell, 'grouped_matmul', 'blackwell'),
  'pallas_tpu': mosaic.kernel(pallas_tpu, 'grouped_matmul', 'tpu'),
  # XLA has such a product on TPU only; elsewhere it expands ragged_dot to a dense product, E times the work.
  'ragged_dot': dispatch.Implementation(_ragged_dot, auto=('tpu',), refuses=_without_scale),
  'xla': dispatch.Implementation(_xla, refuses=_without_tiles),
  'reference': dispatch.Implementation(reference.grouped_matmul, refuses=_without_tiles),
}
ROUNDED = {'xla': dispatch.Implementation(xla_scaled.rounded), 'reference': dispatch.Implementation(reference.rounded)}
