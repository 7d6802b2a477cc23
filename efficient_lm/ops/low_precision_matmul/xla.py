"""Low-precision products in plain JAX, in the layout in which XLA multiplies eight-bit numbers fast.

XLA:CPU computes an int8 product at up to twice the speed of a float32 one if the summed dim is the last of the left operand.
If it is not, XLA converts both operands to int32 first, and reaches half the speed of float32 (4096 x 256 by 4096 x 768, two
cores). Therefore the left operand is transposed where its layout differs. The right operand may have either layout;
transposing it too takes longer than it saves. S is the dimension that a product sums over.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops import dispatch
from efficient_lm.ops.contract import contract
from efficient_lm.ops.low_precision_matmul.rounding import FORMATS, noise, rounded

LONGEST = 2 ** 17   # an int32 holds the sum of as many products of int8, each at most 127^2: 2^17 * 127^2 < 2^31


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def matmul(x_MI, w_IO, key, passes, dtype):
  """See the API."""
  if passes.forward is None: return contract('MI,IO->MO', x_MI, w_IO, dtype=dtype)
  operand = FORMATS[passes.forward]
  return product(x_MI, w_IO, (1, 0), (operand, operand)).astype(dtype)


def _forward(x_MI, w_IO, key, passes, dtype):
  return matmul(x_MI, w_IO, key, passes, dtype), (x_MI, w_IO, key)


def _backward(passes, dtype, saved, g_MO):
  x_MI, w_IO, key = saved
  noise_MO = None if key is None else noise(key, g_MO.shape)
  if None in (passes.dgrad, passes.wgrad):
    dx_MI, dw_IO = jax.vjp(lambda x, w: contract('MI,IO->MO', x, w, dtype=dtype), x_MI, w_IO)[1](g_MO)
  if passes.dgrad is not None:
    dx_MI = product(g_MO, w_IO, (1, 1), (passes.dgrad, FORMATS[passes.dgrad]), (noise_MO, None)).astype(x_MI.dtype)
  if passes.wgrad is not None:
    dw_IO = product(x_MI, g_MO, (0, 0), (FORMATS[passes.wgrad], passes.wgrad), (None, noise_MO)).astype(w_IO.dtype)
  return dx_MI, dw_IO, None


matmul.defvjp(_forward, _backward)


def product(a, b, axes: tuple[int, int], dtypes: tuple[str, str], noises=(None, None)):
  """The float32 product of two matrices that sums over dim axes[0] of a and dim axes[1] of b. Both are rounded to their
  dtypes along that dim first, with the noises if they are given."""
  num_runs = -(-a.shape[axes[0]] // LONGEST)
  if num_runs > 1:
    cut = lambda array, axis: None if array is None else _runs(array, axis, num_runs)
    operands = tuple(map(cut, (a, b), axes)), tuple(map(cut, noises, axes))
    return jnp.sum(jax.vmap(lambda pair, noises: product(*pair, axes, dtypes, noises))(*operands), axis=0)
  a_AS, scale_A1 = summed_last(a, axes[0], dtypes[0], noises[0])
  b, scale_b = rounded(b, axes[1], dtypes[1], noises[1])
  return dot(a_AS, b, axes[1]) * scale_A1 * scale_b.reshape(1, -1)


def summed_last(a, axis: int, dtype, noise=None):
  """`rounded` along the dim `axis`, which becomes the last: values (A, S) and scales (A, 1) for the A rows of the
  product."""
  if axis == 1: return rounded(a, axis, dtype, noise)
  if dispatch.device().platform != 'cpu': return map(jnp.transpose, rounded(a, axis, dtype, noise))
  # XLA:CPU would fuse the transposition of eight-bit numbers with their product, which is then no product of eight bits.
  return rounded(lax.optimization_barrier(a.T), 1, dtype, None if noise is None else noise.T)


def dot(a_AS, b, axis: int):
  """The float32 product that sums over a's last dim and b's dim `axis`. Integers are summed in int32, float8 numbers in
  float32; on a CPU these are converted to float32 first."""
  integers = jnp.issubdtype(a_AS.dtype, jnp.integer)
  if not integers and dispatch.device().may_be_cpu: a_AS, b = a_AS.astype(jnp.float32), b.astype(jnp.float32)
  dtype = jnp.int32 if integers else jnp.float32
  return lax.dot_general(a_AS, b, (((1,), (axis,)), ((), ())), preferred_element_type=dtype).astype(jnp.float32)


def _runs(array, axis: int, num: int):
  """(num, …): the array, padded with zeros, cut along `axis` into runs of equal length."""
  length = -(-array.shape[axis] // num)
  padding = [(0, num * length - size if dim == axis else 0) for dim, size in enumerate(array.shape)]
  shape = array.shape[:axis] + (num, length) + array.shape[axis + 1:]
  return jnp.moveaxis(jnp.pad(array, padding).reshape(shape), axis, 0)
