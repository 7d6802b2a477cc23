"""What attention keeps of the tokens that it has read: rows of numbers, a slot for each token, in a format.

Formats are values (`spec.FloatCache`, `spec.IntegerCache`) that make empty rows, and the caller of `init_cache` chooses one.
Layers append to rows and read them, and know of no format.

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
from efficient_lm.ops.decode_attention.cache import per_token, unpacked
from efficient_lm.ops.quantize import quantize_cache
from efficient_lm.parallel.sharding import by_shard, constrain


def write(x_BKSH, new_BKTH, start):
  """Puts `new` into the slots from `start` on, which may be one number or one for each sequence; scales, (B, K, S),
  likewise."""
  put = lambda x, new, at, axis: lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), at, axis)
  if jnp.ndim(start): written = jax.vmap(functools.partial(put, axis=1))(x_BKSH, new_BKTH, start)
  else: written = put(x_BKSH, new_BKTH, start, 2)
  return constrain(written, 'BKSH'[:x_BKSH.ndim])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FloatRows:
  """Rows as they were computed."""
  x_BKSH: jax.Array
  scale_BKS = None

  @classmethod
  def empty(cls, batch: int, heads: int, length: int, dim: int, dtype):
    """Rows of `dim` numbers for `length` tokens, by head."""
    return cls(jnp.zeros((batch, heads, length, dim), dtype))

  def append(self, new_BTKH, start):
    """With the rows of tokens start … start + T - 1."""
    return FloatRows(write(self.x_BKSH, new_BTKH.swapaxes(1, 2), start))

  def read(self, dtype, end: int | None = None):
    """(B, end, K, H): the rows of the first slots, of all by default."""
    return self.x_BKSH[:, :, :end].swapaxes(1, 2).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntegerRows:
  """Rows in 8 or 4 bits, and a scale for each head and `group` successive tokens (`ops.quantize.quantize_cache`).

  A group that is not complete is rounded anew with each token that joins it, from its floats in `recent`: at any time the
  cache holds what quantizing all tokens so far at once would give. (KIVI, Liu et al. 2024, arXiv 2402.02750, keeps recent
  floats too, and has queries see those.)
  """
  x_BKSH: jax.Array        # int8, or uint8 with two numbers of four bits to a byte
  scale_BKS: jax.Array     # S / group of them
  recent_BKTH: jax.Array   # group - 1: no room for a complete group, which is never rounded again
  bits: int = dataclasses.field(metadata=dict(static=True))

  @classmethod
  def empty(cls, batch: int, heads: int, length: int, dim: int, dtype, *, bits: int, group: int):
    """Rows of `dim` numbers for `length` tokens, by head. Raises IncompatibleError for an odd dim in four bits."""
    if bits == 4 and dim % 2:
      raise IncompatibleError(f'a cache in 4 bits of rows of {dim}: must be even, for two to share a byte')
    # Groups are written whole, and sometimes one that holds nothing after them: see `append`.
    slots = length if group == 1 else (-(-length // group) + 1) * group
    values, scales = jax.eval_shape(lambda x: quantize_cache(x, bits=bits, group=group),
                                    jax.ShapeDtypeStruct((batch, heads, slots, dim), dtype))
    zeros = lambda like: jnp.zeros(like.shape, like.dtype)
    return cls(zeros(values), zeros(scales), jnp.zeros((batch, heads, group - 1, dim), dtype), bits)

  def append(self, new_BTKH, start):
    """With the rows of tokens start … start + T - 1. The group that `start` lies in is rounded again."""
    T, group = new_BTKH.shape[1], self.recent_BKTH.shape[2] + 1
    begun = start % group if group > 1 else 0   # a constant where it can be one: XLA leaves less to do then
    recent_BKTH = jnp.where(jnp.arange(group - 1)[:, None] < begun, self.recent_BKTH, 0)
    B, K, _, H = recent_BKTH.shape
    rows_BKTH = jnp.zeros((B, K, (-(-(T - 1) // group) + 1) * group, H), recent_BKTH.dtype)   # wherever in a group T begin
    rows_BKTH = lax.dynamic_update_slice_in_dim(rows_BKTH, recent_BKTH, 0, axis=2)
    rows_BKTH = lax.dynamic_update_slice_in_dim(rows_BKTH, new_BTKH.swapaxes(1, 2).astype(rows_BKTH.dtype), begun, axis=2)
    values, scale = quantize_cache(rows_BKTH, bits=self.bits, group=group)
    first = start // group
    # If the last group is complete, this takes anything: `begun` is then 0 at the next call, and nothing of it is used.
    recent_BKTH = lax.dynamic_slice_in_dim(rows_BKTH, (begun + T) // group * group, group - 1, axis=2)
    return dataclasses.replace(self, x_BKSH=write(self.x_BKSH, values, first * group),
                               scale_BKS=write(self.scale_BKS, scale, first), recent_BKTH=recent_BKTH)

  def read(self, dtype, end: int | None = None):
    """(B, end, K, H): the rows of the first slots, of all by default, dequantized."""
    scale_BKS = per_token(self.scale_BKS, self.x_BKSH.shape[2])[:, :, :end, None]
    return (unpacked(self.x_BKSH[:, :, :end], jnp.float32) * scale_BKS).swapaxes(1, 2).astype(dtype)


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
    stored = (self.keys.x_BKSH, self.values.x_BKSH, self.keys.scale_BKS, self.values.scale_BKS)
    stored = [x for x in stored if x is not None]
    def run(q_BNH, lengths_B, k, v, *scales):
      return decode_attention(q_BNH, k, v, lengths_B, **options, **dict(zip(('k_scale_BKS', 'v_scale_BKS'), scales)))
    letters = ('BNH', 'B', 'BKSH', 'BKSH', 'BKS', 'BKS')[:2 + len(stored)]
    return by_shard(run, letters, 'BNH')(q_BNH, jnp.broadcast_to(jnp.int32(length), q_BNH.shape[:1]), *stored)
