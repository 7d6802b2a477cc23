"""Weights whose small inputs are zeroed, and products of one row that read nothing for an input that is zero."""
import math

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.contract import contract, is_matrix_product
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.weight import Dense, Frozen, Weight, Wrapper

# Shares of zeros: that for which weights are kept to skip them, and that from which on a row does. A CPU took 1.7, 2.6 and
# 4.1 times less processor time at 0.5, 0.75 and 0.9 (576 x 1536, experiments/speed), but one thread where a whole product
# takes two.
WORTH, LEAST = 0.7, 0.5
AT_ONCE = 8   # rows in a step of the loop


class Thresholded(Wrapper):
  """Multiplies as `inner` does inputs whose magnitude is above a threshold; the others count as zero (TEAL, Liu et al. 2024,
  arXiv 2408.14690, section 4.1). threshold: one number for each layer of a stack. sparsity: the share of inputs that it was
  chosen to zero. The weight itself, its invariants, bytes and FLOPs are those of `inner`."""

  def __init__(self, inner: Weight, threshold, sparsity: float):
    self.inner, self.sparsity = inner, sparsity
    self.threshold = threshold if isinstance(threshold, Frozen) else Frozen(threshold, axes='')

  @property
  def kind(self): return f'{self.inner.kind}, {self.sparsity:.0%} of inputs zeroed'

  def prepare_input(self, x, axes: str):
    return self.inner.prepare_input(self._above(x), axes)

  def contract(self, equation: str, x, dtype=None):
    return self.inner.contract(equation, self._above(x) if self._reads(equation) else x, dtype)

  def contract_grouped(self, x_MD, sizes_E):
    return self.inner.contract_grouped(self._above(x_MD), sizes_E)

  def cast(self, dtype): return self.around(lambda inner: inner.cast(dtype))

  def for_decoding(self):
    """Of floats with enough zeros for skipping to be faster, one that skips them."""
    if isinstance(self.inner, Dense) and self.sparsity >= WORTH and not self.axes.startswith('E'):
      return self.around(jax.jit(Skipping))
    inner = self.inner.for_decoding()
    return self if inner is self.inner else self.around(lambda _: inner)

  def around(self, change) -> 'Thresholded':
    """With change(inner) in place of `inner`, and the same threshold."""
    return Thresholded(change(self.inner), self.threshold, self.sparsity)

  def _reads(self, equation: str) -> bool: return equation.split(',')[0].endswith(self.inputs)

  def _above(self, x):
    threshold = self.threshold.get_value().astype(jnp.float32)
    return jnp.where(jnp.abs(x.astype(jnp.float32)) > threshold, x, jnp.zeros((), x.dtype))


class Skipping(Weight):
  """The values of `inner`, kept with its inputs in front, (I, O): what one input is multiplied with lies together. A single
  row reads the weight where its inputs are not zero, if at least a share of LEAST is, and all of it otherwise: the same sum
  without its zeros, in another order. More rows are multiplied as a whole. For decoding on a CPU."""

  def __init__(self, inner: Weight):
    self.layout, self.stored_kind = Layout.of(inner), inner.kind
    self.array = Frozen(jnp.swapaxes(self.layout.matrix(inner.materialize()), -1, -2), axes='11')

  @property
  def axes(self): return self.layout.axes

  @property
  def inputs(self): return self.layout.inputs

  @property
  def kind(self): return self.stored_kind

  @property
  def product(self): return 'float, of one row without its zeros'

  @property
  def shape(self):
    *lead, I, O = self.array.get_value().shape
    return self.layout.array_shape((*lead, O, I))

  def materialize(self): return self.layout.array(jnp.swapaxes(self.array.get_value(), -1, -2))

  def contract(self, equation: str, x, dtype=None):
    if not (is_matrix_product(equation) and equation.split(',')[0].endswith(self.inputs)):
      return super().contract(equation, x, dtype)
    rows, w_IO = x.shape[:x.ndim - len(self.inputs)], self.array.get_value().astype(x.dtype)
    x_MI = x.reshape(math.prod(rows), -1)
    most = int((1 - LEAST) * x_MI.shape[1])
    y_MO = skipped(x_MI[0], w_IO, most)[None] if x_MI.shape[0] == 1 else contract('MI,IO->MO', x_MI, w_IO)
    return y_MO.reshape(*rows, *self.layout.split(self.layout.outputs, y_MO.shape[1])).astype(dtype or x.dtype)


def skipped(x_I, w_IO, most: int):
  """x @ w, of which rows of w are read where x is not zero, AT_ONCE at a time in a loop that is as long as there are such
  inputs, if these are at most `most`; all of w otherwise. Copying the rows side by side first takes twice the time."""
  count = jnp.sum(x_I != 0)

  def few():
    size = -(-most // AT_ONCE) * AT_ONCE
    found = jnp.nonzero(x_I, size=size, fill_value=0)[0]
    x = jnp.where(jnp.arange(size) < count, x_I[found], 0)   # past the last of them, nothing of row 0

    def some(i, y_1O):
      places = [i * AT_ONCE + j for j in range(AT_ONCE)]
      return y_1O + sum(x[place] * lax.dynamic_slice_in_dim(w_IO, found[place], 1) for place in places)
    return lax.fori_loop(0, -(-count // AT_ONCE), some, jnp.zeros((1, w_IO.shape[1]), x_I.dtype))[0]
  return lax.cond(count <= most, few, lambda: (x_I[None] @ w_IO)[0])
