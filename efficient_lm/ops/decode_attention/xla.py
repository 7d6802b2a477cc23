"""Attention of one token of each sequence in plain JAX: over all slots at once, or block by block.

A scale of a token multiplies scores and probabilities, never the cache: (q . k_int) * scale, and p * scale before v_int. The
cache is only converted to floats, which a product does as it reads it. Scales and shifts of tiles are applied as it is
converted, a block at a time on CPUs.
"""
import math

import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.decode_attention import cache as caches
from efficient_lm.ops.decode_attention.cache import Stored, combine, contiguous, first_slots, num_slots, per_token
from efficient_lm.ops.packing import planes

# Numbers of keys in a block, over all sequences and heads. Converted, they and as many values fit a core's cache (2^16 to
# 2^19 took the same time). With fewer than MIN_SLOTS slots, the loop would cost more than its products.
BLOCK, MIN_SLOTS = 2 ** 18, 64


def whole(q_BNH, k_BKSH, v_BKSH, lengths_B, *, k_scale_BKS=None, v_scale_BKS=None, page_table_BS=None, window=None,
          scale: float, softcap=None, k_shift=None, v_shift=None):
  """All slots at once, masked: two products and a softmax, for devices with enough bandwidth to read all slots."""
  q_BKGH = _heads(q_BNH, k_BKSH.shape[1])
  keys, values = (_by_token(*stored).map(lambda x: contiguous(x, page_table_BS))
                  for stored in ((k_BKSH, k_scale_BKS, k_shift), (v_BKSH, v_scale_BKS, v_shift)))
  seen_BS = _seen(jnp.arange(keys.x.shape[2]), first_slots(lengths_B, window), lengths_B)
  o_BKGH, m_BKG1, l_BKG1 = _partial(q_BKGH, keys, values, seen_BS, scale, softcap)
  return combine(o_BKGH[..., None, :], m_BKG1, l_BKG1).reshape(*q_BNH.shape[:2], -1).astype(q_BNH.dtype)


