"""The column solver: changes a matrix column by column, and lets the columns that follow make up for it.

Each changed column of W (O, I) leaves an output error; algorithm 1 of GPTQ (Frantar et al. 2023, arXiv 2210.17323), the
optimal brain surgeon of Hassibi and Stork 1993 taken column by column, moves the columns that are still to come to where
they cancel most of it, by the inverse Hessian of what W multiplies. What is done to a column is a function, `project`:
snapping it to a grid is GPTQ, zeroing entries is SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774), and both at once
is one pass. Updates of columns beyond the current block are applied once per block, as one product.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.compression import hessian


def solve(w_OI, gram_II, project, entries, *, act_order: bool = True, block: int = 128, damping: float = 0.01):
  """w_OI with every column as `project` leaves it, such that (W - Q) H (W - Q)^T stays small; float32.

  With a multiple of the identity as Hessian no column moves another. So it is with inputs that were never active.

  Args:
    w_OI: (..., O, I), stacks of layers and experts in front.
    gram_II: (..., I, I), the Gram matrix of the inputs, at any scale.
    project: (column (O,), entries (O,)) -> column (O,).
    entries: a tree of arrays of the matrix's shape, of which `project` is given the column's own.
    act_order: columns of the most active inputs first.
    block: columns between two updates of all that follow, which changes the speed only.
    damping: added to the Hessian's diagonal, in parts of its mean.
  """
  def one(w_OI, gram_II, entries):
    order_I = jnp.argsort(-hessian.diagonal(gram_II)) if act_order else jnp.arange(w_OI.shape[1])
    factor_II = hessian.inverse_factor(gram_II[order_I][:, order_I], damping)
    columns = lambda x: x.T[order_I]
    q_IO = _in_blocks(columns(w_OI), factor_II, jax.tree.map(columns, entries), project, block)
    return q_IO[jnp.argsort(order_I)].T

  for _ in w_OI.shape[:-2]: one = jax.vmap(one)
  return one(w_OI.astype(jnp.float32), gram_II, entries)


def _in_blocks(w_IO, factor_II, entries, project, block: int):
  """Algorithm 1 in the order of the rows given (columns of W lie along the first dimension, so that one is contiguous)."""
  num_inputs = w_IO.shape[0]
  size = min(block, num_inputs)
  short = -num_inputs % size
  # A last block that is not full is filled with columns that are 0, whose error is not passed on, and which touch no other.
  padded = lambda x: jnp.pad(x, ((0, short), (0, 0)), constant_values=1 if x.dtype != jnp.bool_ else True)
  w_PO, entries = jnp.pad(w_IO, ((0, short), (0, 0))), jax.tree.map(padded, entries)
  factor_PP = jnp.pad(factor_II, (0, short)) + jnp.diag(jnp.pad(jnp.zeros(num_inputs), (0, short), constant_values=1))

  def one_block(i, carry):
    w_PO, q_PO = carry
    at = functools.partial(lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size)
    factor_BP = at(factor_PP)
    factor_BB = lax.dynamic_slice_in_dim(factor_BP, i * size, size, axis=1)
    q_BO, error_BO = _within_block(at(w_PO), factor_BB, jax.tree.map(at, entries), project)
    w_PO -= jnp.matmul(factor_BP.T, error_BO, precision='highest')
    return w_PO, lax.dynamic_update_slice_in_dim(q_PO, q_BO, i * size, axis=0)

  _, q_PO = lax.fori_loop(0, (num_inputs + short) // size, one_block, (w_PO, jnp.zeros_like(w_PO)))
  return q_PO[:num_inputs]


def _within_block(w_BO, factor_BB, entries, project):
  """The block's columns projected, and the error of each over its diagonal of the factor: (B, O) both."""
  def column(i, carry):
    w_BO, q_BO, error_BO = carry
    q_O = project(w_BO[i], jax.tree.map(lambda x: x[i], entries))
    error_O = (w_BO[i] - q_O) / factor_BB[i, i]
    # The factor is upper triangular: columns before i stay as they are.
    return w_BO - factor_BB[i][:, None] * error_O, q_BO.at[i].set(q_O), error_BO.at[i].set(error_O)

  empty = jnp.zeros_like(w_BO)
  return lax.fori_loop(0, w_BO.shape[0], column, (w_BO, empty, empty))[1:]


def gptq(w_OI, gram_II, format, *, keep_OI=None, range=None, **options):
  """w_OI quantized by the solver: `formats.Encoded`, as `format.encode` gives it.

  Scales are fitted beforehand, to the weights as they were ('static groups'). Hence columns can be quantized in any order,
  and are stored in their own: no permutation has to be stored or undone. With a multiple of the identity as Hessian it is
  round-to-nearest, bit for bit (of `Ternary`, whose scale is a mean, in the same program); so are the columns of inputs that
  were never active (the paper sets those to zero, which only calibration data could justify).

  Args:
    w_OI, gram_II, options: see `solve`.
    format: any; steps are those of its scales for w_OI.
    keep_OI: bool, False where a pruned matrix must stay zero. Only the others make up for errors.
    range: of the scales, None for the format's own.
  """
  w_OI = w_OI.astype(jnp.float32)
  scales = format.scales_for(w_OI, range)
  step_OI, zero_OI = (None if x is None else _per_number(x, w_OI.shape) for x in format.steps(scales))

  def snapped(w_O, entries):
    step_O, zero_O, keep_O = entries
    q_O = format.snap(w_O, step_O, zero_O)
    return q_O if keep_O is None else jnp.where(keep_O, q_O, 0)

  return format.encode(solve(w_OI, gram_II, snapped, (step_OI, zero_OI, keep_OI), **options), scales)


def _per_number(tiles, shape):
  """(..., n, q) of tiles -> (..., O, I), of each number the value of its tile."""
  return jnp.repeat(jnp.repeat(tiles, shape[-2] // tiles.shape[-2], -2), shape[-1] // tiles.shape[-1], -1)
