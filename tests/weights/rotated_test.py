"""A rotation keeps lengths, is its own inverse, and a rotated weight is worth what it was."""
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.weights.rotated import Rotated, block_of, hadamard, innermost, sylvester, within
from efficient_lm.weights.weight import Dense


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize('size', [1, 2, 8])
def test_sylvester_s_matrix_is_orthogonal_and_symmetric(size):
  H = sylvester(size)
  np.testing.assert_array_equal(H @ H.T, size * np.eye(size))
  np.testing.assert_array_equal(H, H.T)


@pytest.mark.parametrize('K, block', [(8, 8), (24, 8), (24, 1), (256, 128), (512, 512)])
def test_each_block_is_multiplied_by_its_matrix_and_twice_is_the_identity(K, block):
  x = draw(3, K)
  whole = np.kron(np.eye(K // block), sylvester(block)) / np.sqrt(block)
  # float32 sums of `block` numbers of order one.
  np.testing.assert_allclose(hadamard(x, block), np.asarray(x) @ whole, atol=1e-5)
  np.testing.assert_allclose(hadamard(hadamard(x, block), block), x, atol=1e-5)
  np.testing.assert_allclose(jnp.linalg.norm(hadamard(x, block), axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_one_large_channel_is_spread_over_its_block():
  np.testing.assert_allclose(jnp.abs(hadamard(jnp.zeros(16).at[5].set(8.), 16)), 2.)


@pytest.mark.parametrize('K, block', [(24, 16), (24, 3)])
def test_a_block_that_does_not_fit_is_refused(K, block):
  with pytest.raises(ValueError, match=f'blocks of {block} do not rotate {K} numbers'): hadamard(draw(K), block)


@pytest.mark.parametrize('size, most, block', [(768, 4096, 256), (768, 64, 64), (7, 64, 1), (320, 1 << 20, 64)])
def test_the_block_of_a_dimension_is_the_largest_power_of_two_that_divides_it(size, most, block):
  assert block_of(size, most) == block


@pytest.mark.parametrize('axes, inputs, shape, equation', [
  ('FD', 'F', (8, 5), 'BTF,FD->BTD'), ('NHD', 'NH', (2, 8, 5), 'BTNH,NHD->BTD'), ('EFD', 'F', (3, 8, 5), 'grouped')])
def test_a_rotated_weight_multiplies_as_what_it_is_worth(axes, inputs, shape, equation):
  weight = Rotated(Dense(draw(*shape), axes, inputs), 8)
  plain = Dense(weight.materialize(), axes, inputs)
  assert (weight.axes, weight.inputs) == (axes, inputs) and not np.allclose(plain.materialize(), weight.inner.materialize())
  if equation == 'grouped':
    x, sizes_E = draw(12, 8, seed=1), jnp.array([5, 0, 4])
    np.testing.assert_allclose(weight.contract_grouped(x, sizes_E), plain.contract_grouped(x, sizes_E), atol=1e-5)
  else:
    x = draw(2, 3, *shape[:len(inputs)], seed=1)
    np.testing.assert_allclose(weight.contract(equation, x), plain.contract(equation, x), atol=2e-5)


def test_changes_go_inside_of_a_rotation():
  dense = Dense(draw(8, 4), 'FD', 'F')
  other = Dense(draw(8, 4, seed=1), 'FD', 'F')
  changed = within(Rotated(dense, 4), lambda inner: other if inner is dense else None)
  assert isinstance(changed, Rotated) and changed.block == 4 and innermost(changed) is other
  assert within(dense, lambda inner: other) is other and innermost(dense) is dense
