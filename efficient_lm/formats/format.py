"""What all formats have in common: fitting scales to tiles, rounding, packing and dequantizing."""
import dataclasses
from typing import Any, NamedTuple

from efficient_lm.errors import IncompatibleError
from efficient_lm.formats.granularity import Channel, Group, tile, untile
from efficient_lm.formats.ranges import AbsMax, Reduce
from efficient_lm.lazy import lazy

jnp = lazy('jax.numpy')


SCALE_DTYPES = ('float32', 'float16')
LARGEST_HALF, LEAST_NORMAL_HALF, LEAST_HALF = 65504., 2. ** -14, 2. ** -24   # of float16


def scale_dtype_field():
  """A field `scale_dtype` of a format. It came later than stored runs, so that `models.added` leaves out its default."""
  return dataclasses.field(default='float32', metadata={'added': True})


def scale_dtype_problems(format):
  """Says which dtypes scales can be kept in, if that of the format is none."""
  if format.scale_dtype not in SCALE_DTYPES: yield 'scale_dtype', format.scale_dtype, "must be 'float32' or 'float16'"


class Scales(NamedTuple):
  """The scales of n x q tiles as they are stored.

  scale: (..., q, n) in the dtype of the format; a row for each group of inputs, which is the order that products read.
  zero: zero points, of the same shape, or None. outer: (..., 1, 1) float32, a factor of all scales, or None.
  """
  scale: Any
  zero: Any = None
  outer: Any = None


class Encoded(NamedTuple):
  """A matrix (..., O, I) as it is stored: `values` holds its codes, packed along I if they have fewer than 8 bits."""
  values: Any
  scales: Scales


