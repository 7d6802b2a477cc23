"""Low-precision products as their equations: operands are rounded, converted to float32 and multiplied."""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.low_precision_matmul.rounding import FORMATS, noise, rounded, run_of_rows

multiply = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def near(a, axis: int, format: str | None, noise=None):
  """[a]_axis as float32, or a without rounding if `format` is None."""
  if format is None: return a.astype(jnp.float32)
  values, scale = rounded(a, axis, format, noise)
  return values.astype(jnp.float32) * scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def matmul(x_MI, w_IO, key, passes, dtype):
  """y = [x]_I @ [w]_I."""
  operand = FORMATS.get(passes.forward)
  return multiply(near(x_MI, 1, operand), near(w_IO, 0, operand)).astype(dtype)


def _forward(x_MI, w_IO, key, passes, dtype):
  return matmul(x_MI, w_IO, key, passes, dtype), (x_MI, w_IO, key)


def _backward(passes, dtype, saved, g_MO):
  """dx = [g]_O @ [w]_O^T; dw = [x]_M^T @ [g]_M."""
  x_MI, w_IO, key = saved
  noise_MO = None if key is None else noise(key, g_MO.shape)
  dx_MI = multiply(near(g_MO, 1, passes.dgrad, noise_MO), near(w_IO, 1, FORMATS.get(passes.dgrad)).T)
  dw_IO = multiply(near(x_MI, 0, FORMATS.get(passes.wgrad)).T, near(g_MO, 0, passes.wgrad, noise_MO))
  return dx_MI.astype(x_MI.dtype), dw_IO.astype(w_IO.dtype), None


matmul.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def grouped_matmul(x_MI, w_EIO, sizes_E, key, passes):
  """y_m = [x_m]_I @ [w_e]_I for the group e of row m, and 0 for rows past the last group."""
  operand = FORMATS.get(passes.forward)
  x_MI, dtype = _inside(x_MI, sizes_E), x_MI.dtype
  y_EMO = multiply(near(x_MI, 1, operand), near(w_EIO, 1, operand))
  return jnp.einsum('EMO,EM->MO', y_EMO, _members(sizes_E, x_MI.shape[0])).astype(dtype)


def _grouped_forward(x_MI, w_EIO, sizes_E, key, passes):
  return grouped_matmul(x_MI, w_EIO, sizes_E, key, passes), (x_MI, w_EIO, sizes_E, key)


def _grouped_backward(passes, saved, g_MO):
  """dx_m = [g_m]_O @ [w_e]_O^T; dw_e = the sum over runs of rows of group e of [x]_run^T @ [g]_run."""
  x_MI, w_EIO, sizes_E, key = saved
  (M, _), (E, _, _) = x_MI.shape, w_EIO.shape
  noise_MO = None if key is None else noise(key, g_MO.shape)
  x, g, member_EM = _inside(x_MI, sizes_E), _inside(g_MO, sizes_E), _members(sizes_E, M)
  dx_EMI = multiply(near(g, 1, passes.dgrad, noise_MO), near(w_EIO, 2, FORMATS.get(passes.dgrad)).swapaxes(1, 2))
  start_E1 = (jnp.cumsum(sizes_E) - sizes_E)[:, None]
  run_EM = (jnp.arange(M) - start_E1) // run_of_rows(M, E)
  dw_EIO = 0
  for run in range(-(-M // run_of_rows(M, E))):
    for_rows = lambda a: jnp.where(((run_EM == run) & (member_EM > 0))[..., None], a, 0)
    x_EMI, g_EMO = near(for_rows(x), 1, FORMATS.get(passes.wgrad)), near(for_rows(g), 1, passes.wgrad, noise_MO)
    dw_EIO += multiply(x_EMI.swapaxes(1, 2), g_EMO)
  return jnp.einsum('EMI,EM->MI', dx_EMI, member_EM).astype(x_MI.dtype), dw_EIO.astype(w_EIO.dtype), None, None


grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


def _members(sizes_E, M: int):
  """1 where row m belongs to group e, 0 elsewhere."""
  end_E1 = jnp.cumsum(sizes_E)[:, None]
  row_M = jnp.arange(M)
  return ((end_E1 - sizes_E[:, None] <= row_M) & (row_M < end_E1)).astype(jnp.float32)


def _inside(a, sizes_E):
  """`a` with zeros in the rows past the last group, which may hold anything."""
  return jnp.where(jnp.arange(a.shape[0])[:, None] < jnp.sum(sizes_E), a, 0)
