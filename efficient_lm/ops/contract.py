"""The product of activations with a weight, in a form whose gradient needs no transposition on CPU.

The gradient of an einsum such as 'BTD,DF->BTF' by its weight sums over two dims, B and T. XLA:CPU transposes for that,
and moves the transposition into whatever elementwise operations came before, which then read memory across its rows.
The same product of two matrices sums over one dim, and no transposition is needed: a step of a
dense model of 10M parameters took 4.1 s with einsum and 3.0 s so (float32, medians of seven turns, one core free).
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops import dispatch


def contract(equation: str, x, w, *, dtype=None, implementation: str = 'auto'):
  """einsum(equation, x, w). Differentiable in x and w.

  Args:
    equation: such as 'BTD,DNH->BTNH'.
    x: activations.
    w: weight, in the dtype of x.
    dtype: of the result; that of x by default.
    implementation: 'auto', 'einsum' or 'matrix'. The last needs an equation that is a product of two matrices once dims
      are merged; 'auto' is that on CPU where it applies, and einsum elsewhere, where XLA transposes well by itself.
  """
  return dispatch.run('contract', IMPLEMENTATIONS, implementation, equation, x, w, jnp.dtype(dtype or x.dtype))


def _einsum(equation, x, w, dtype):
  return jnp.einsum(equation, x, w, preferred_element_type=dtype)


def _split(equation: str) -> tuple[str, str, str, str, str]:
  """Letters of x, w and the result, those summed over, and those that w gives to the result."""
  operands, result = equation.split('->')
  x_axes, w_axes = operands.split(',')
  summed = ''.join(letter for letter in w_axes if letter in x_axes)
  return x_axes, w_axes, result, summed, ''.join(letter for letter in w_axes if letter not in x_axes)


def is_matrix_product(equation: str) -> bool:
  """Whether einsum(equation, x, w) is one product of matrices, x's last letters being those summed over."""
  x_axes, w_axes, result, summed, new = _split(equation)
  rows = x_axes.removesuffix(summed)
  return (summed != '' and x_axes == rows + summed and result == rows + new and not set(rows) & set(w_axes)
          and w_axes in (summed + new, new + summed))


def _matrix(equation, x, w, dtype):
  _, w_axes, _, summed, new = _split(equation)
  rows, outputs = x.shape[:x.ndim - len(summed)], [w.shape[w_axes.index(letter)] for letter in new]
  K, N = math.prod(x.shape[x.ndim - len(summed):]), math.prod(outputs)
  M = math.prod(rows)
  if M == 1 and w_axes == new + summed and N % 2 == 0:
    return _halves(x.reshape(1, K), w.reshape(N, K), dtype).reshape(*rows, *outputs)
  w_KN = w.reshape(K, N) if w_axes == summed + new else w.reshape(N, K).T
  return _product(x.reshape(M, K), w_KN, dtype).reshape(*rows, *outputs)


def _halves(x_1K, w_NK, dtype):
  """x @ w^T as a batch of two, so that both threads of two read: XLA computes one product of a single row in one. With
  384 and 1024 outputs or inputs it then read 21 to 30 GB/s, before 12 to 26 (2 cores, weights larger than the cache)."""
  N, K = w_NK.shape
  halves = ((2,), (2,)), ((0,), (0,))
  y = lax.dot_general(jnp.broadcast_to(x_1K, (2, 1, K)), w_NK.reshape(2, N // 2, K), halves, preferred_element_type=dtype)
  return y.reshape(1, N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x_MK, w_KN, dtype):
  return _dot(x_MK, w_KN, 1, 0, dtype)


def _forward(x_MK, w_KN, dtype):
  return _product(x_MK, w_KN, dtype), (x_MK, w_KN)


def _backward(dtype, saved, g_MN):
  x_MK, w_KN = saved
  dx_MK = _dot(g_MN, w_KN, 1, 1, x_MK.dtype)
  # The narrower operand is transposed beforehand: XLA's product that reads its left operand down the columns is slower.
  # The barriers keep XLA from turning that back into the product of transposed operands.
  if x_MK.shape[1] <= w_KN.shape[1]: return dx_MK, _dot(lax.optimization_barrier(x_MK.T), g_MN, 1, 0, w_KN.dtype)
  return dx_MK, lax.optimization_barrier(_dot(lax.optimization_barrier(g_MN.T), x_MK, 1, 0, w_KN.dtype)).T


_product.defvjp(_forward, _backward)


def _dot(a, b, a_axis: int, b_axis: int, dtype):
  return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=dtype)


def _no_matrix_product(equation, *_) -> str:
  return '' if is_matrix_product(equation) else f'{equation!r} is no product of matrices'


IMPLEMENTATIONS = {
  'matrix': dispatch.Implementation(_matrix, auto=('cpu',), refuses=_no_matrix_product),
  'einsum': dispatch.Implementation(_einsum),
}