class Format:
  """The interface of a format, and the functions that follow from it. Subclasses are dataclasses that a config can hold.

  Numbers "in steps" are numbers divided by their scale, plus the zero point if there is one (`in_steps`).

  element: the name of one number's type, such as 'int4'. bits: bits of a stored code, at most 8. scales: the granularity.
  symmetric: whether the grid is symmetric around 0. largest: the largest magnitude of a grid without zero points, in steps.
  offset: the difference of a number and its code, in steps; None if numbers are not codes plus a constant.
  joint: whether all scales of a matrix share a factor.
  standard: whether a standard fixes the size of groups, so that `fitted` does not change it.
  range: how a tile's extremes are found unless a caller passes a range.
  scale_dtype: of float scales. With 'float16' every number is rounded to the grid of a scale that a file of half-precision
    scales (GGUF, compressed-tensors) can hold: what is exported is then what GPTQ or training has chosen, bit for bit.
  """
  element: str
  bits: int
  scales: Any
  symmetric = True
  offset: float | None = 0.
  joint = False
  standard = False
  scale_dtype = 'float32'
  largest: float

  @property
  def range(self):
    return AbsMax()

  @property
  def has_zero(self) -> bool:
    """Whether 0 is on the grid, so that what has been pruned stays pruned."""
    return not self.offset

  @property
  def by_rows(self) -> bool:
    """Whether the rounding of a row of a matrix does not depend on the other rows."""
    return isinstance(self.scales, (Channel, Group)) and not self.joint

  def fitted(self, outputs: int, inputs: int) -> 'Format':
    """This format for a matrix of outputs x inputs. Where its groups (or blocks) do not divide the matrix, their size
    becomes the largest divisor below, a multiple of 8 if there is one. Groups longer than the dimension cover the dimension.

    Raises IncompatibleError where all divisors are less than a quarter of the size, and where groups of a standard's size do
    not divide the matrix.
    """
    if not self.standard: return dataclasses.replace(self, scales=self.scales.fitted(outputs, inputs))
    self.scales.counts(outputs, inputs)
    return self

  def codes(self, y):
    """The code of the nearest number to each y, in steps: int8, uint8 or float8. Ties go to the even code, or in a grid
    without a zero upwards."""
    raise NotImplementedError

  def numbers(self, codes):
    """The numbers that codes stand for, in steps: float32, exact."""
    raise NotImplementedError

  def fit(self, low, high) -> Scales:
    """Scales that stretch the grid from low to high, (..., n, q) each. They are not 0, also for a tile of zeros, and
    positive unless the format says otherwise."""
    from efficient_lm.ops.absmax import scale_of
    return Scales(_transposed(self.kept(scale_of(jnp.maximum(-low, high), self.largest))))

  def kept(self, scale):
    """float32 scales in `scale_dtype`: the nearest ones, finite, and positive also where that rounds to 0. The nearest and
    not the next larger ones, so that a matrix on the grid keeps its scales; the largest number may so lie beyond the grid,
    by at most largest * 2^-11 of a step."""
    if self.scale_dtype == 'float32': return scale
    least, most = LEAST_NORMAL_HALF, LARGEST_HALF
    return jnp.where(scale < LEAST_HALF, least, jnp.minimum(scale, most)).astype(self.scale_dtype)

  def steps(self, scales: Scales):
    """The float32 scale and zero point (or None) of each tile, (..., n, q), from the stored scales."""
    scale = _transposed(self.stored_scale(scales.scale))
    zero = None if scales.zero is None else _transposed(scales.zero).astype(jnp.float32)
    return scale if scales.outer is None else scale * scales.outer, zero

  def in_steps(self, w, step, zero=None):
    """Numbers in steps, of which `codes` finds the nearest code; step and zero, as `steps` has them, broadcast."""
    return w / step if zero is None else w / step + zero

  def from_steps(self, numbers, step, zero=None):
    """The inverse of `in_steps`, float32."""
    return (numbers if zero is None else numbers - zero) * step

  def integer_steps(self, scales: Scales):
    """The float32 step and zero (or None) of each tile, (..., n, q), with which a number is (code - zero) * step, up to the
    rounding of float32: what products of integers read. Only where `offset` is not None."""
    step, zero = self.steps(scales)
    return step, jnp.full_like(step, -self.offset) if self.offset else zero

  def stored_scale(self, scale):
    """`Scales.scale` as float32 numbers."""
    return scale.astype(jnp.float32)

  def scales_for(self, w, range=None, reduce: Reduce | None = None) -> Scales:
    """Scales for a matrix (..., O, I).

    range: finds the extremes of tiles, one of `ranges`; by default the format's own. reduce: see `ranges.Reduce`.
    """
    tiles = tile(w.astype(jnp.float32), self.scales.counts(*w.shape[-2:]))
    return self.fit(*(range or self.range).extremes(tiles, self, reduce or Reduce()))

  def snap(self, w, step, zero=None):
    """The nearest number of the grid to each w, float32; step and zero broadcast. For w within the grid, |w - snap(w)| is at
    most half the distance of the grid's neighbouring numbers."""
    return self.from_steps(self.numbers(self.codes(self.in_steps(w.astype(jnp.float32), step, zero))), step, zero)

  def snap_tiles(self, tiles, scales: Scales):
    """`snap` for tiles (..., n, a, q, b), as `granularity.tile` cuts them."""
    step, zero = (None if x is None else x[..., :, None, :, None] for x in self.steps(scales))
    return self.snap(tiles, step, zero)

  def rounded(self, w, scales: Scales):
    """A matrix (..., O, I) rounded to the grid of these scales, float32: the same numbers as `decode(encode(w, scales))`."""
    return untile(self.snap_tiles(tile(w, self.counts(w, scales)), scales))

  def encode(self, w, scales: Scales) -> Encoded:
    """A matrix (..., O, I), rounded and packed. Raises IncompatibleError where I numbers do not fill whole bytes."""
    from efficient_lm.ops import packing
    count = packing.codes_in_whole_bytes(self.bits)
    if w.shape[-1] % count:
      raise IncompatibleError(f'{w.shape[-1]} inputs of {self.bits} bits do not fill whole bytes: their number '
                                         f'must be a multiple of {count}')
    tiles = tile(w.astype(jnp.float32), self.counts(w, scales))
    step, zero = (None if x is None else x[..., :, None, :, None] for x in self.steps(scales))
    codes = untile(self.codes(self.in_steps(tiles, step, zero)))
    return Encoded(packing.pack(codes, self.bits), scales)

  def decode(self, encoded: Encoded):
    """The matrix (..., O, I), float32."""
    from efficient_lm.ops import packing
    codes = packing.unpack(encoded.values, self.bits)
    self.counts(codes, encoded.scales)
    return self._decoded(codes, encoded.scales)

  def decode_rows(self, values, scales: Scales):
    """Some rows of a stored matrix, (rows, I) float32, from their values and their scales (q, rows)."""
    from efficient_lm.ops import packing
    return self._decoded(packing.unpack(values, self.bits), scales)

  def _decoded(self, codes, scales: Scales):
    tiles = self.numbers(tile(codes, scales.scale.shape[:-3:-1]))
    step, zero = (None if x is None else x[..., :, None, :, None] for x in self.steps(scales))
    return untile(self.from_steps(tiles, step, zero))

  def counts(self, w, scales: Scales) -> tuple[int, int]:
    """The numbers of tiles (n, q) of a matrix (..., O, I). Raises IncompatibleError if the scales are for other tiles: on a
    mesh that cuts a matrix within a tile, devices would not have the scales of their part."""
    counts = self.scales.counts(*w.shape[-2:])
    if scales.scale.shape[-2:] != counts[::-1]:
      raise IncompatibleError(
        f'a matrix of {w.shape[-2]} outputs x {w.shape[-1]} inputs has {counts} scales by {self.scales}, not '
        f'{scales.scale.shape[:-3:-1]}: a mesh axis must cut scales as it cuts the matrix')
    return counts

  @property
  def name(self) -> str:
    """'int4 per group of 128', for tables."""
    return f'{self.element} per {self.scales.name}'


def _transposed(x):
  return jnp.swapaxes(x, -1, -2)
