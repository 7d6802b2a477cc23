"""Low-precision products in plain JAX, laid out as XLA multiplies eight-bit numbers fast.

XLA:CPU runs an int8 product at up to twice the speed of a float32 one if the summed dim is the last of the left operand, and
widens both to int32 first if it is not, at half that speed (4096 x 256 by 4096 x 768, two cores). So the left operand
is turned where it lies otherwise; the right one may lie either way, and turning it too takes longer than it saves.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops import dispatch
from efficient_lm.ops.contract import contract
from efficient_lm.ops.low_precision.rounding import FORMATS, noise, rounded

LONGEST = 2 ** 17   # as many products of int8, 127^2 at most, fit into an int32: 2^17 * 127^2 < 2^31


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def matmul(x_MK, w_KN, key, passes, dtype):
  """See the API."""
  if passes.forward is None: return contract('MK,KN->MN', x_MK, w_KN, dtype=dtype)
  operand = FORMATS[passes.forward]
  return product(x_MK, w_KN, (1, 0), (operand, operand)).astype(dtype)


def _forward(x_MK, w_KN, key, passes, dtype):
  return matmul(x_MK, w_KN, key, passes, dtype), (x_MK, w_KN, key)


def _backward(passes, dtype, saved, g_MN):
  x_MK, w_KN, key = saved
  noise_MN = None if key is None else noise(key, g_MN.shape)
  if None in (passes.dgrad, passes.wgrad):
    dx_MK, dw_KN = jax.vjp(lambda x, w: contract('MK,KN->MN', x, w, dtype=dtype), x_MK, w_KN)[1](g_MN)
  if passes.dgrad is not None:
    dx_MK = product(g_MN, w_KN, (1, 1), (passes.dgrad, FORMATS[passes.dgrad]), (noise_MN, None)).astype(x_MK.dtype)
  if passes.wgrad is not None:
    dw_KN = product(x_MK, g_MN, (0, 0), (FORMATS[passes.wgrad], passes.wgrad), (None, noise_MN)).astype(w_KN.dtype)
  return dx_MK, dw_KN, None


matmul.defvjp(_forward, _backward)


def product(a, b, axes: tuple[int, int], dtypes: tuple[str, str], noises=(None, None)):
  """Float32 (A, B): the sum over a's dim axes[0] and b's dim axes[1] of both, rounded along it to their dtypes."""
  num_runs = -(-a.shape[axes[0]] // LONGEST)
  if num_runs > 1:
    cut = lambda array, axis: None if array is None else _runs(array, axis, num_runs)
    operands = tuple(map(cut, (a, b), axes)), tuple(map(cut, noises, axes))
    return jnp.sum(jax.vmap(lambda pair, noises: product(*pair, axes, dtypes, noises))(*operands), axis=0)
  a_AS, scale_A1 = summed_last(a, axes[0], dtypes[0], noises[0])
  b, scale_b = rounded(b, axes[1], dtypes[1], noises[1])
  return dot(a_AS, b, axes[1]) * scale_A1 * scale_b.reshape(1, -1)


def summed_last(a, axis: int, dtype, noise=None):
  """`rounded` along the dim `axis`, which becomes the last: values (A, S) and scales (A, 1)."""
  if axis == 1: return rounded(a, axis, dtype, noise)
  if dispatch.device().platform != 'cpu': return map(jnp.transpose, rounded(a, axis, dtype, noise))
  # XLA:CPU takes eight-bit numbers that are turned into the product, which then is none of eight bits: turned before.
  return rounded(lax.optimization_barrier(a.T), 1, dtype, None if noise is None else noise.T)


def dot(a_AS, b, axis: int):
  """The sum over a's last dim and b's dim `axis` in float32: integers are summed in int32, float8 in float32, which a CPU
  widens them to first."""
  integers = jnp.issubdtype(a_AS.dtype, jnp.integer)
  if not integers and dispatch.device().platform == 'cpu': a_AS, b = a_AS.astype(jnp.float32), b.astype(jnp.float32)
  dtype = jnp.int32 if integers else jnp.float32
  return lax.dot_general(a_AS, b, (((1,), (axis,)), ((), ())), preferred_element_type=dtype).astype(jnp.float32)


def _runs(array, axis: int, num: int):
  """(num, …): the array cut along `axis` into runs of one length, after zeros are added at its end."""
  length = -(-array.shape[axis] // num)
  padding = [(0, num * length - size if dim == axis else 0) for dim, size in enumerate(array.shape)]
  shape = array.shape[:axis] + (num, length) + array.shape[axis + 1:]
  return jnp.moveaxis(jnp.pad(array, padding).reshape(shape), axis, 0)
