"""Products for training in eight bits: the forward pass and both gradients, each rounded or not by itself."""
import functools
import math

import jax
import jax.numpy as jnp

from efficient_lm.ops import dispatch
from efficient_lm.ops.contract import contract
from efficient_lm.ops.low_precision import grouped, reference, xla
from efficient_lm.ops.low_precision.rounding import FORMATS, Passes

__all__ = ['FORMATS', 'IMPLEMENTATIONS', 'low_precision_contract', 'low_precision_grouped_matmul', 'low_precision_matmul']


def low_precision_matmul(x_MK, w_KN, *, forward: str | None = None, dgrad: str | None = None, wgrad: str | None = None,
                         key=None, dtype=None, implementation: str = 'auto'):
  """y_MN = R(x_MK) @ R(w_KN), where R rounds to eight bits. Differentiable in x and w:

    forward   y_MN = [x_MK]_K @ [w_KN]_K          dgrad   dx_MK = [g_MN]_N @ [w_KN]_N^T
    wgrad     dw_KN = [x_MK]_M^T @ [g_MN]_M

  [a]_S is a rounded along the dimension S that its product sums over: numbers that are added up share a scale, which just
  maps the largest of them to the largest value of the format. So the scales leave the sum: integers are multiplied and
  added up exactly in int32, float8 numbers in float32, and the sums are then multiplied by the scales of their row and
  column. Where S is longer than 131072, runs of that length are rounded and added up by themselves, so that int32 always
  holds their sum. Rounding counts as the identity in the gradients (Bengio et al. 2013).

  A pass whose format is None is that of `ops.contract`, bit for bit.

  Args:
    x_MK, w_KN: floating point.
    forward, dgrad, wgrad: 'int8', 'float8_e4m3fn', 'float8_e5m2' or None. It is the format of g in the two gradients, and
      of x and w in the forward pass; x and w meet a float8_e5m2 gradient as float8_e4m3fn, which has a bit more of precision
      where less of range is needed (Micikevicius et al. 2022, arXiv 2209.05433). int8 errs by at most half of 1/127 of
      the largest number, float8_e4m3fn by at most 1/16 of a number and float8_e5m2 by 1/8.
    key: of `jax.random`; rounds g up or down at random such that its mean is g, to 2^-17 of a step. One draw serves both
      gradients. None rounds to the nearest.
    dtype: of y; that of x by default.
    implementation: 'auto' or a name of IMPLEMENTATIONS.

  Returns:
    y_MN. Gradients come in the dtypes of x and w.
  """
  passes, dtype = _passes(forward, dgrad, wgrad), jnp.dtype(dtype or x_MK.dtype)
  if passes == Passes(): return contract('MK,KN->MN', x_MK, w_KN, dtype=dtype)
  return dispatch.run('low_precision', IMPLEMENTATIONS, implementation, x_MK, w_KN, None, key, passes, dtype)


def low_precision_grouped_matmul(x_MK, w_EKN, sizes_E, *, forward: str | None = None, dgrad: str | None = None,
                                 wgrad: str | None = None, key=None, implementation: str = 'auto'):
  """y_MN[m] = R(x_MK[m]) @ R(w_EKN[e]) for the group e that holds row m: `low_precision_matmul` for rows sorted by expert.

  Rows and groups are as in `ops.grouped_matmul`, and so is a pass whose format is None. Rows of x and g and the rows or
  columns of each group's matrix have a scale of their own, as above. In wgrad, which sums over the rows of a group, each run
  of `rounding.run_of_rows(M, E)` rows of a group is rounded by itself.
  """
  passes = _passes(forward, dgrad, wgrad)
  return dispatch.run('low_precision', IMPLEMENTATIONS, implementation, x_MK, w_EKN, sizes_E.astype(jnp.int32), key, passes,
                      x_MK.dtype)


def low_precision_contract(equation: str, x, w, *, dtype=None, key=None, **passes):
  """einsum(equation, x, w) by `low_precision_matmul`, with its `forward`, `dgrad`, `wgrad` and `key`.

  Any equation of two operands in which each letter of x or w stands in the other or in the result; letters in all three are
  a stack of products.
  """
  if not any(passes.values()): return contract(equation, x, w, dtype=dtype)
  operands, result = equation.split('->')
  x_axes, w_axes = operands.split(',')
  stack = ''.join(letter for letter in x_axes if letter in w_axes and letter in result)
  rows = ''.join(letter for letter in x_axes if letter not in w_axes)
  summed = ''.join(letter for letter in w_axes if letter in x_axes and letter not in result)
  new = ''.join(letter for letter in w_axes if letter not in x_axes)
  if sorted(stack + rows + new) != sorted(result): raise ValueError(f'{equation!r} sums over a letter of one operand alone')
  size = dict(zip(x_axes + w_axes, x.shape + w.shape))
  flat = lambda *groups: [math.prod(size[letter] for letter in group) for group in groups]
  x_SMK = jnp.einsum(f'{x_axes}->{stack + rows + summed}', x).reshape(flat(stack, rows, summed))
  w_SKN = jnp.einsum(f'{w_axes}->{stack + summed + new}', w).reshape(flat(stack, summed, new))
  product = functools.partial(low_precision_matmul, dtype=dtype, **passes)
  if stack: y_SMN = jax.vmap(lambda x_MK, w_KN: product(x_MK, w_KN, key=key))(x_SMK, w_SKN)
  else: y_SMN = product(x_SMK[0], w_SKN[0], key=key)
  return jnp.einsum(f'{stack + rows + new}->{result}', y_SMN.reshape([size[letter] for letter in stack + rows + new]))


def _passes(*formats) -> Passes:
  for name, found in zip(Passes._fields, formats):
    if found is not None and found not in FORMATS:
      raise ValueError(f'low_precision with {name} = {found!r}: choose one of {", ".join(FORMATS)}, or None')
  return Passes(*formats)


def _xla(x_MK, w, sizes_E, key, passes, dtype):
  if sizes_E is None: return xla.matmul(x_MK, w, key, passes, dtype)
  return grouped.matmul(x_MK, w, sizes_E, key, passes)


def _reference(x_MK, w, sizes_E, key, passes, dtype):
  if sizes_E is None: return reference.matmul(x_MK, w, key, passes, dtype)
  return reference.grouped_matmul(x_MK, w, sizes_E, key, passes)


IMPLEMENTATIONS = {
  'xla': dispatch.Implementation(_xla),
  'reference': dispatch.Implementation(_reference),
}
