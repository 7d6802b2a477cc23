"""The fast attention agrees with the reference in value and gradient, on every kind of mask."""
import jax
import numpy as np
import pytest

from efficient_lm.ops.attention import attention
from efficient_lm.ops.attention.cases import CASES

# Softmax-weighted means of unit normals, and their gradients summed over at most 400 queries in another order; in
# bfloat16 results, probabilities and what flows back are rounded to 8 bits, relative to the largest number.
TOLERANCE = {'float32': 2e-5, 'bfloat16': 2e-2}


@pytest.mark.parametrize('name', CASES)
def test_equals_the_reference(name):
  qkv, g, options = CASES[name].arrays()
  def run(implementation, qkv):
    o, pull = jax.vjp(lambda *qkv: attention(*qkv, implementation=implementation, **options), *qkv)
    return o, *pull(g)
  for got, wanted in zip(jax.jit(run, static_argnums=0)('xla', qkv), run('reference', qkv)):
    assert got.dtype == wanted.dtype
    got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE[qkv[0].dtype.name] * max(1, np.abs(wanted).max()))


def test_scores_are_scaled_as_asked():
  qkv, _, _ = CASES['one strip'].arrays()
  plain, scaled = (attention(*qkv, scale=scale) for scale in (None, 0.3))
  np.testing.assert_allclose(scaled, attention(*qkv, scale=0.3, implementation='reference'), atol=2e-5)
  assert np.abs(scaled - plain).max() > 1e-2


def inputs(T, N=4, K=2, H=8):
  keys = jax.random.split(jax.random.key(T), 3)
  return tuple(jax.random.normal(key, (2, T, heads, H)) for key, heads in zip(keys, (N, K, K)))


def test_no_output_depends_on_a_later_token():
  q, k, v = inputs(20)
  later = lambda a: a.at[:, 12:].add(1.0)
  np.testing.assert_array_equal(attention(q, k, v)[:, :12], attention(q, later(k), later(v))[:, :12])


def test_queries_at_an_offset_equal_those_rows_of_the_whole():
  q, k, v = inputs(20)
  part = jax.jit(lambda start: attention(q[:, 12:15], k, v, start=start))(12)
  np.testing.assert_allclose(part, attention(q, k, v)[:, 12:15], atol=1e-5)   # other shapes sum in another order
