"""Inputs on which every implementation of decode attention must agree, for tests and benchmarks."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from efficient_lm.ops.decode_attention import IMPLEMENTATIONS, decode_attention
from efficient_lm.ops.decode_attention.cache import first_slots, unpacked
from efficient_lm.ops.quantize import quantize_cache, quantize_tiles

BITS = {'float32': 32, 'bfloat16': 16, 'int8': 8, 'int4': 4, 'int8 tiles': 8, 'int4 tiles': 4}
GROUP = 8   # tokens that share a scale of a key's channel, where there are tiles


@dataclasses.dataclass(frozen=True)
class Case:
  """A batch of sequences with `slots` each; `heads` are (N, K, H). ragged: lengths from 1 to slots, else all are full.

  storage: of the cache, a key of BITS. dtype: of the queries. page: tokens of a page, None for a contiguous cache.
  """
  batch: int
  slots: int
  heads: tuple[int, int, int] = (4, 2, 16)
  storage: str = 'float32'
  dtype: Any = jnp.float32
  page: int | None = None
  window: int | None = None
  ragged: bool = True

  def arguments(self) -> tuple[jax.Array, ...]:
    """q_BNH, k, v, lengths_B; for a quantized cache k_scale and v_scale, and with tiles k_shift and v_shift; with pages the
    page table."""
    keys = jax.random.split(jax.random.key(self.slots), 5)
    N, K, H = self.heads
    pages = self.batch * self.slots // self.page + 1 if self.page else self.batch
    shape = (pages, K, self.page or self.slots, H)
    tiles = (GROUP, 1), (1, H // 2)
    k, v = (self._stored(jax.random.normal(key, shape), *tile) for key, tile in zip(keys, tiles))
    arrays = (jax.random.normal(keys[2], (self.batch, N, H), self.dtype), k[0], v[0], self.lengths())
    for scales in zip(k[1:], v[1:]): arrays += scales
    if self.page:   # one page is nobody's
      arrays += (jax.random.permutation(keys[3], pages)[:-1].reshape(self.batch, -1).astype(jnp.int32),)
    return arrays

  def _stored(self, x, group: int, part: int) -> tuple[jax.Array, ...]:
    bits = BITS[self.storage]
    if self.has_tiles: return quantize_tiles(x, bits=bits, group=group, part=part)
    return quantize_cache(x, bits=bits) if bits <= 8 else (x.astype(self.storage),)

  def lengths(self):
    """The number of tokens of each sequence: the first is full, the last has one token."""
    if not self.ragged: return jnp.full((self.batch,), self.slots, jnp.int32)
    drawn_B = jax.random.randint(jax.random.key(1), (self.batch,), 1, self.slots + 1)
    return drawn_B.at[-1].set(1).at[0].set(self.slots).astype(jnp.int32)

  @property
  def has_tiles(self) -> bool:
    """Whether scales are of tiles, with shifts."""
    return self.storage.endswith('tiles')

  @property
  def names(self) -> list[str]:
    """Of the arguments after the lengths."""
    scales = ['k_scale_BKS', 'v_scale_BKS'] * (BITS[self.storage] <= 8) + ['k_shift', 'v_shift'] * self.has_tiles
    return scales + ['page_table_BS'] * (self.page is not None)

  def call(self, implementation: str, tiles=None):
    """The op as a function of the arguments."""
    names = self.names
    def run(q_BNH, k, v, lengths_B, *rest):
      options = dict(zip(names, rest), window=self.window)
      if tiles is None: return decode_attention(q_BNH, k, v, lengths_B, **options, implementation=implementation)
      options = {name: options.get(name) for name in ('k_scale_BKS', 'v_scale_BKS', 'page_table_BS', 'window')}
      return IMPLEMENTATIONS[implementation].run(q_BNH, k, v, lengths_B, **options, scale=self.heads[2] ** -.5,
                                                 tiles=tiles)
    return run

  @property
  def tokens(self) -> int:
    """The number of slots that the queries of the batch see if all sequences are full: an upper bound for ragged ones."""
    return self.batch * min(self.slots, self.window or self.slots)

  @property
  def flops(self) -> float:
    """Two products of N queries with the visible tokens."""
    return 4 * self.heads[0] * self.heads[2] * self.tokens

  @property
  def bytes(self) -> float:
    """Those of keys, values and scales of the visible tokens, of queries and of results."""
    N, K, H = self.heads
    scales = 4 if BITS[self.storage] <= 8 else 0
    if self.has_tiles: scales = 2 * (H / GROUP + 2)   # float16 scales and shifts, of keys and of values on average
    queries = self.batch * N * H * jnp.dtype(self.dtype).itemsize
    return 2 * self.tokens * K * (H * BITS[self.storage] / 8 + scales) + 2 * queries

  @property
  def precision(self) -> str:
    """The dtype of the products."""
    return jnp.dtype(self.dtype).name

  @property
  def tolerance(self) -> float:
    """Results are means of unit normals, with a few float32 roundings of scores up to about 4. In bfloat16, probabilities,
    the result, and the product of a scale and a probability are rounded to 8 bits."""
    return 1e-5 if self.precision == 'float32' else 2 ** -7

  def baselines(self) -> dict:
    """What one would write without this operation: the cache is dequantized, and two products are computed in the dtype of
    the queries."""
    return {} if self.page or self.has_tiles else {'jnp': self._plain}

  def _plain(self, q_BNH, k, v, lengths_B, *scales):
    (B, N, H), K = q_BNH.shape, k.shape[1]
    k, v = (unpacked(x, q_BNH.dtype) for x in (k, v))
    if scales: k, v = (x * scale.astype(x.dtype)[..., None] for x, scale in zip((k, v), scales))
    slot_S = jnp.arange(k.shape[2])
    seen_BS = (slot_S >= first_slots(lengths_B, self.window)[:, None]) & (slot_S < lengths_B[:, None])
    s = jnp.einsum('BKGH,BKSH->BKGS', q_BNH.reshape(B, K, N // K, H), k, preferred_element_type=jnp.float32) * H ** -.5
    p = jax.nn.softmax(jnp.where(seen_BS[:, None, None], s, -jnp.inf), axis=-1).astype(q_BNH.dtype)
    return jnp.einsum('BKGS,BKSH->BKGH', p, v).reshape(B, N, H)


CASES = {
  'one slot': Case(1, 1),
  'one block': Case(3, 40),
  'several blocks': Case(2, 600),
  'one query head a key head': Case(2, 50, heads=(3, 3, 8)),
  'one key head': Case(2, 50, heads=(6, 1, 8)),
  'window': Case(3, 300, window=70),
  'window of one': Case(3, 20, window=1),
  'int8': Case(3, 130, storage='int8'),
  'int4': Case(3, 130, storage='int4'),
  'int8 and window': Case(3, 600, storage='int8', window=300),
  'pages': Case(3, 64, page=16),
  'int8 in pages': Case(3, 64, storage='int8', page=8),
  'int4 in pages and window': Case(3, 64, storage='int4', page=16, window=20),
  'bfloat16': Case(2, 300, storage='bfloat16', dtype=jnp.bfloat16),
  'int8 for bfloat16': Case(2, 300, storage='int8', dtype=jnp.bfloat16),
  'int4 in tiles': Case(3, 136, storage='int4 tiles'),
  'int8 in tiles, window': Case(3, 600, storage='int8 tiles', window=300),
  'int4 in tiles, one token': Case(2, 8, heads=(6, 1, 8), storage='int4 tiles', window=1),
  'int4 in tiles and pages': Case(3, 64, storage='int4 tiles', page=16, window=20),
  'int4 in tiles for bfloat16': Case(2, 304, storage='int4 tiles', dtype=jnp.bfloat16),
  'float32 on bfloat16': Case(2, 40, storage='bfloat16'),
}


def bench(platform: str) -> dict[str, Case]:
  """Caches of Llama 3.1 in each storage on accelerators, a small one on a CPU."""
  if platform == 'cpu':
    shapes = {'1 x 32k': Case(1, 32768, heads=(8, 2, 64), ragged=False)}
    storages, dtype = ('float32', 'int8', 'int4', 'int4 tiles'), jnp.float32
  else:
    shapes = {
      'Llama-3.1-8B, 1 x 128k': Case(1, 131072, heads=(32, 8, 128), ragged=False),
      'Llama-3.1-8B, 64 x 8k': Case(64, 8192, heads=(32, 8, 128), ragged=False),
      'Llama-3.1-70B, 16 x 16k': Case(16, 16384, heads=(64, 8, 128), ragged=False),
      'pages of 128, 64 x 8k': Case(64, 8192, heads=(32, 8, 128), page=128, ragged=False),
    }
    storages, dtype = ('bfloat16', 'int8', 'int4'), jnp.bfloat16
  return {f'{name}, {storage}': dataclasses.replace(shape, storage=storage, dtype=dtype)
          for name, shape in shapes.items() for storage in storages}
