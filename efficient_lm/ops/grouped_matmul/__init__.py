"""The product of a sparse mixture of experts: rows that follow each other share a matrix."""
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops import dispatch
from efficient_lm.ops.grouped_matmul import reference, xla


def grouped_matmul(x_MK, w_EKN, sizes_E, *, implementation: str = 'auto'):
  """y_MN[m] = x_MK[m] @ w_EKN[e] for the group e that holds row m. Differentiable in x and w.

  Args:
    x_MK: rows sorted by group: the first sizes_E[0] belong to group 0, and so on.
    w_EKN: one matrix a group, in the dtype of x.
    sizes_E: int32 rows of each group, any of them 0, with sum(sizes_E) <= M. A row past the sum may hold anything: its
      result is 0 and so is its gradient.
    implementation: 'auto', 'reference', 'xla' or 'ragged_dot'.

  Returns:
    y_MN, in the dtype of x, accumulated in float32.
  """
  return dispatch.run('grouped_matmul', IMPLEMENTATIONS, implementation, x_MK, w_EKN, sizes_E.astype(jnp.int32))


def _ragged_dot(x_MK, w_EKN, sizes_E):
  # What it leaves in the rows past the last group is the backend's choice.
  inside_M1 = jnp.arange(x_MK.shape[0])[:, None] < jnp.sum(sizes_E)
  y_MN = lax.ragged_dot(jnp.where(inside_M1, x_MK, 0), w_EKN, sizes_E, preferred_element_type=jnp.float32)
  return jnp.where(inside_M1, y_MN, 0).astype(x_MK.dtype)


IMPLEMENTATIONS = {
  # XLA has such a product on TPU only; elsewhere it expands ragged_dot to a dense product, E times the work.
  'ragged_dot': dispatch.Implementation(_ragged_dot, auto=('tpu',)),
  'xla': dispatch.Implementation(xla.grouped_matmul),
  'reference': dispatch.Implementation(reference.grouped_matmul),
}
