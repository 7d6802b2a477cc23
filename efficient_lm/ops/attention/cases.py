"""Attention on which every implementation must agree, and cases that benchmarks time."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.ops.attention import attention


@dataclasses.dataclass(frozen=True)
class Case:
  """B rows of T queries on S keys. heads: (N, K). dims: the head dims of keys and of values.

  documents: the number that each row is cut into, at different places in each row; with 0 there are no document ids.
  of: 'forward'; 'backward', the gradients alone; or 'all', results and gradients.
  """
  tokens: tuple[int, int, int]
  heads: tuple[int, int] = (4, 4)
  dims: tuple[int, int] = (16, 16)
  start: int = 0
  window: int | None = None
  documents: int = 0
  dtype: str = 'float32'
  of: str = 'all'

  @functools.cached_property
  def segments_BS(self) -> np.ndarray:
    """int32 document ids."""
    (B, _, S), random = self.tokens, np.random.default_rng(self.documents)
    ends = np.sort(np.stack([random.permutation(S - 1)[:max(self.documents - 1, 0)] + 1 for _ in range(B)]), axis=1)
    return (np.arange(S) >= ends[..., None]).sum(1).astype(np.int32)

  def arguments(self) -> tuple:
    """q_BTNH, k_BSKH, v_BSKH, a cotangent of the result, and document ids or None."""
    (B, T, S), (N, K), (H, value) = self.tokens, self.heads, self.dims
    keys = jax.random.split(jax.random.key(T + S), 4)
    draw = lambda key, *shape: jax.random.normal(key, (B, *shape), self.dtype)
    return (draw(keys[0], T, N, H), draw(keys[1], S, K, H), draw(keys[2], S, K, value), draw(keys[3], T, N, value),
            jnp.asarray(self.segments_BS) if self.documents else None)

  def call(self, implementation: str, tiles: int | None = None):
    """A function of the arguments that computes what `of` names. tiles: tokens of a block of 'splash'."""
    if tiles is None: return self._passes(functools.partial(attention, implementation=implementation))
    from efficient_lm.ops.attention import splash
    return self._passes(functools.partial(splash.attention, scale=self.dims[0] ** -0.5, block=tiles))

  def baselines(self) -> dict:
    """The attention of jax.nn, which builds all scores."""
    return {'jax.nn.dot_product_attention': self.call('jax')} if self.dims[0] == self.dims[1] else {}

  def _passes(self, run):
    def function(q_BTNH, k_BSKH, v_BSKH, g_BTNH, segments_BS):
      one = functools.partial(run, start=self.start, segments_BS=segments_BS, window=self.window)
      if self.of == 'forward': return one(q_BTNH, k_BSKH, v_BSKH)
      o_BTNH, pull = jax.vjp(one, q_BTNH, k_BSKH, v_BSKH)
      return pull(g_BTNH) if self.of == 'backward' else (o_BTNH, *pull(g_BTNH))
    return function

  @property
  def flops(self) -> float:
    """Those of the visible pairs of query and key. The backward pass counts twice the forward one, without the scores that
    it recomputes."""
    query = self.start + np.arange(self.tokens[1])
    begin = np.stack([np.searchsorted(ids, ids[query]) for ids in self.segments_BS])
    if self.window is not None: begin = np.maximum(begin, query - self.window + 1)
    pairs = int((query - begin + 1).sum())
    return 2.0 * pairs * self.heads[0] * sum(self.dims) * {'forward': 1, 'backward': 2, 'all': 3}[self.of]

  @property
  def bytes(self) -> float:
    """Operands are read and results are written once; in the backward pass all of these and their gradients once."""
    (B, T, S), (N, K), (H, value) = self.tokens, self.heads, self.dims
    once = B * (T * N + S * K) * (H + value) * jnp.dtype(self.dtype).itemsize
    return float(once * {'forward': 1, 'backward': 2, 'all': 3}[self.of])

  @property
  def precision(self) -> str:
    return self.dtype

  @property
  def tolerance(self) -> float:
    # Results are softmax-weighted means of unit normals, and gradients are summed over at most 400 queries, in another
    # order. In 16 bits, results, probabilities and cotangents are rounded to 8 bits (bfloat16) or 11 (float16), and the
    # roundings add up.
    return {'float32': 2e-5, 'bfloat16': 2e-2, 'float16': 3e-3}[self.dtype]


CASES = {
  'one token': Case((2, 1, 1)),
  'one strip': Case((2, 37, 37)),
  'several strips': Case((2, 300, 300)),
  'grouped heads': Case((2, 260, 260), heads=(6, 2)),
  'one key head': Case((2, 130, 130), heads=(4, 1)),
  'values of another size': Case((2, 150, 150), dims=(16, 8)),
  'window within a strip': Case((2, 300, 300), window=5),
  'window across strips': Case((2, 400, 400), window=140, heads=(4, 2)),
  'window of one': Case((2, 9, 9), window=1),
  'documents': Case((2, 280, 280), documents=4, heads=(4, 2)),
  'documents and window': Case((2, 280, 280), documents=4, window=50),
  'decode': Case((2, 1, 64), start=40, heads=(4, 2)),
  'decode with window': Case((2, 1, 64), start=63, window=7),
  'prefill of a part': Case((2, 10, 64), start=20, heads=(4, 1), dims=(16, 8)),
  'prefill with documents': Case((2, 10, 64), start=54, documents=4),
  'bfloat16': Case((2, 200, 200), heads=(4, 2), dtype='bfloat16'),
}


def bench(platform: str) -> dict[str, Case]:
  """Small models on CPU; elsewhere the heads of Llama-3 8B, also with Mistral 7B's window, and those of DeepSeek-V2-Lite."""
  if platform == 'cpu':
    return {f'8 x 256 tokens, 6 heads of 64, {of}': Case((8, 256, 256), (6, 6), (64, 64), of=of)
            for of in ('forward', 'all')} | {
            '1 x 2048 tokens, 6 heads on 2 of 64, 4 documents, all': Case((1, 2048, 2048), (6, 2), (64, 64), documents=4)}
  llama = dict(heads=(32, 8), dims=(128, 128), dtype='bfloat16')
  cases = {f'{B} x {T} tokens, 32 heads on 8 of 128, {documents} documents, {of}':
             Case((B, T, T), documents=documents, of=of, **llama)
           for B, T, documents in ((4, 4096, 0), (4, 4096, 4), (1, 16384, 0)) for of in ('forward', 'backward')}
  cases['1 x 16384 tokens, 32 heads on 8 of 128, window 4096, all'] = Case((1, 16384, 16384), window=4096, **llama)
  cases['2 x 4096 tokens, 16 heads of 192 and 128, all'] = Case((2, 4096, 4096), (16, 16), (192, 128), dtype='bfloat16')
  return cases
