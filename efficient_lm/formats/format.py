"""What all formats have in common: scales from tiles, rounding, packing, and back."""
from typing import Any, NamedTuple

from efficient_lm.errors import Misfit
from efficient_lm.formats import packing
from efficient_lm.formats.granularity import Channel, Group, tile, untile
from efficient_lm.formats.ranges import AbsMax, Reduce
from efficient_lm.lazy import lazy

jnp = lazy('jax.numpy')


class Scales(NamedTuple):
  """Of tiles, as they are stored: `scale` (..., q, n), in the dtype of the format, one row for each group of inputs, as
  products read them; `zero` likewise or None; `outer` (..., 1, 1) float32, a factor of all scales, or None."""
  scale: Any
  zero: Any = None
  outer: Any = None


class Encoded(NamedTuple):
  """A matrix (..., N, K) as stored: `values` holds its codes, packed along K where they have fewer than 8 bits."""
  values: Any
  scales: Scales


class Format:
  """The interface of a format, and what follows from it. Subclasses are dataclasses that a config can hold.

  element: what one number is, in a word. bits: of a stored code, 8 or fewer. scales: the granularity.
  symmetric: whether the grid is one around 0. largest: of the numbers of a symmetric grid.
  offset: what a number is more than its code; None where the two differ otherwise.
  joint: whether all scales of a matrix have a factor in common.
  range: how extremes are found where nobody says.
  """
  element: str
  bits: int
  scales: Any
  symmetric = True
  offset: float | None = 0.
  joint = False
  largest: float

  @property
  def range(self):
    return AbsMax()

  @property
  def by_rows(self) -> bool:
    """Whether each row of a matrix is rounded by itself."""
    return isinstance(self.scales, (Channel, Group)) and not self.joint

  def codes(self, y):
    """The nearest code to each y, which is in steps; int8, uint8 or float8. Of equally near ones the even."""
    raise NotImplementedError

  def numbers(self, codes):
    """What codes are worth, in steps, float32: exact."""
    raise NotImplementedError

  def fit(self, low, high) -> Scales:
    """Scales that stretch the grid from low to high, (..., n, q) each. Positive, also for a tile of zeros."""
    return Scales(_turned(positive(jnp.maximum(-low, high) / self.largest)))

  def steps(self, scales: Scales):
    """The float32 scale and zero point (or None) of each tile, (..., n, q), from what is stored."""
    scale = _turned(self.stored_scale(scales.scale))
    return scale if scales.outer is None else scale * scales.outer, None if scales.zero is None else _turned(
      scales.zero).astype(jnp.float32)

  def stored_scale(self, scale):
    """Float32 values of `Scales.scale`."""
    return scale.astype(jnp.float32)

  def scales_for(self, w, range=None, reduce: Reduce | None = None) -> Scales:
    """Scales of a matrix (..., N, K) by a range of `ranges` (default: the format's own)."""
    tiles = tile(w.astype(jnp.float32), self.scales.counts(*w.shape[-2:]))
    return self.fit(*(range or self.range).extremes(tiles, self, reduce or Reduce()))

  def snap(self, w, step, zero=None):
    """The nearest number of the grid to each w, float32; step and zero broadcast. |w - snap(w)| is at most half the distance
    of neighbours of the grid, for w within it."""
    y = w.astype(jnp.float32) / step
    if zero is None: return self.numbers(self.codes(y)) * step
    return (self.numbers(self.codes(y + zero)) - zero) * step

  def snap_tiles(self, tiles, scales: Scales):
    """`snap` for tiles (..., n, a, q, b)."""
    step, zero = (None if x is None else x[..., :, None, :, None] for x in self.steps(scales))
    return self.snap(tiles, step, zero)

  def rounded(self, w, scales: Scales):
    """A matrix (..., N, K) on the grid of these scales, float32; `decode(encode(w, scales))`, number for number."""
    return untile(self.snap_tiles(tile(w, self.counts(w, scales)), scales))

  def encode(self, w, scales: Scales) -> Encoded:
    """A matrix (..., N, K), rounded and packed. Raises Misfit where K numbers do not fill whole bytes."""
    tiles = tile(w.astype(jnp.float32), self.counts(w, scales))
    step, zero = (None if x is None else x[..., :, None, :, None] for x in self.steps(scales))
    y = tiles / step
    codes = untile(self.codes(y if zero is None else y + zero))
    return Encoded(packing.pack(codes, self.bits), scales)

  def decode(self, encoded: Encoded):
    """The matrix (..., N, K), float32."""
    codes = packing.unpack(encoded.values, self.bits)
    self.counts(codes, encoded.scales)
    return self._decoded(codes, encoded.scales)

  def decode_rows(self, values, scales: Scales):
    """Some rows of a stored matrix, each with scales (q, rows) of its own: (rows, K), float32."""
    return self._decoded(packing.unpack(values, self.bits), scales)

  def _decoded(self, codes, scales: Scales):
    tiles = self.numbers(tile(codes, scales.scale.shape[:-3:-1]))
    step, zero = (None if x is None else x[..., :, None, :, None] for x in self.steps(scales))
    return untile((tiles if zero is None else tiles - zero) * step)

  def counts(self, w, scales: Scales) -> tuple[int, int]:
    """The tiles that scales are for. Raises Misfit if those of (..., N, K) are others: a mesh that cuts a matrix within
    a tile leaves a device without its scale."""
    counts = self.scales.counts(*w.shape[-2:])
    if scales.scale.shape[-2:] != counts[::-1]:
      raise Misfit(f'a matrix of {w.shape[-2]} outputs x {w.shape[-1]} inputs has {counts} scales by {self.scales}, not '
                       f'{scales.scale.shape[:-3:-1]}: a mesh axis must cut scales as it cuts the matrix')
    return counts

  @property
  def name(self) -> str:
    """'int4 per group of 128', for tables."""
    return f'{self.element} per {self.scales.name}'


def positive(scale):
  """Never zero, and never so small that w / scale overflows: tiles of zeros stay zeros."""
  return jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)


def _turned(x):
  return jnp.swapaxes(x, -1, -2)

