"""The product of activations with a weight, in a form whose gradient needs no transposition on CPU. Weights in floats
multiply by it in every model.

The gradient of an einsum such as 'BTD,DF->BTF' by its weight sums over two dims, B and T. XLA:CPU transposes operands for
that, and fuses the transposition with the elementwise operations before it, which then read memory across rows. The same
product of two matrices sums over one dim and needs no transposition: a train step of a dense model of 10M parameters took
4.1 s with einsum and 3.0 s with products of matrices (float32, medians of seven turns, one core free).
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
    implementation: 'auto', 'einsum' or 'matrix'. 'matrix' needs an equation that is a product of two matrices once dims are
      merged. 'auto' is 'matrix' on CPU where it applies, and 'einsum' elsewhere, where XLA handles transpositions well.
  """
  return dispatch.run('contract', IMPLEMENTATIONS, implementation, equation, x, w, jnp.dtype(dtype or x.dtype))


def _einsum(equation, x, w, dtype):
  return jnp.einsum(equation, x, w, preferred_element_type=dtype)


def _split(equation: str) -> tuple[str, str, str, str, str]:
  """The letters of x, of w and of the result, those that are summed over, and those that w contributes to the result."""
  operands, result = equation.split('->')
  x_axes, w_axes = operands.split(',')
  summed = ''.join(letter for letter in w_axes if letter in x_axes)
  return x_axes, w_axes, result, summed, ''.join(letter for letter in w_axes if letter not in x_axes)


def is_matrix_product(equation: str) -> bool:
  """Whether einsum(equation, x, w) is one product of matrices that sums over the last letters of x."""
  x_axes, w_axes, result, summed, new = _split(equation)
  rows = x_axes.removesuffix(summed)
  return (summed != '' and x_axes == rows + summed and result == rows + new and not set(rows) & set(w_axes)
          and w_axes in (summed + new, new + summed))


def _matrix(equation, x, w, dtype):
  _, w_axes, _, summed, new = _split(equation)
  rows, outputs = x.shape[:x.ndim - len(summed)], [w.shape[w_axes.index(letter)] for letter in new]
  I, O = math.prod(x.shape[x.ndim - len(summed):]), math.prod(outputs)
  M = math.prod(rows)
  if M == 1 and w_axes == new + summed and O % 2 == 0:
    return _halves(x.reshape(1, I), w.reshape(O, I), dtype).reshape(*rows, *outputs)
  w_IO = w.reshape(I, O) if w_axes == summed + new else w.reshape(O, I).T
  return _product(x.reshape(M, I), w_IO, dtype).reshape(*rows, *outputs)


def _halves(x_1I, w_OI, dtype):
  """x @ w^T as a batch of two products of half the outputs each, so that two threads read the weight: XLA computes the
  product of a single row in one thread. With 384 and 1024 outputs or inputs two threads read 21 to 30 GB/s, one 12 to 26 (2
  cores, weights larger than the cache)."""
  O, I = w_OI.shape
  halves = ((2,), (2,)), ((0,), (0,))
  y = lax.dot_general(jnp.broadcast_to(x_1I, (2, 1, I)), w_OI.reshape(2, O // 2, I), halves, preferred_element_type=dtype)
  return y.reshape(1, O)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x_MI, w_IO, dtype):
  return _dot(x_MI, w_IO, 1, 0, dtype)


def _forward(x_MI, w_IO, dtype):
  return _product(x_MI, w_IO, dtype), (x_MI, w_IO)


def _backward(dtype, saved, g_MO):
  x_MI, w_IO = saved
  dx_MI = _dot(g_MO, w_IO, 1, 1, x_MI.dtype)
  # The narrower operand is transposed beforehand, because XLA's product is slower where it reads its left operand down the
  # columns. The barriers keep XLA from merging the transposition with the product again.
  if x_MI.shape[1] <= w_IO.shape[1]: return dx_MI, _dot(lax.optimization_barrier(x_MI.T), g_MO, 1, 0, w_IO.dtype)
  return dx_MI, lax.optimization_barrier(_dot(lax.optimization_barrier(g_MO.T), x_MI, 1, 0, w_IO.dtype)).T


_product.defvjp(_forward, _backward)


def _dot(a, b, a_axis: int, b_axis: int, dtype):
  return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=dtype)


def _no_matrix_product(equation, *_) -> str:
  return '' if is_matrix_product(equation) else f'{equation!r} is no product of matrices'


IMPLEMENTATIONS = {
  'matrix': dispatch.Implementation(_matrix, auto=('cpu',), refuses=_no_matrix_product),
  'einsum': dispatch.Implementation(_einsum),
}
