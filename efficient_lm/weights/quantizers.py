"""Quantizers: how a matrix is put on its format's grid while training, with a gradient, and with which scales it is
stored."""
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from efficient_lm.formats import Format
from efficient_lm.formats.format import Scales
from efficient_lm.formats.ranges import Reduce
from efficient_lm.weights.layout import reduction, refuse_cut
from efficient_lm.weights.step_counter import StepCounter, counting


@jax.custom_jvp
def straight_through(values, quantized):
  """`quantized`, exactly; its derivative by `values` is that of the identity (Bengio et al. 2013, arXiv 1308.3432)."""
  return quantized


@straight_through.defjvp
def _(primals, tangents):
  return primals[1], tangents[0]


class Quantizer(nnx.Module):
  """Fake-quantizes matrices (..., O, I) while training, and knows the scales with which they would be stored.

  A module because some learn: their parameters are the model's, and move as all others. `format` is a static `Format`.
  """
  format: Format

  @staticmethod
  def copied(format: Format) -> Format:
    """A copy, to be kept: static parts of a model must not change with a config."""
    return dataclasses.replace(format)

  def scales(self, matrix_OI, reduce: Reduce) -> Scales:
    """Those of the matrix now."""
    raise NotImplementedError

  def __call__(self, matrix_OI, reduce: Reduce):
    """The matrix on the grid, in its own dtype: format.rounded(matrix, scales), with a gradient."""
    raise NotImplementedError

  def after_training(self) -> 'Quantizer':
    """The quantizer that does the same once training is over."""
    return self


class Rounding(Quantizer):
  """Fits scales anew at each use, by the format's own range (for most, absmax); the gradient passes straight through."""

  def __init__(self, format: Format):
    self.format = self.copied(format)

  def scales(self, matrix_OI, reduce: Reduce) -> Scales:
    return self.format.scales_for(lax.stop_gradient(matrix_OI), reduce=reduce)

  def __call__(self, matrix_OI, reduce: Reduce):
    quantized_OI = self.format.rounded(lax.stop_gradient(matrix_OI), self.scales(matrix_OI, reduce))
    return straight_through(matrix_OI, quantized_OI.astype(matrix_OI.dtype))


class Delayed(Quantizer):
  """Leaves numbers as they are, bit for bit, for the first `start` steps of training, and is `inner` from then on. `stack`:
  the shape of the stack of layers that it is made for."""

  def __init__(self, inner: Quantizer, start: int, stack: tuple[int, ...]):
    self.inner, self.start, self.counter = inner, start, StepCounter.new(stack)

  @property
  def format(self): return self.inner.format

  def scales(self, matrix_OI, reduce: Reduce) -> Scales:
    return self.inner.scales(matrix_OI, reduce)

  def __call__(self, matrix_OI, reduce: Reduce):
    steps = self.counter.get_value()
    begun = (steps >= self.start).reshape(*steps.shape, *[1] * (matrix_OI.ndim - steps.ndim))
    return counting(jnp.where(begun, self.inner(matrix_OI, reduce), matrix_OI), self.counter)

  def after_training(self): return self.inner.after_training()


def quantize_tokens(quantizer: Quantizer | None, x, axes: str, inputs: str):
  """Activations as a product over `inputs` reads them: each token's numbers are a row. x itself without a quantizer, and for
  a product over other dims than those (queries taken into a latent space, say)."""
  if quantizer is None or not axes.endswith(inputs): return x
  refuse_cut(quantizer.format, inputs)
  rows_MI = x.reshape(*x.shape[:x.ndim - len(inputs)], -1)
  # A scale shared by several tokens would let a token see later ones: in such a format every token is a matrix of its own.
  if quantizer.format.by_rows: return quantizer(rows_MI, reduction(inputs)).reshape(x.shape)
  return quantizer(rows_MI[..., None, :], reduction(inputs)).reshape(x.shape)
