"""Products for training in eight bits: the operands of the forward pass and of both gradients are rounded, each if asked
for.

The weights of low-precision training (`weights.low_precision`) multiply by these products.
"""
import functools
import math

import jax
import jax.numpy as jnp

from efficient_lm.ops import dispatch
from efficient_lm.ops.contract import contract
from efficient_lm.ops.low_precision_matmul import grouped, reference, xla
from efficient_lm.ops.low_precision_matmul.rounding import FORMATS, Passes

__all__ = ['FORMATS', 'IMPLEMENTATIONS', 'low_precision_contract', 'low_precision_grouped_matmul', 'low_precision_matmul']


def low_precision_matmul(x_MI, w_IO, *, forward: str | None = None, dgrad: str | None = None, wgrad: str | None = None,
                         key=None, dtype=None, implementation: str = 'auto'):
  """y_MO = R(x_MI) @ R(w_IO), where R rounds to eight bits. Differentiable in x and w:

    forward   y_MO = [x_MI]_I @ [w_IO]_I          dgrad   dx_MI = [g_MO]_O @ [w_IO]_O^T
    wgrad     dw_IO = [x_MI]_M^T @ [g_MO]_M

  [a]_S is a, rounded along the dimension S that its product sums over: the numbers of a sum share a scale, which maps the
  largest of them to the largest value of the format. The scales can therefore be taken out of the sum: integers are
  multiplied and added up exactly in int32, float8 numbers in float32, and the sums are then multiplied by the scales of
  their row and column. Where S is longer than 131072, each run of that length has scales of its own, so that int32 always
  holds a run's sum. The gradients treat rounding as the identity (straight-through, Bengio et al. 2013, arXiv 1308.3432).

  A pass whose format is None equals that of `ops.contract`, bit for bit.

  Args:
    x_MI, w_IO: floating point.
    forward, dgrad, wgrad: 'int8', 'float8_e4m3fn', 'float8_e5m2' or None: the format of x and w in the forward pass, and of
      g in the gradients. x and w are rounded to float8_e4m3fn where g is rounded to float8_e5m2: they need less range and
      gain a bit of precision (Micikevicius et al. 2022, arXiv 2209.05433). int8 errs by at most half of 1/127 of the largest
      number, float8_e4m3fn by at most 1/16 of a number, and float8_e5m2 by at most 1/8.
    key: of `jax.random`, for stochastic rounding of g: up or down at random, such that the mean is g to 2^-17 of a step. One
      draw serves both gradients. None is round-to-nearest (RTN).
    dtype: of y; that of x by default.
    implementation: 'auto' or a name of IMPLEMENTATIONS.

  Returns:
    y_MO. Gradients come in the dtypes of x and w.
  """
  passes, dtype = _passes(forward, dgrad, wgrad), jnp.dtype(dtype or x_MI.dtype)
  if passes == Passes(): return contract('MI,IO->MO', x_MI, w_IO, dtype=dtype)
  return dispatch.run('low_precision_matmul', IMPLEMENTATIONS, implementation, x_MI, w_IO, None, key, passes, dtype)


def low_precision_grouped_matmul(x_MI, w_EIO, sizes_E, *, forward: str | None = None, dgrad: str | None = None,
                                 wgrad: str | None = None, key=None, implementation: str = 'auto'):
  """y_MO[m] = R(x_MI[m]) @ R(w_EIO[e]) for the group e that holds row m: `low_precision_matmul` for rows sorted by expert.

  Rows and groups are those of `ops.grouped_matmul`, which also computes a pass whose format is None. Each row of x and g,
  and each row or column of a group's matrix, has a scale of its own, as above. In wgrad, which sums over the rows of a
  group, each run of `rounding.run_of_rows(M, E)` rows of a group has scales of its own.
  """
  passes = _passes(forward, dgrad, wgrad)
  return dispatch.run('low_precision_matmul', IMPLEMENTATIONS, implementation, x_MI, w_EIO, sizes_E.astype(jnp.int32), key,
                      passes, x_MI.dtype)


def low_precision_contract(equation: str, x, w, *, dtype=None, key=None, **passes):
  """einsum(equation, x, w) by `low_precision_matmul`, with its `forward`, `dgrad`, `wgrad` and `key`.

  Each letter of an operand must also be a letter of the other operand or of the result, or the equation is a ValueError.
  Letters of both operands and of the result stand for a stack of products.
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
  x_LMI = jnp.einsum(f'{x_axes}->{stack + rows + summed}', x).reshape(flat(stack, rows, summed))
  w_LIO = jnp.einsum(f'{w_axes}->{stack + summed + new}', w).reshape(flat(stack, summed, new))
  product = functools.partial(low_precision_matmul, dtype=dtype, **passes)
  if stack: y_LMO = jax.vmap(lambda x_MI, w_IO: product(x_MI, w_IO, key=key))(x_LMI, w_LIO)
  else: y_LMO = product(x_LMI[0], w_LIO[0], key=key)
  return jnp.einsum(f'{stack + rows + new}->{result}', y_LMO.reshape([size[letter] for letter in stack + rows + new]))


def _passes(*formats) -> Passes:
  for name, found in zip(Passes._fields, formats):
    if found is not None and found not in FORMATS:
      raise ValueError(f'low_precision_matmul with {name} = {found!r}: choose one of {", ".join(FORMATS)}, or None')
  return Passes(*formats)


def _xla(x_MI, w, sizes_E, key, passes, dtype):
  if sizes_E is None: return xla.matmul(x_MI, w, key, passes, dtype)
  return grouped.matmul(x_MI, w, sizes_E, key, passes)


def _reference(x_MI, w, sizes_E, key, passes, dtype):
  if sizes_E is None: return reference.matmul(x_MI, w, key, passes, dtype)
  return reference.grouped_matmul(x_MI, w, sizes_E, key, passes)


IMPLEMENTATIONS = {
  'xla': dispatch.Implementation(_xla),
  'reference': dispatch.Implementation(_reference),
}
