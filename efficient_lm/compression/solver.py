"""The column solver: changes a matrix column by column, and lets the columns that follow make up for it.

Each changed column of W (O, I) leaves an output error; algorithm 1 of GPTQ (Frantar et al. 2023, arXiv 2210.17323), the
optimal brain surgeon of Hassibi and Stork 1993 taken column by column, moves the columns that are still to come to where
they cancel most of it, by the inverse Hessian of what W multiplies. What is done to a column is a function, `project`, and a
mask: snapping to a grid is GPTQ, zeroing what a mask leaves out is SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774),
and both at once is one pass. The mask is given, or chosen on the way (`Choice`), from the weights as they have been moved
until then. Updates of columns beyond the current block are applied once per block, as one product.
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.compression import hessian
from efficient_lm.compression.patterns import GONE, SparsityPattern


@dataclasses.dataclass(frozen=True)
class Choice:
  """What is to be zeroed: a pattern, and the share of each matrix, (...,) or a number."""
  pattern: SparsityPattern
  share: Any


def solve(w_OI, gram_II, project=None, entries=(), *, keep_OI=None, choice: Choice | None = None, act_order: bool = True,
          block: int = 128, damping: float = 0.01):
  """(Q_OI, keep_OI): w_OI with every column as `project` leaves it, zero where the mask is False, such that
  (W - Q) H (W - Q)^T stays small; float32. And the mask, None where nothing is masked.

  With a multiple of the identity as Hessian no column moves another. So it is with inputs that were never active.

  Args:
    w_OI: (..., O, I), stacks of layers and experts in front.
    gram_II: (..., I, I), the Gram matrix of the inputs, at any scale.
    project: (column (O,), entries (O,)) -> column (O,), None to leave it.
    entries: a tree of arrays of the matrix's shape, of which `project` is given the column's own.
    keep_OI: bool, False where a pruned matrix must stay zero. Only the others make up for errors.
    choice: what else is zeroed: of the columns of a block, or of each unit of the pattern, the entries whose loss would cost
      least, w^2 / [H^-1] of what is still to come (eq. 3 and 4 of SparseGPT, whose blocks of columns have 128).
    act_order: columns of the most active inputs first; units of a pattern by their sums.
    block: columns between two updates of all that follow. Without a choice it changes the speed only.
    damping: added to the Hessian's diagonal, in parts of its mean.
  """
  unit = 1 if choice is None else choice.pattern.unit
  if choice is not None and keep_OI is None: keep_OI = jnp.ones(w_OI.shape, bool)
  share = None if choice is None else jnp.broadcast_to(jnp.asarray(choice.share, jnp.float32), w_OI.shape[:-2])

  def one(w_OI, gram_II, entries, keep_OI, share):
    order_I = _order(gram_II, unit) if act_order else jnp.arange(w_OI.shape[1])
    factor_II = hessian.inverse_factor(gram_II[order_I][:, order_I], damping)
    columns = lambda x: x.T[order_I]
    choose = None if choice is None else functools.partial(_chosen, choice.pattern, share)
    found = _in_blocks(*jax.tree.map(columns, (w_OI, entries, keep_OI)), factor_II, project, choose,
                       _steps(block, choice, w_OI.shape[1]))
    back_I = jnp.argsort(order_I)
    return jax.tree.map(lambda x_IO: x_IO[back_I].T, found)

  for _ in w_OI.shape[:-2]: one = jax.vmap(one)
  return one(w_OI.astype(jnp.float32), gram_II, entries, keep_OI, share)


def _order(gram_II, unit: int):
  """Inputs by their activity, the most active first, those of one unit beside each other as they were."""
  activity_U = jnp.sum(hessian.diagonal(gram_II).reshape(-1, unit), -1)
  return (jnp.argsort(-activity_U)[:, None] * unit + jnp.arange(unit)).reshape(-1)


def _steps(block: int, choice: Choice | None, num_inputs: int) -> tuple[int, int]:
  """Columns of a block, and those of it for which a choice is made at once."""
  if choice is None: return min(block, num_inputs), min(block, num_inputs)
  unit = choice.pattern.unit
  size = min(max(block // unit, 1) * unit, num_inputs)
  return size, size if choice.pattern.at_once else unit


def _chosen(pattern, share, score_CO, keep_CO, columns):
  """The mask of some columns: what the pattern keeps of what an earlier mask has left."""
  keep_OC = pattern.keep(jnp.where(keep_CO, score_CO, GONE).T, share, columns)
  return keep_OC.T & keep_CO


def _in_blocks(w_IO, entries, keep_IO, factor_II, project, choose, steps: tuple[int, int]):
  """Algorithm 1 in the order of the rows given (columns of W lie along the first dimension, so that one is contiguous)."""
  num_inputs, (size, _) = w_IO.shape[0], steps
  short = -num_inputs % size
  # A last block that is not full is filled with columns that are 0, whose error is not passed on, and which touch no other.
  padded = lambda x: jnp.pad(x, ((0, short), (0, 0)), constant_values=1 if x.dtype != jnp.bool_ else True)
  w_PO, (entries, keep_PO) = jnp.pad(w_IO, ((0, short), (0, 0))), jax.tree.map(padded, (entries, keep_IO))
  factor_PP = jnp.pad(factor_II, (0, short)) + jnp.diag(jnp.pad(jnp.zeros(num_inputs), (0, short), constant_values=1))

  def one_block(i, carry):
    w_PO, q_PO, keep_PO = carry
    at = functools.partial(lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size)
    factor_BP = at(factor_PP)
    factor_BB = lax.dynamic_slice_in_dim(factor_BP, i * size, size, axis=1)
    chosen = None if choose is None else functools.partial(_choose_at, choose, i * size, num_inputs)
    q_BO, error_BO, keep_BO = _within_block(at(w_PO), *jax.tree.map(at, (entries, keep_PO)), factor_BB, project, chosen,
                                            steps[1])
    w_PO -= jnp.matmul(factor_BP.T, error_BO, precision='highest')
    write = lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, i * size, axis=0)
    return w_PO, write(q_PO, q_BO), jax.tree.map(write, keep_PO, keep_BO)

  _, *found = lax.fori_loop(0, (num_inputs + short) // size, one_block, (w_PO, jnp.zeros_like(w_PO), keep_PO))
  return jax.tree.map(lambda x_PO: x_PO[:num_inputs], tuple(found))


def _choose_at(choose, start, num_inputs: int, first, score_CO, keep_CO):
  """choose(…) for the columns that begin at `first` of a block that begins at `start`; those past the last are kept."""
  column_C = start + first + jnp.arange(score_CO.shape[0])
  ends = (jnp.minimum(start + first, num_inputs), jnp.minimum(start + first + score_CO.shape[0], num_inputs))
  return choose(jnp.where(column_C[:, None] < num_inputs, score_CO, jnp.inf), keep_CO, ends)


def _within_block(w_BO, entries, keep_BO, factor_BB, project, choose, together: int):
  """The block's columns projected, the error of each over its diagonal of the factor: (B, O) both; and the mask."""
  diagonal_B = hessian.diagonal(factor_BB)

  def some(j, carry):
    w_BO, q_BO, error_BO, keep_BO = carry
    if choose is not None:
      at = functools.partial(lax.dynamic_slice_in_dim, start_index=j * together, slice_size=together)
      score_CO = jnp.square(at(w_BO) / at(diagonal_B)[:, None])
      keep_CO = choose(j * together, score_CO, at(keep_BO))
      keep_BO = lax.dynamic_update_slice_in_dim(keep_BO, keep_CO, j * together, axis=0)
    return lax.fori_loop(j * together, (j + 1) * together, column, (w_BO, q_BO, error_BO, keep_BO))

  def column(i, carry):
    w_BO, q_BO, error_BO, keep_BO = carry
    q_O = w_BO[i] if project is None else project(w_BO[i], jax.tree.map(lambda x: x[i], entries))
    if keep_BO is not None: q_O = jnp.where(keep_BO[i], q_O, 0)
    error_O = (w_BO[i] - q_O) / factor_BB[i, i]
    # The factor is upper triangular: columns before i stay as they are.
    return w_BO - factor_BB[i][:, None] * error_O, q_BO.at[i].set(q_O), error_BO.at[i].set(error_O), keep_BO

  empty = jnp.zeros_like(w_BO)
  return lax.fori_loop(0, w_BO.shape[0] // together, some, (w_BO, empty, empty, keep_BO))[1:]


def gptq(w_OI, gram_II, format, *, range=None, choice: Choice | None = None, **options):
  """w_OI quantized by the solver: `formats.Encoded`, as `format.encode` gives it. What a mask names is 0; with a `Choice`
  it is pruned first, for the same inputs.

  Scales are fitted beforehand, to the weights as they were ('static groups'). Hence columns can be quantized in any order,
  and are stored in their own: no permutation has to be stored or undone. With a multiple of the identity as Hessian it is
  round-to-nearest, bit for bit (of `Ternary`, whose scale is a mean, in the same program); so are the columns of inputs that
  were never active (the paper sets those to zero, which only calibration data could justify).

  With a choice, a first sweep prunes without rounding, in the inputs' own order: of the most active ones a block would lose
  its share, too. What it leaves has grown to make up for what is gone; it is that to which scales are fitted, and what is
  rounded.

  Args:
    w_OI, gram_II, options: see `solve`.
    format: any; steps are those of its scales for w_OI.
    range: of the scales, None for the format's own.
  """
  w_OI = w_OI.astype(jnp.float32)
  if choice is not None: w_OI, options['keep_OI'] = solve(w_OI, gram_II, choice=choice, **options | {'act_order': False})
  scales = format.scales_for(w_OI, range)
  step_OI, zero_OI = (None if x is None else _per_number(x, w_OI.shape) for x in format.steps(scales))

  snapped = lambda w_O, entries: format.snap(w_O, *entries)
  q_OI, _ = solve(w_OI, gram_II, snapped, (step_OI, zero_OI), **options)
  return format.encode(q_OI, scales)


def _per_number(tiles, shape):
  """(..., n, q) of tiles -> (..., O, I), of each number the value of its tile."""
  return jnp.repeat(jnp.repeat(tiles, shape[-2] // tiles.shape[-2], -2), shape[-1] // tiles.shape[-1], -1)
