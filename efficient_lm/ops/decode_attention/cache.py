"""The layout of a key-value cache, and the slots of it that a query sees: shared by all implementations."""
from typing import Any, NamedTuple

import jax.numpy as jnp

from efficient_lm.ops.packing import unpack_halves


def num_slots(k, page_table_BS) -> int:
  """The number of tokens that a sequence's cache can hold: S of k_BKSH, or the number of pages times Q of k_PKQH."""
  return k.shape[2] if page_table_BS is None else page_table_BS.shape[1] * k.shape[2]


def per_token(scale, size: int):
  """Scales (..., groups) -> (..., size), one for each token."""
  return scale if scale.shape[-1] == size else jnp.repeat(scale, size // scale.shape[-1], axis=-1)


def contiguous(x, page_table_BS):
  """Pages (P, K, Q, ...), gathered into (B, K, S, ...). A cache without a page table is contiguous already."""
  if page_table_BS is None: return x
  x = jnp.swapaxes(x[page_table_BS], 1, 2)
  B, K, pages, Q, *rest = x.shape
  return x.reshape(B, K, pages * Q, *rest)


class Stored(NamedTuple):
  """Keys or values of a cache. scale: None; one for each head and token, or group of tokens, (B, K, Q); or one for each tile
  of S / Q tokens x H / P dims, (B, K, Q, P), with a shift of that shape."""
  x: Any
  scale: Any = None
  shift: Any = None

  @property
  def group(self) -> int:
    """Tokens that share a scale of a tile; 1 where there are no tiles."""
    return 1 if self.shift is None else self.x.shape[2] // self.scale.shape[2]

  @property
  def width(self) -> int:
    """The numbers of a row."""
    return self.x.shape[3] * (2 if self.x.dtype == jnp.uint8 else 1)

  def map(self, function) -> 'Stored':
    """With `function` of each array that there is."""
    return Stored(*(None if x is None else function(x) for x in self))

  def numbers(self):
    """Float32, dequantized."""
    x = unpacked(self.x, jnp.float32)
    if self.shift is not None: return scaled_tiles(x, self.scale, self.shift)
    return x if self.scale is None else x * per_token(self.scale, x.shape[2])[..., None]


def scaled_tiles(x, scale, shift):
  """x * scale + shift, float32, of x (..., S, H) and scale and shift (..., Q, P) of its tiles."""
  (*lead, S, H), (Q, P) = x.shape, scale.shape[-2:]
  scale, shift = (y.astype(jnp.float32)[..., :, None, :, None] for y in (scale, shift))
  return (x.astype(jnp.float32).reshape(*lead, Q, S // Q, P, H // P) * scale + shift).reshape(x.shape)


def unpacked(x, dtype):
  """The numbers of the cache in `dtype`, without their scales."""
  return (unpack_halves(x) if x.dtype == jnp.uint8 else x).astype(dtype)


def first_slots(lengths_B, window: int | None):
  """The first slot that each sequence's query sees; the last one is length - 1."""
  return jnp.zeros_like(lengths_B) if window is None else jnp.maximum(lengths_B - window, 0)


def combine(o_BKGCH, max_BKGC, sum_BKGC):
  """Joins partial softmaxes over splits C of the keys: o = sum_c e^(m_c - m) o_c / sum_c e^(m_c - m) l_c, where o_c and l_c
  are the sums of e^(s - m_c) v and of e^(s - m_c). A split without visible keys has l_c = 0; if all splits have none, o = 0.
  (This is flash-decoding; the rule is that of online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867, section
  3.1.)"""
  seen_BKGC = sum_BKGC > 0
  m_BKG1 = jnp.max(jnp.where(seen_BKGC, max_BKGC, -jnp.inf), axis=-1, keepdims=True)
  weight_BKGC = jnp.where(seen_BKGC, jnp.exp(max_BKGC - jnp.where(jnp.isfinite(m_BKG1), m_BKG1, 0)), 0)
  # A split without keys may have left anything in o, and 0 * NaN is NaN: o is selected before it is multiplied.
  o_BKGH = jnp.sum(jnp.where(seen_BKGC[..., None], o_BKGCH, 0) * weight_BKGC[..., None], axis=-2)
  total_BKG1 = jnp.sum(jnp.where(seen_BKGC, sum_BKGC, 0) * weight_BKGC, axis=-1, keepdims=True)
  return o_BKGH / jnp.where(total_BKG1 > 0, total_BKG1, 1)
