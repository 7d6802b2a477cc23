"""Attention layers equal attention written out by hand, and see positions through differences only."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.models import spec

B, T, D, H = 2, 6, 16, 4
SITE = spec.Site(D, 1, 1e-6)
# Float32 sums of at most 32 terms of order one, in another order and through one softmax.
ROUNDING = dict(rtol=1e-4, atol=1e-5)


def grouped(num_heads=4, num_kv_heads=2, **changes):
  return spec.GroupedQuery(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=H, **changes)


def latent(query_rank=None, **changes):
  sizes = dict(num_heads=3, kv_rank=10, nope_dim=6, rope_dim=4, value_dim=5)
  return spec.Latent(query_rank=query_rank, **sizes, **changes)


LAYERS = {'grouped': grouped(), 'norm of a head': grouped(qk_norm='H'), 'norm of all heads': grouped(qk_norm='NH'),
          'window': grouped(window=3), 'latent': latent(), 'latent queries': latent(query_rank=7)}


def drawn(described, seed=0):
  """The layer with numbers drawn by numpy, norm scales too."""
  rng = np.random.default_rng(seed)
  abstract = jax.eval_shape(lambda: described.build(SITE, rngs=nnx.Rngs(0)))
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype), abstract)


def inputs(seed=1):
  x = np.random.default_rng(seed).normal(size=(B, T, D)).astype(np.float32)
  return x, np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))


@jax.jit
def run(layer, x, positions, segments=None):
  return layer(x, positions, segments)[0]


def by_hand(layer, x, positions, num_heads, num_kv_heads, window=None):
  """Multi-head attention one head and one query at a time; kv heads repeated for the query heads that share them."""
  q, k, v, o = (np.asarray(getattr(layer, name).materialize()) for name in ('query', 'key', 'value', 'output'))
  turn = np.exp(1j * positions[0][:, None] * layer.theta ** (-np.arange(H // 2) / (H // 2)))
  def rotated(rows_TH):
    pairs = (rows_TH[:, :H // 2] + 1j * rows_TH[:, H // 2:]) * turn
    return np.concatenate([pairs.real, pairs.imag], -1)
  y = np.zeros((B, T, D))
  for b in range(B):
    for n in range(num_heads):
      shared = n // (num_heads // num_kv_heads)
      queries, keys, values = rotated(x[b] @ q[:, n]), rotated(x[b] @ k[:, shared]), x[b] @ v[:, shared]
      for t in range(T):
        first = 0 if window is None else max(0, t - window + 1)
        p = np.exp(keys[first:t + 1] @ queries[t] / np.sqrt(H))
        y[b, t] += (p / p.sum()) @ values[first:t + 1] @ o[n]
  return y


@pytest.mark.parametrize('num_kv_heads', [4, 2, 1])
@pytest.mark.parametrize('window', [None, 3])
def test_grouped_query_attention_is_multi_head_attention_with_shared_keys_and_values(num_kv_heads, window):
  layer, (x, positions) = drawn(grouped(num_kv_heads=num_kv_heads, window=window)), inputs()
  expected = by_hand(layer, x, positions, 4, num_kv_heads, window)
  np.testing.assert_allclose(run(layer, x, positions), expected, **ROUNDING)


@pytest.mark.parametrize('name', LAYERS)
def test_only_differences_of_positions_matter(name):
  layer, (x, positions) = drawn(LAYERS[name]), inputs()
  # Angles of 20 radians are rounded to 20 * 2**-24, twenty times as much as those of one.
  np.testing.assert_allclose(run(layer, x, positions + 20), run(layer, x, positions), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', LAYERS)
def test_a_token_is_seen_by_later_ones_only(name):
  """Exactly: a masked score is -inf, its probability 0.0, and adding zero times a finite value changes no bit."""
  layer, (x, positions) = drawn(LAYERS[name]), inputs()
  other = x.copy()
  other[0, 3] += 1
  changed = np.argwhere((run(layer, x, positions) != run(layer, other, positions)).any(-1))
  last = T if name != 'window' else 3 + 3
  np.testing.assert_array_equal(changed, [[0, t] for t in range(3, last)])


@pytest.mark.parametrize('name', LAYERS)
def test_documents_do_not_see_each_other(name):
  layer, (x, positions) = drawn(LAYERS[name]), inputs()
  segments = np.array([[0, 0, 1, 1, 1, 2]] * B, np.int32)
  other = x.copy()
  other[1, 1] += 1
  changed = np.argwhere((run(layer, x, positions, segments) != run(layer, other, positions, segments)).any(-1))
  np.testing.assert_array_equal(changed, [[1, 1]])


def test_the_rope_layouts_differ_by_an_order_of_the_head_dimensions():
  """Reading queries and keys in the other layout's order turns one layer into the other; scores are sums over H."""
  half, (x, positions) = drawn(grouped(rope=spec.Rope(layout='half'))), inputs()
  interleaved = drawn(grouped(rope=spec.Rope(layout='interleaved')))
  order = np.concatenate([np.arange(0, H, 2), np.arange(1, H, 2)])
  for name in ('query', 'key'):
    weight = getattr(half, name)
    weight.array.set_value(getattr(interleaved, name).materialize()[..., order])
  np.testing.assert_allclose(run(half, x, positions), run(interleaved, x, positions), **ROUNDING)


@pytest.mark.parametrize('qk_norm', ['H', 'NH'])
def test_qk_norm_makes_scores_blind_to_the_size_of_queries(qk_norm):
  layer, (x, positions) = drawn(grouped(qk_norm=qk_norm)), inputs()
  larger = drawn(grouped(qk_norm=qk_norm))
  larger.query.array.set_value(layer.query.materialize() * 8)
  # The norm's eps of 1e-6 stands beside mean squares of order one.
  np.testing.assert_allclose(run(larger, x, positions), run(layer, x, positions), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('query_rank', [None, 7])
def test_absorbed_latent_attention_equals_expanded(query_rank):
  layer, (x, positions) = drawn(latent(query_rank=query_rank)), inputs()
  absorbed = jax.jit(lambda layer, x: layer(x, positions, cache=layer.init_cache(B, T, jnp.float32, spec.FloatCache()))[0])
  np.testing.assert_allclose(absorbed(layer, x), run(layer, x, positions), **ROUNDING)


@pytest.mark.parametrize('name, numbers', [('grouped', 2 * 2 * H), ('latent', 10 + 4)])
def test_a_cache_holds_per_token_what_the_layer_promises(name, numbers):
  cache = drawn(LAYERS[name]).init_cache(B, 9, jnp.bfloat16, spec.FloatCache())
  assert sum(array.size for array in jax.tree.leaves(cache)) == B * 9 * numbers
  assert all(array.dtype == jnp.bfloat16 for array in jax.tree.leaves(cache))
