"""The factor is one of the inverse; singular, dead and badly scaled inputs are no trouble."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.compression import hessian

factor = jax.jit(hessian.inverse_factor, static_argnames='damping')


def gram(M, K, seed=0, spread=1.0):
  """Of correlated rows, whose channels differ by factors of about 10^spread."""
  rng = np.random.default_rng(seed)
  x_MK = rng.normal(size=(M, K)) @ rng.normal(size=(K, K)) * 10 ** (spread * rng.normal(size=K))
  return (x_MK.T @ x_MK).astype(np.float32)


@pytest.mark.parametrize('M, spread', [(200, 0.0), (200, 1.0), (5, 0.0)], ids=['easy', 'spread', 'singular'])
def test_it_is_an_upper_triangular_factor_of_the_inverse(M, spread):
  K, damping = 24, 0.01
  upper_KK = np.asarray(factor(gram(M, K, spread=spread), damping=damping), np.float64)
  np.testing.assert_array_equal(upper_KK, np.triu(upper_KK))
  assert np.all(np.diagonal(upper_KK) > 0)
  damped_KK = np.asarray(hessian.scaled(jnp.asarray(gram(M, K, spread=spread))), np.float64) + damping * np.eye(K)
  # A condition number of at most K / damping, 2^-24 apiece, K of them added: 24 / 0.01 * 24 * 6e-8 = 3e-3 of the inverse.
  np.testing.assert_allclose(upper_KK.T @ upper_KK @ damped_KK, np.eye(K), atol=5e-3)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10 ** 6), st.sampled_from([1e-20, 1e-6, 1., 1e6, 1e30]))
def test_the_scale_of_the_inputs_does_not_matter(seed, scale):
  """Powers of two would be exact; of others the last bits differ. Its numbers span up to ten orders of magnitude, the least
  of which must not vanish as they are given (below 1e-38)."""
  whole = gram(40, 8, seed)
  a, b = (factor(whole / whole.max() * np.float32(s), damping=0.01) for s in (1, scale))
  np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max())


def test_inputs_that_were_never_active_take_no_part():
  dead = [1, 6]
  whole = gram(50, 8)
  whole[dead], whole[:, dead] = 0, 0
  live = [k for k in range(8) if k not in dead]
  upper_KK = np.asarray(factor(whole, damping=0.01))
  np.testing.assert_array_equal(upper_KK[dead][:, live], 0)
  np.testing.assert_array_equal(upper_KK[live][:, dead], 0)
  alone_KK = factor(whole[np.ix_(live, live)], damping=0.01)
  np.testing.assert_allclose(upper_KK[np.ix_(live, live)], alone_KK, rtol=1e-4, atol=1e-6)
  assert np.all(np.isfinite(factor(np.zeros((8, 8), np.float32), damping=0.01))), 'all of them dead'


def test_damping_grows_until_the_matrix_is_definite():
  """Rank 1 and no damping: the Cholesky factor is NaN, unless it is helped."""
  assert np.any(np.isnan(jnp.linalg.cholesky(jnp.asarray(gram(1, 16)))))
  both = np.stack([gram(1, 16), gram(200, 16)])
  found = factor(both, damping=0.0)
  assert np.all(np.isfinite(found))
  np.testing.assert_allclose(found[1], factor(both[1], damping=0.0), rtol=1e-5, err_msg='it needs no help and gets none')


def test_the_output_error_is_that_of_the_rows():
  rng = np.random.default_rng(0)
  x_MK, change_NK = rng.normal(size=(30, 8)).astype(np.float32), rng.normal(size=(5, 8)).astype(np.float32)
  expected = np.sum(np.square(x_MK @ change_NK.T), 0)
  np.testing.assert_allclose(hessian.output_error(change_NK, x_MK.T @ x_MK), expected, rtol=1e-4)