def blocks(q_BNH, k_BKSH, v_BKSH, lengths_B, *, k_scale_BKS=None, v_scale_BKS=None, page_table_BS=None, window=None,
           scale: float, softcap=None, k_shift=None, v_shift=None):
  """For CPUs: one block of slots at a time, up to the end of the longest sequence, so that converted keys and values stay in
  a core's cache, and slots that no query sees cost nothing.

  A product reads a whole float array without copying it, but a block of it is copied first. Blocks of a float cache are
  therefore faster only where most slots are invisible; the program decides that at run time, when the lengths are known.
  """
  q_BKGH, S = _heads(q_BNH, k_BKSH.shape[1]), num_slots(k_BKSH, page_table_BS)
  cache = _by_token(k_BKSH, k_scale_BKS, k_shift), _by_token(v_BKSH, v_scale_BKS, v_shift)
  size = _block(k_BKSH, page_table_BS, math.lcm(*(stored.group for stored in cache)))
  first_B = first_slots(lengths_B, window)

  def at_once():
    return _partial(q_BKGH, *cache, _seen(jnp.arange(S), first_B, lengths_B), scale, softcap)[::2]

  def step(i, carry):
    o_BKGH, m_BKG1, l_BKG1 = carry
    # The last block is moved back to fit the cache, and the slots that it shares with the block before are masked.
    start = jnp.minimum(i * size, S - size)
    block = (stored.map(lambda x: _slots(x, page_table_BS, start, size, k_BKSH.shape[2])) for stored in cache)
    seen_BS = _seen(start + jnp.arange(size), jnp.maximum(first_B, i * size), lengths_B)
    o, m, total = _partial(q_BKGH, *block, seen_BS, scale, softcap)
    new_m = jnp.maximum(m_BKG1, m)
    old, now = jnp.exp(m_BKG1 - new_m), jnp.exp(m - new_m)
    return o_BKGH * old + o * now, new_m, l_BKG1 * old + total * now

  def empty():
    rows = q_BKGH.shape[:3]
    return jnp.zeros((*rows, cache[1].width), jnp.float32), jnp.full((*rows, 1), LOWEST), jnp.zeros((*rows, 1), jnp.float32)

  def one_by_one():
    return lax.fori_loop(jnp.min(first_B) // size, -(-jnp.max(lengths_B) // size), step, empty())[::2]

  # A choice, though there is always a slot to see: into what is chosen, XLA does not fuse the writing of the new slot, of
  # which it would make a second copy of the whole cache for each token (0.06 in place of 0.02 ms for 528 slots of 3 heads).
  if page_table_BS is None and size == S: o_BKGH, l_BKG1 = lax.cond(jnp.max(lengths_B) > 0, at_once, lambda: empty()[::2])
  elif page_table_BS is not None or k_scale_BKS is not None: o_BKGH, l_BKG1 = one_by_one()
  else: o_BKGH, l_BKG1 = lax.cond(3 * (jnp.max(lengths_B) - jnp.min(first_B)) < S, one_by_one, at_once)
  return (o_BKGH / jnp.where(l_BKG1 > 0, l_BKG1, 1)).reshape(*q_BNH.shape[:2], -1).astype(q_BNH.dtype)


# Below any score, but finite: the difference of two infinities would be NaN.
LOWEST = -1e30


def _heads(q_BNH, K: int):
  B, N, H = q_BNH.shape
  return q_BNH.reshape(B, K, N // K, H)


def _by_token(x, scale, shift) -> Stored:
  """Keys or values with a scale for each token, if they have no tiles."""
  return Stored(x, scale if scale is None or shift is not None else per_token(scale, x.shape[2]), shift)


def _block(k, page_table_BS, group: int) -> int:
  """The number of slots of a block: those of a page, or as many of a contiguous cache as BLOCK allows, in whole groups."""
  sequences, K, slots, H = k.shape
  if page_table_BS is not None: return slots
  return min(slots, -(-max(MIN_SLOTS, BLOCK // (sequences * K * H)) // group) * group)


def _seen(slot_S, first_B, end_B):
  """Whether slots lie in first … end - 1 of each sequence."""
  return (slot_S >= first_B[:, None]) & (slot_S < end_B[:, None])


def _slots(x, page_table_BS, start, size: int, slots: int):
  """Slots start … start + size - 1 of the `slots` of a cache, or their scales."""
  group = slots // x.shape[2]
  if page_table_BS is None: return lax.dynamic_slice_in_dim(x, start // group, size // group, axis=2)
  return x[lax.dynamic_index_in_dim(page_table_BS, start // size, axis=1, keepdims=False)]


def _partial(q_BKGH, keys: Stored, values: Stored, seen_BS, scale: float, softcap):
  """Over the visible slots: the sum of e^(s - m) v, m = max s, and the sum of e^(s - m)."""
  seen_B11S = seen_BS[:, None, None]
  s_BKGS = scale * _against_keys(q_BKGH, keys)
  if _has_tokens_scales(keys): s_BKGS *= keys.scale[:, :, None]
  if softcap is not None: s_BKGS = softcap * jnp.tanh(s_BKGS / softcap)
  s_BKGS = jnp.where(seen_B11S, s_BKGS, LOWEST)
  m_BKG1 = jnp.max(s_BKGS, axis=-1, keepdims=True)
  p_BKGS = jnp.where(seen_B11S, jnp.exp(s_BKGS - m_BKG1), 0)
  l_BKG1 = jnp.sum(p_BKGS, axis=-1, keepdims=True)
  if _has_tokens_scales(values): p_BKGS = jnp.where(seen_B11S, p_BKGS * values.scale[:, :, None], 0)
  return _times_values(p_BKGS.astype(q_BKGH.dtype), values), m_BKG1, l_BKG1


def _has_tokens_scales(stored: Stored) -> bool:
  return stored.scale is not None and stored.shift is None


def _parts(stored: Stored, dtype):
  """The numbers of the cache in `dtype`, without scales of tokens: one array, or two of half the head dim where two numbers
  share a byte. Concatenating the halves first took four times as long on a CPU."""
  parts = planes(stored.x, 4) if stored.x.dtype == jnp.uint8 else (stored.x,)
  if stored.shift is not None:
    scales = (jnp.split(x, len(parts), axis=-1) for x in (stored.scale, stored.shift))
    parts = map(caches.scaled_tiles, parts, *scales)
  return [part.astype(dtype) for part in parts]


def _against_keys(q_BKGH, keys: Stored):
  parts = _parts(keys, q_BKGH.dtype)
  return sum(_product(q, k, 3) for q, k in zip(jnp.split(q_BKGH, len(parts), axis=-1), parts))


def _times_values(p_BKGS, values: Stored):
  return jnp.concatenate([_product(p_BKGS, v, 2) for v in _parts(values, p_BKGS.dtype)], axis=-1)


def _product(a, b, b_axis: int):
  """Sums over the last axis of a and one of b, for every sequence and key head (axes 0 and 1), in float32."""
  return lax.dot_general(a, b, (((3,), (b_axis,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
