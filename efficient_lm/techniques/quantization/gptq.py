"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): round column by column, and let the columns that follow make up for it.

Each rounded column of W (N, K) leaves an output error; algorithm 1 of the paper moves the columns that are not rounded yet
to where they cancel most of it, by the inverse Hessian of what W multiplies. Updates of columns beyond the current block are
applied once per block, as one product.

Scales are fitted beforehand, to the weights as they were ('static groups'). Hence columns can be rounded in any order, those
of the most active inputs first ('act-order'), and are stored in their own: no permutation has to be stored or undone.
"""
import dataclasses
from typing import Any

from efficient_lm.compression.calibration import Method
from efficient_lm.lazy import lazy

hessian = lazy('efficient_lm.compression.hessian')
jax = lazy('jax')
jnp = lazy('jax.numpy')
lax = lazy('jax.lax')


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Gptq(Method):
  """Rounds with the Gram matrix of each weight's inputs, of each expert's own. `act_order`: most active inputs first.
  `damping`: added to the Hessian's diagonal, in parts of its mean. `block`: columns between two updates of all that follow,
  which changes the speed only. `true_sequential`: within a layer too, each product is calibrated on the outputs of quantized
  ones before it (for a forward pass more for each). `range`: of the scales, None for the format's own."""
  act_order: bool = True
  damping: float = 0.01
  block: int = 128
  true_sequential: bool = False
  range: Any = None

  needs = ('gram',)

  def check(self):
    if self.damping < 0: yield 'damping', self.damping, 'must be 0 or more'
    if self.block < 1: yield 'block', self.block, 'must be at least 1'

  def encode(self, w_NK, format, statistics):
    return gptq(w_NK, statistics['gram'], format, act_order=self.act_order, block=self.block, damping=self.damping,
                range=self.range)


def gptq(w_NK, hessian_KK, format, *, act_order: bool = True, block: int = 128, damping: float = 0.01, range=None):
  """w_NK rounded so that (W - Q) H (W - Q)^T stays small: `formats.Encoded`, as `format.encode` gives it.

  With a multiple of the identity as Hessian it is rounding to nearest, bit for bit. So are the columns of inputs that were
  never active (the paper sets those to zero, which only calibration data could justify).

  Args:
    w_NK: (..., N, K), stacks of layers and experts in front.
    hessian_KK: (..., K, K), the Gram matrix of the inputs, at any scale.
    format: any; steps are those of its scales for w_NK.
    act_order, block, damping, range: see `Gptq`.
  """
  w_NK = w_NK.astype(jnp.float32)
  scales = format.scales_for(w_NK, range)
  whole = lambda x: None if x is None else _per_number(x, w_NK.shape)
  step_NK, zero_NK = map(whole, format.steps(scales))

  def one(w_NK, hessian_KK, step_NK, zero_NK):
    order_K = jnp.argsort(-hessian.diagonal(hessian_KK)) if act_order else jnp.arange(w_NK.shape[1])
    factor_KK = hessian.inverse_factor(hessian_KK[order_K][:, order_K], damping)
    columns = lambda x: None if x is None else x.T[order_K]
    q_KN = _rounded(columns(w_NK), factor_KK, columns(step_NK), columns(zero_NK), format, block)
    return q_KN[jnp.argsort(order_K)].T

  for _ in w_NK.shape[:-2]: one = jax.vmap(one)
  return format.encode(one(w_NK, hessian_KK, step_NK, zero_NK), scales)


def _per_number(tiles, shape):
  """(..., n, q) of tiles -> (..., N, K), of each number the value of its tile."""
  return jnp.repeat(jnp.repeat(tiles, shape[-2] // tiles.shape[-2], -2), shape[-1] // tiles.shape[-1], -1)


def _rounded(w_KN, factor_KK, step_KN, zero_KN, format, block: int):
  """Algorithm 1 in the order of the rows given (columns of W lie along the first dimension, so that one is contiguous)."""
  K = w_KN.shape[0]
  size = min(block, K)
  short = -K % size
  # A last block that is not full is filled with columns that are 0, stay 0 and touch no other.
  w_PN, step_PN = jnp.pad(w_KN, ((0, short), (0, 0))), jnp.pad(step_KN, ((0, short), (0, 0)), constant_values=1)
  zero_PN = None if zero_KN is None else jnp.pad(zero_KN, ((0, short), (0, 0)))
  factor_PP = jnp.pad(factor_KK, (0, short)) + jnp.diag(jnp.pad(jnp.zeros(K), (0, short), constant_values=1))

  def rounded_block(i, carry):
    w_PN, q_PN = carry
    at = lambda x: None if x is None else lax.dynamic_slice_in_dim(x, i * size, size)
    factor_BP = at(factor_PP)
    factor_BB = lax.dynamic_slice_in_dim(factor_BP, i * size, size, axis=1)
    q_BN, error_BN = _rounded_block(at(w_PN), factor_BB, at(step_PN), at(zero_PN), format)
    w_PN -= jnp.matmul(factor_BP.T, error_BN, precision='highest')
    return w_PN, lax.dynamic_update_slice_in_dim(q_PN, q_BN, i * size, axis=0)

  _, q_PN = lax.fori_loop(0, (K + short) // size, rounded_block, (w_PN, jnp.zeros_like(w_PN)))
  return q_PN[:K]


def _rounded_block(w_BN, factor_BB, step_BN, zero_BN, format):
  """The block's columns on the grid, and the error of each over its diagonal of the factor: (B, N) both."""
  def column(i, carry):
    w_BN, q_BN, error_BN = carry
    q_N = format.snap(w_BN[i], step_BN[i], None if zero_BN is None else zero_BN[i])
    error_N = (w_BN[i] - q_N) / factor_BB[i, i]
    # The factor is upper triangular: columns before i stay as they are.
    return w_BN - factor_BB[i][:, None] * error_N, q_BN.at[i].set(q_N), error_BN.at[i].set(error_N)

  empty = jnp.zeros_like(w_BN)
  return lax.fori_loop(0, w_BN.shape[0], column, (w_BN, empty, empty))[1:]
