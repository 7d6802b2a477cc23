"""Quantizers that learn their grid with the model: LSQ, the stretched grids of ParetoQ, and the learned clip of PACT.

Each has one parameter a tile, the exponent of its step: step = 2^exponent, linear between whole exponents. A step is then
always positive, and a move of the optimizer, which is of the size of the learning rate whatever the gradient's, changes
every step by the same share, large or small; Jain et al. 2019 (TQT, arXiv 1903.08066, appendix B) learn logarithms for
both reasons. A float's own bits run so between powers of two, and as there all is exact: no program, whatever it fuses,
can make another step of the same exponent. Exponents carry no `inputs`, so they are neither decayed nor orthogonalised.

Forward, each is format.rounded(matrix, scales), number for number. The gradient is that of `values`, which stands in for
the rounding, and is recomputed backward: nothing is kept but what was rounded.
"""
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Format, Int, MeanSquaredError, MidRise, Ternary
from efficient_lm.formats.floating import power_of_two
from efficient_lm.formats.format import Scales
from efficient_lm.formats.granularity import Tensor, tile, untile
from efficient_lm.formats.ranges import Reduce
from efficient_lm.weights.layout import Layout, matrix_shape
from efficient_lm.weights.quantizers import Quantizer, straight_through
from efficient_lm.weights.weight import Weight

NUM_QUANTILES = 4096   # of a normal distribution, as a stand-in for activations that nobody has seen yet


def power(exponent):
  """2^exponent where it is whole, and linear from there to the next: float32, exact, within 6.2 % of 2^exponent."""
  whole = lax.stop_gradient(jnp.floor(exponent))
  return lax.stop_gradient(power_of_two(whole.astype(jnp.int32))) * (1 + (exponent - whole))


def exponent_of(step):
  """The inverse of `power`, rounded to float32."""
  mantissa, exponent = jnp.frexp(step)   # step = mantissa * 2^exponent, 1/2 <= mantissa < 1
  return (exponent - 1).astype(jnp.float32) + (2 * mantissa - 1)


class TwiceTheMean:
  """The range of LSQ's first step, 2 <|w|> / sqrt(Q_P) (section 2.1)."""

  def extremes(self, tiles, format: Format, reduce: Reduce):
    high = 2 * reduce.mean(jnp.abs(tiles)) * format.largest ** 0.5
    return -high, high


class WholeCells:
  """The outermost cells are as wide as all others, and the largest magnitude lies on their edge."""

  def extremes(self, tiles, format: Format, reduce: Reduce):
    high = reduce.max(jnp.abs(tiles)) * (format.largest / (format.largest + 0.5))
    return -high, high


