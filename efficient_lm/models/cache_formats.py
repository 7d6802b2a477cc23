"""In which format decoding keeps keys and values: what the caller of `init_cache` chooses. See `models/cache.py`."""
import dataclasses

BITS = (8, 4)


def _problems(form, **least: int):
  """Of the number of bits, and of fields that are below their least value."""
  if form.bits not in BITS: yield 'bits', form.bits, 'must be one of 8, 4'
  for field, value in least.items():
    if getattr(form, field) < value: yield field, getattr(form, field), f'must be at least {value}'


@dataclasses.dataclass(frozen=True)
class FloatCache:
  """Keys and values that decoding keeps, in the dtype of the computation."""

  def check(self):
    yield from ()

  def keys(self, batch: int, heads: int, length: int, dim: int, dtype):
    """Empty rows of `dim` numbers: `length` of them, by sequence and head."""
    from efficient_lm.models.cache import FloatRows
    return FloatRows.empty(batch, heads, length, dim, dtype)

  values = keys


@dataclasses.dataclass(frozen=True)
class IntegerCache:
  """Keys and values in `bits` bits, and a float32 scale for each head and `group` successive tokens."""
  bits: int = 8
  group: int = 1

  def check(self):
    yield from _problems(self, group=1)

  def keys(self, batch: int, heads: int, length: int, dim: int, dtype):
    """As FloatCache."""
    from efficient_lm.models.cache import ByToken, IntegerRows
    return IntegerRows.empty(batch, heads, length, dim, dtype, ByToken(self.bits, self.group))

  values = keys


@dataclasses.dataclass(frozen=True)
class TiledCache:
  """Keys and values in `bits` bits from the smallest to the largest number of a tile, with a float16 scale and shift each:
  keys in tiles of one channel and `group` successive tokens, because some of their channels are large in all tokens; values
  in tiles of one token and at most `part` successive numbers of a head (KIVI, Liu et al. 2024, arXiv 2402.02750, section
  3.2)."""
  bits: int = 4
  group: int = 32
  part: int = 16

  def check(self):
    yield from _problems(self, group=8, part=1)   # of shorter groups, the scales of keys take more than their numbers

  def keys(self, batch: int, heads: int, length: int, dim: int, dtype):
    """As FloatCache."""
    from efficient_lm.models.cache import ByTile, IntegerRows
    return IntegerRows.empty(batch, heads, length, dim, dtype, ByTile(self.bits, self.group, 1))

  def values(self, batch: int, heads: int, length: int, dim: int, dtype):
    """As FloatCache; as many slots as the keys have."""
    from efficient_lm.models.cache import ByTile, IntegerRows, slots_for
    return IntegerRows.empty(batch, heads, slots_for(length, self.group), dim, dtype, ByTile(self.bits, 1, self._part(dim)))

  def _part(self, dim: int) -> int:
    """The longest part up to `part` that divides a row, or in 4 bits half a row, whose numbers share bytes with those of the
    other half; the whole of that where all such parts are shorter than 8."""
    whole = dim // 2 if self.bits == 4 else dim
    parts = [size for size in range(min(8, self.part), min(self.part, whole) + 1) if whole % size == 0]
    return max(parts, default=whole)


CACHES = {'float': FloatCache(), 'int8': IntegerCache(bits=8), 'int4': TiledCache(bits=4)}   # by the name in --cache
