"""Low-precision products as their equations: round, widen to float32, multiply."""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.low_precision.rounding import FORMATS, noise, rounded, run_of_rows

multiply = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def near(a, axis: int, format: str | None, noise=None):
  """[a]_axis as float32; a itself without a format."""
  if format is None: return a.astype(jnp.float32)
  values, scale = rounded(a, axis, format, noise)
  return values.astype(jnp.float32) * scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def matmul(x_MK, w_KN, key, passes, dtype):
  """y = [x]_K @ [w]_K."""
  operand = FORMATS.get(passes.forward)
  return multiply(near(x_MK, 1, operand), near(w_KN, 0, operand)).astype(dtype)


def _forward(x_MK, w_KN, key, passes, dtype):
  return matmul(x_MK, w_KN, key, passes, dtype), (x_MK, w_KN, key)


def _backward(passes, dtype, saved, g_MN):
  """dx = [g]_N @ [w]_N^T; dw = [x]_M^T @ [g]_M."""
  x_MK, w_KN, key = saved
  noise_MN = None if key is None else noise(key, g_MN.shape)
  dx_MK = multiply(near(g_MN, 1, passes.dgrad, noise_MN), near(w_KN, 1, FORMATS.get(passes.dgrad)).T)
  dw_KN = multiply(near(x_MK, 0, FORMATS.get(passes.wgrad)).T, near(g_MN, 0, passes.wgrad, noise_MN))
  return dx_MK.astype(x_MK.dtype), dw_KN.astype(w_KN.dtype), None


matmul.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def grouped_matmul(x_MK, w_EKN, sizes_E, key, passes):
  """y_m = [x_m]_K @ [w_e]_K for the group e of row m, 0 past the last group."""
  operand = FORMATS.get(passes.forward)
  x_MK, dtype = _inside(x_MK, sizes_E), x_MK.dtype
  y_EMN = multiply(near(x_MK, 1, operand), near(w_EKN, 1, operand))
  return jnp.einsum('EMN,EM->MN', y_EMN, _members(sizes_E, x_MK.shape[0])).astype(dtype)


def _grouped_forward(x_MK, w_EKN, sizes_E, key, passes):
  return grouped_matmul(x_MK, w_EKN, sizes_E, key, passes), (x_MK, w_EKN, sizes_E, key)


def _grouped_backward(passes, saved, g_MN):
  """dx_m = [g_m]_N @ [w_e]_N^T; dw_e = the sum over runs of rows of group e of [x]_run^T @ [g]_run."""
  x_MK, w_EKN, sizes_E, key = saved
  (M, _), (E, _, _) = x_MK.shape, w_EKN.shape
  noise_MN = None if key is None else noise(key, g_MN.shape)
  x, g, member_EM = _inside(x_MK, sizes_E), _inside(g_MN, sizes_E), _members(sizes_E, M)
  dx_EMK = multiply(near(g, 1, passes.dgrad, noise_MN), near(w_EKN, 2, FORMATS.get(passes.dgrad)).swapaxes(1, 2))
  start_E1 = (jnp.cumsum(sizes_E) - sizes_E)[:, None]
  run_EM = (jnp.arange(M) - start_E1) // run_of_rows(M, E)
  dw_EKN = 0
  for run in range(-(-M // run_of_rows(M, E))):
    for_rows = lambda a_MD: jnp.where(((run_EM == run) & (member_EM > 0))[..., None], a_MD, 0)
    x_EMK, g_EMN = near(for_rows(x), 1, FORMATS.get(passes.wgrad)), near(for_rows(g), 1, passes.wgrad, noise_MN)
    dw_EKN += multiply(x_EMK.swapaxes(1, 2), g_EMN)
  return jnp.einsum('EMK,EM->MK', dx_EMK, member_EM).astype(x_MK.dtype), dw_EKN.astype(w_EKN.dtype), None, None


grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


def _members(sizes_E, M: int):
  """1 where row m is of group e, else 0."""
  end_E1 = jnp.cumsum(sizes_E)[:, None]
  row_M = jnp.arange(M)
  return ((end_E1 - sizes_E[:, None] <= row_M) & (row_M < end_E1)).astype(jnp.float32)


def _inside(a_MD, sizes_E):
  """Zeros in the rows past the last group, which may hold anything."""
  return jnp.where(jnp.arange(a_MD.shape[0])[:, None] < jnp.sum(sizes_E), a_MD, 0)