class LearnedStep(Quantizer):
  """Learned step size quantization (LSQ, Esser et al. 2020, arXiv 1902.08153): with y = w / step and Q_P the largest number
  of the grid, eq. 3 and 5,

    d rounded / d step = number(y) - y  if |y| < Q_P,  else Q_P * sign(y);      d rounded / d w = 1 if |y| < Q_P, else 0

  and the gradient of the step is multiplied by 1 / sqrt(n Q_P) (section 2.2) for the n numbers of a weight that share it,
  or the n inputs of a token. Adam does not see that factor; clipping by the norm does.

  exponent: of the steps, (..., q, n) for (..., O, I) cut in n x q tiles, as `Scales` are stored. Matrices with more
  dimensions in front, copies in a mixture for one, share it. numbers: n above.
  """
  range = TwiceTheMean()

  def __init__(self, format: Format, step_qn, axes: str, numbers: int):
    self.format = type(self).accepted(format)
    self.exponent = nnx.Param(exponent_of(step_qn.astype(jnp.float32)), axes=axes)
    self.gradient_scale = (numbers * format.largest) ** -0.5

  @classmethod
  def accepted(cls, format: Format) -> Format:
    """A copy of the format. Raises IncompatibleError if its steps are not free, to be any positive float."""
    end = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    scale, zero, outer = jax.eval_shape(format.fit, end, end)
    floats = scale.dtype in (jnp.float32, jnp.float16)
    if not (format.symmetric and zero is None and outer is None and floats):
      raise IncompatibleError(f'{format.name}: only a grid around 0 with one float scale to a tile can be learned')
    return Quantizer.copied(format)

  @classmethod
  def of_weight(cls, weight: Weight, format: Format, range=None):
    """For a weight, one step to a tile of the format; `range` (default: the class's) fits the first ones."""
    layout = Layout.of(weight)
    w_OI = layout.matrix(weight.materialize())
    (num_outputs, num_inputs), step_qn = w_OI.shape[-2:], cls.accepted(format).scales_for(w_OI, range or cls.range).scale
    # A tile of zeros says nothing of its size; with the smallest of all steps it would never leave 0.
    step_qn = jnp.where(step_qn > jnp.finfo(step_qn.dtype).tiny, step_qn, num_inputs ** -0.5 / format.largest)
    numbers = num_outputs * num_inputs // math.prod(step_qn.shape[-2:])
    return cls(format, step_qn, layout.experts + layout.letters[-1] + layout.letters[-2], numbers)

  @classmethod
  def of_tokens(cls, weight: Weight, format: Format):
    """For what a weight is multiplied with: one step for all tokens and experts, no maximum to be found when it is used.

    No token has been seen when a model is made. Most products follow an RMSNorm, whose results have a mean square of 1, so
    the first step is the one with the least squared error for a normal distribution of deviation 1.
    """
    if format.scales != Tensor():
      raise IncompatibleError(f'{format.name}: tokens that are yet to come cannot each have a learned step: give the '
                              f'activations scales=Tensor(), one step for all')
    num_inputs = matrix_shape(weight)[1]
    quantiles = jax.scipy.special.ndtri((jnp.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES)
    step_qn = cls.accepted(format).scales_for(quantiles[None], MeanSquaredError(candidates=64, least=0.05)).scale
    return cls(format, jnp.broadcast_to(step_qn, (*weight.stack, 1, 1)), '11', num_inputs)

  @property
  def reach(self) -> float:
    """Up to which |y| the gradient of w passes."""
    return self.format.largest

  def slope(self, y):
    """The derivative by the step of what is within reach."""
    return self.format.numbers(self.format.codes(y)) - y

  def scales(self, matrix_OI, reduce: Reduce) -> Scales:
    return Scales(self.format.kept(self._steps(matrix_OI)))

  def _steps(self, matrix_OI):
    """As they are learned, float32, before they are rounded to the dtype that scales are kept in."""
    step_qn = power(self.exponent.get_value())
    return jnp.broadcast_to(step_qn, (*matrix_OI.shape[:-2], *step_qn.shape[-2:]))

  def __call__(self, matrix_OI, reduce: Reduce):
    scales = self.scales(matrix_OI, reduce)
    quantized_OI = self.format.rounded(lax.stop_gradient(matrix_OI), lax.stop_gradient(scales))
    step, _ = self.format.steps(lax.stop_gradient(scales))
    free, _ = self.format.steps(Scales(self._steps(matrix_OI)))   # the gradient passes straight through the rounding
    step = step + self.gradient_scale * (free - lax.stop_gradient(free))
    values = jax.checkpoint(self.values, prevent_cse=False)(matrix_OI, step)
    return straight_through(values, quantized_OI.astype(matrix_OI.dtype))

  def values(self, matrix_OI, step_nq):
    """Has the gradient that the matrix on the grid shall have, in its two arguments."""
    tiles = tile(matrix_OI.astype(jnp.float32), step_nq.shape[-2:])
    step = step_nq[..., :, None, :, None]
    y = lax.stop_gradient(tiles / step)
    within, beyond = tiles + step * self.slope(y), step * (jnp.sign(y) * self.format.largest)
    return untile(jnp.where(jnp.abs(y) < self.reach, within, beyond)).astype(matrix_OI.dtype)


class Stretched(LearnedStep):
  """Stretched elastic quantization (SEQ of ParetoQ, Liu et al. 2025, arXiv 2502.02631) for grids of few, even levels. With
  the levels cut evenly out of [-a, a], a = (Q_P + 1/2) step,

    rounded = step * (floor(w / step) + 1/2) on `MidRise`, step * round(w / step) on balanced levels, within the grid;
    d rounded / d a = (rounded - w) / a  if |w| < a,  else ± Q_P / (Q_P + 1/2);      d rounded / d w = 1 if |w| < a, else 0

  so all numbers within half a step of the last level still move, where LSQ's stop at the level itself. First a = max |w|:
  no number is out of reach. (ParetoQ's code stops gradients at 0.99 a.) It uses this for 2 bits and three levels, and LSQ
  above. Learning a or the step is one: their exponents differ by a constant.
  """
  range = WholeCells()

  @classmethod
  def accepted(cls, format: Format) -> Format:
    if not isinstance(format, (Int, MidRise, Ternary)):
      raise IncompatibleError(f'{format.name}: only grids of equal steps can be stretched: '
                              'choose MidRise(…), Int(…) or Ternary()')
    return super().accepted(format)

  @property
  def reach(self) -> float: return self.format.largest + 0.5


class ClippedActivation(LearnedStep):
  """PACT (Choi et al. 2018, arXiv 1805.06085): with a = Q_P step, activations are clipped to [-a, a] and rounded, and only
  those that are clipped say where a shall go (eq. 3): d rounded / d a = ± 1 if |x| >= a, else 0. The paper has activations
  behind a ReLU and [0, a]; these have either sign. It adds an L2 penalty on a to the loss, of which there is none here."""

  def __init__(self, format: Format, step_qn, axes: str, numbers: int):
    super().__init__(format, step_qn, axes, numbers)
    self.gradient_scale = 1.

  def slope(self, y): return jnp.zeros_like(y)
