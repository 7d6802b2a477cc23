"""What attention keeps of the tokens that it has read: rows of numbers, a slot for each token, in a format.

Formats are values (`models/cache_formats.py`) that make empty rows, and the caller of `init_cache` chooses one. Layers
append to rows and read them, and know of no format.

A query sees earlier tokens, and its own, as the cache holds them: rounded, if the cache is quantized. So a prompt that is
read at once and the same prompt read token by token give the same result, up to the order of sums. (The difference is larger
only where tokens share a scale: at once, the scale of a token already covers the later tokens of its group.) A mixture with
a capacity drops no token that is read through a cache; without a cache it drops those that training would drop.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.errors import IncompatibleError
from efficient_lm.ops.attention import attention
from efficient_lm.ops.decode_attention import decode_attention
from efficient_lm.ops.decode_attention.cache import Stored
from efficient_lm.ops.quantize import quantize_cache, quantize_tiles
from efficient_lm.parallel.sharding import by_shard, constrain


def write(x_BKSH, new_BKTH, start):
  """Puts `new` into the slots from `start` on, which may be one number or one for each sequence; scales, (B, K, S …),
  likewise."""
  return constrain(_put(x_BKSH, new_BKTH, start), 'BKSH'[:x_BKSH.ndim])


def _put(x_BKSH, new_BKTH, start):
  put = lambda x, new, at, axis: lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), at, axis)
  if jnp.ndim(start): return jax.vmap(functools.partial(put, axis=1))(x_BKSH, new_BKTH, start)
  return put(x_BKSH, new_BKTH, start, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FloatRows:
  """Rows as they were computed."""
  x_BKSH: jax.Array

  @classmethod
  def empty(cls, batch: int, heads: int, length: int, dim: int, dtype):
    """Rows of `dim` numbers for `length` tokens, by head."""
    return cls(jnp.zeros((batch, heads, length, dim), dtype))

  @property
  def stored(self) -> Stored:
    """As `ops.decode_attention` reads it."""
    return Stored(self.x_BKSH)

  def append(self, new_BTKH, start):
    """With the rows of tokens start … start + T - 1."""
    return FloatRows(write(self.x_BKSH, new_BTKH.swapaxes(1, 2), start))

  def read(self, dtype, end: int | None = None):
    """(B, end, K, H): the rows of the first slots, of all by default."""
    return self.x_BKSH[:, :, :end].swapaxes(1, 2).astype(dtype)


def slots_for(length: int, group: int) -> int:
  """The slots that `length` tokens need whose groups share scales. Groups are written whole, and sometimes one that holds
  nothing after them: see `IntegerRows.append`."""
  return length if group == 1 else (-(-length // group) + 1) * group


@dataclasses.dataclass(frozen=True)
class ByToken:
  """Rounding with a scale for each head and `group` successive tokens."""
  bits: int
  group: int

  def __call__(self, x_BKSH):
    """values, scale, and None for the shift that there is not."""
    return *quantize_cache(x_BKSH, bits=self.bits, group=self.group), None


@dataclasses.dataclass(frozen=True)
class ByTile:
  """Rounding with a scale and a shift for each head and tile of `group` successive tokens x `part` successive dims."""
  bits: int
  group: int
  part: int

  def __call__(self, x_BKSH):
    """values, scale and shift."""
    return quantize_tiles(x_BKSH, bits=self.bits, group=self.group, part=self.part)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntegerRows:
  """Rows in 8 or 4 bits, with scales that `group` successive tokens share.

  A group that is not complete is rounded anew with each token that joins it, from its floats in `recent`: at any time the
  cache holds what quantizing all tokens so far at once would give. (KIVI, Liu et al. 2024, arXiv 2402.02750, keeps recent
  floats too, and has queries see those.) What a group lacks counts as its first token, which no range is wider for.
  """
  x_BKSH: jax.Array          # int8, or uint8 with two numbers of four bits to a byte
  scale: jax.Array           # (B, K, S / group), or of tiles (B, K, S / group, H / part)
  shift: jax.Array | None    # of tiles
  recent_BKTH: jax.Array     # group - 1: no room for a complete group, which is never rounded again
  padding_B: jax.Array       # how many of the tokens that are appended next only fill up a shorter text, on the right
  rounding: ByToken | ByTile = dataclasses.field(metadata=dict(static=True))

  @classmethod
  def empty(cls, batch: int, heads: int, length: int, dim: int, dtype, rounding: ByToken | ByTile):
    """Rows of `dim` numbers for `length` tokens, by head. Raises IncompatibleError for an odd dim in four bits."""
    group = rounding.group
    if rounding.bits == 4 and dim % 2:
      raise IncompatibleError(f'a cache in 4 bits of rows of {dim}: must be even, for two to share a byte')
    shape = batch, heads, slots_for(length, group), dim
    stored = jax.eval_shape(rounding, jax.ShapeDtypeStruct(shape, dtype))
    zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), stored)
    return cls(*zeros, jnp.zeros((batch, heads, group - 1, dim), dtype), jnp.zeros(batch, jnp.int32), rounding)

  @property
  def stored(self) -> Stored:
    """As `ops.decode_attention` reads it."""
    return Stored(self.x_BKSH, self.scale, self.shift)

  def padded(self, lengths_B, length: int):
    """These rows, for prompts of these lengths that are filled up on the right to `length` and appended next."""
    padding_B = length - lengths_B.astype(jnp.int32)
    return dataclasses.replace(self, padding_B=jnp.broadcast_to(padding_B, self.padding_B.shape))

  def append(self, new_BTKH, start):
    """With the rows of tokens start … start + T - 1. The group that `start` lies in is rounded again."""
    T, group = new_BTKH.shape[1], self.rounding.group
    begun = start % group if group > 1 else 0   # a constant where it can be one: XLA leaves less to do then
    B, K, _, H = self.recent_BKTH.shape
    rows_BKTH = jnp.zeros((B, K, (-(-(T - 1) // group) + 1) * group, H), self.recent_BKTH.dtype)   # wherever T begin in one
    rows_BKTH = lax.dynamic_update_slice_in_dim(rows_BKTH, self.recent_BKTH, 0, axis=2)
    rows_BKTH = _put(rows_BKTH, new_BTKH.swapaxes(1, 2), begun)
    end_B = jnp.broadcast_to(begun + T, B) - self.padding_B
    first = start // group
    values, *scales = self.rounding(_filled(rows_BKTH, end_B, group))
    scale, shift = (None if new is None else write(old, new, first) for old, new in zip((self.scale, self.shift), scales))
    return IntegerRows(write(self.x_BKSH, values, first * group), scale, shift, _last_group(rows_BKTH, end_B, T, group),
                       jnp.zeros_like(self.padding_B), self.rounding)

  def read(self, dtype, end: int | None = None):
    """(B, end, K, H): the rows of the first slots, of all by default, dequantized."""
    group = self.rounding.group
    groups = None if end is None else -(-end // group)   # only these need be dequantized
    slots = None if end is None else groups * group
    part = Stored(self.x_BKSH[:, :, :slots], *(None if x is None else x[:, :, :groups] for x in (self.scale, self.shift)))
    return part.numbers()[:, :, :end].swapaxes(1, 2).astype(dtype)


def _last_group(rows_BKTH, end_B, num_new: int, group: int):
  """The first group - 1 rows of the group that end_B lies in. Where that is complete they are anything: `begun` is then 0 at
  the next call, and nothing of them is used."""
  if num_new == 1 or group == 1: return rows_BKTH[:, :, :group - 1]
  take = jax.vmap(lambda rows, at: lax.dynamic_slice_in_dim(rows, at, group - 1, 1))
  return take(rows_BKTH, end_B // group * group)


def _filled(rows_BKTH, end_B, group: int):
  """Rows with the first token of its group in place of each from end_B on."""
  if group == 1: return rows_BKTH
  B, K, T, H = rows_BKTH.shape
  groups = rows_BKTH.reshape(B, K, T // group, group, H)
  there = jnp.arange(T).reshape(T // group, group) < end_B[:, None, None]
  return jnp.where(there[:, None, :, :, None], groups, groups[:, :, :, :1]).reshape(rows_BKTH.shape)


def padded(cache, lengths_B, length: int):
  """An empty cache, for prompts of these lengths that are filled up on the right to `length` and read next: what fills them
  up then takes part in no scale."""
  is_rows = lambda node: isinstance(node, IntegerRows)
  return jax.tree.map(lambda rows: rows.padded(lengths_B, length) if is_rows(rows) else rows, cache, is_leaf=is_rows)


def attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, **options):
  """Attention of T tokens to each other. Sequences and heads know nothing of each other: each device computes its own."""
  arrays = (q_BTNH, k_BTKH, v_BTKH) if segments_BT is None else (q_BTNH, k_BTKH, v_BTKH, segments_BT)
  run = lambda q, k, v, segments=None: attention(q, k, v, segments_BS=segments, **options)
  return by_shard(run, ('BTNH', 'BTKH', 'BTKH', 'BT')[:len(arrays)], 'BTNH')(*arrays)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
  """The rotated keys and the values of K heads."""
  keys: FloatRows | IntegerRows
  values: FloatRows | IntegerRows

  def append(self, k_BTKH, v_BTKH, start):
    """With keys and values of tokens start … start + T - 1."""
    return KeyValues(self.keys.append(k_BTKH, start), self.values.append(v_BTKH, start))

  def attend(self, q_BTNH, start, segments_BS=None, window: int | None = None, **options):
    """What queries start … start + T - 1 see of the tokens up to themselves, their own included. Where T is 1, `start` may
    be one for each sequence.

    One token reads the cache as it is stored, by `ops.decode_attention`. Several tokens, and any with segments, read it
    dequantized, by `ops.attention`; a prompt that starts at 0 reads only the slots that it has filled. options: scale and
    softcap of both operations.
    """
    options = dict(window=window, **options)
    T, dtype = q_BTNH.shape[1], q_BTNH.dtype
    if T == 1 and segments_BS is None: return self._decode(q_BTNH[:, 0], start + 1, options)[:, None]
    end = T if isinstance(start, int) and start == 0 else None
    k_BSKH, v_BSKH = self.keys.read(dtype, end), self.values.read(dtype, end)
    if end is None: return attention(q_BTNH, k_BSKH, v_BSKH, start=start, segments_BS=segments_BS, **options)
    return attend(q_BTNH, k_BSKH, v_BSKH, None if segments_BS is None else segments_BS[:, :end], **options)

  def _decode(self, q_BNH, length, options):
    stored = [pair for pair in zip(self.keys.stored, self.values.stored) if pair[0] is not None]
    stored = [x for pair in stored for x in pair]   # keys, values; their scales; their shifts
    names = 'k_scale_BKS', 'v_scale_BKS', 'k_shift', 'v_shift'
    def run(q_BNH, lengths_B, k, v, *scales):
      return decode_attention(q_BNH, k, v, lengths_B, **options, **dict(zip(names, scales)))
    letters = ('BNH', 'B', *('BKSH'[:x.ndim] for x in stored))
    return by_shard(run, letters, 'BNH')(q_BNH, jnp.broadcast_to(jnp.int32(length), q_BNH.shape[:1]), *stored)
