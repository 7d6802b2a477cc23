"""The fast attention agrees with the reference in value and gradient, on every kind of mask."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.ops.attention import attention

KINDS = {'plain': {}, 'window': {'window': 5}, 'scaled': {'scale': 0.3}, 'documents': {'segments': True},
         'documents in a window': {'segments': True, 'window': 7}}


def inputs(T, N=4, K=2, H=8, value=8, S=None):
  keys = jax.random.split(jax.random.key(T), 4)
  draw = lambda key, *shape: jax.random.normal(key, (2, *shape))
  return (draw(keys[0], T, N, H), draw(keys[1], S or T, K, H), draw(keys[2], S or T, K, value)), draw(keys[3], T, N, value)


@pytest.mark.parametrize('T, value', [(1, 8), (20, 8), (130, 12)])
@pytest.mark.parametrize('kind', KINDS)
def test_equals_the_reference(kind, T, value):
  options = dict(KINDS[kind])
  if options.pop('segments', False): options['segments_BS'] = jnp.cumsum(jnp.arange(T) % 9 == 8)[None].repeat(2, 0)
  qkv, g = inputs(T, value=value)
  def run(implementation, qkv):
    o, pull = jax.vjp(lambda *qkv: attention(*qkv, implementation=implementation, **options), *qkv)
    return o, *pull(g)
  # Softmax-weighted means of unit normals, and their gradients summed over at most 130 queries in another order.
  for got, wanted in zip(jax.jit(run, static_argnums=0)('xla', qkv), run('reference', qkv)):
    np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_no_output_depends_on_a_later_token():
  (q, k, v), _ = inputs(20)
  later = lambda a: a.at[:, 12:].add(1.0)
  np.testing.assert_array_equal(attention(q, k, v)[:, :12], attention(q, later(k), later(v))[:, :12])


def test_queries_at_an_offset_equal_those_rows_of_the_whole():
  (q, k, v), _ = inputs(20)
  part = jax.jit(lambda start: attention(q[:, 12:15], k, v, start=start))(12)
  np.testing.assert_allclose(part, attention(q, k, v)[:, 12:15], atol=1e-5)   # other shapes sum in another order
