"""Hadamard's matrix is orthogonal, and a rotation by it keeps lengths and is its own inverse."""
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.ops.hadamard import hadamard, sylvester


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize('size', [1, 2, 8, 64])
def test_the_matrix_is_orthogonal_and_symmetric_and_its_entries_are_signs(size):
  H = sylvester(size)
  np.testing.assert_array_equal(H @ H.T, size * np.eye(size))
  np.testing.assert_array_equal(H, H.T)
  np.testing.assert_array_equal(np.abs(H), np.ones((size, size)))


@pytest.mark.parametrize('I, block', [(8, 8), (24, 8), (24, 1), (256, 128), (512, 512)])
def test_each_block_is_multiplied_by_its_matrix_and_twice_is_the_identity(I, block):
  x = draw(3, I)
  whole = np.kron(np.eye(I // block), sylvester(block)) / np.sqrt(block)
  # float32 sums of `block` numbers of order one.
  np.testing.assert_allclose(hadamard(x, block), np.asarray(x) @ whole, atol=1e-5)
  np.testing.assert_allclose(hadamard(hadamard(x, block), block), x, atol=1e-5)
  np.testing.assert_allclose(jnp.linalg.norm(hadamard(x, block), axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_one_large_channel_is_spread_over_its_block():
  np.testing.assert_allclose(jnp.abs(hadamard(jnp.zeros(16).at[5].set(8.), 16)), 2.)


@pytest.mark.parametrize('I, block', [(24, 16), (24, 3), (24, 0)])
def test_a_block_that_does_not_fit_is_refused(I, block):
  with pytest.raises(ValueError, match=f'blocks of {block} do not rotate {I} numbers'): hadamard(draw(I), block)


@pytest.mark.parametrize('size', [0, 3, 12])
def test_a_matrix_of_another_size_than_a_power_of_two_is_refused(size):
  with pytest.raises(ValueError, match=f'a Hadamard matrix of {size} rows'): sylvester(size)
