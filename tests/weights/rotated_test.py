"""A rotation keeps lengths, is its own inverse, and a rotated weight has the values that it had."""
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.weights.rotated import Rotated, block_of, innermost, within
from efficient_lm.weights.weight import Dense


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize('size, most, block', [(768, 4096, 256), (768, 64, 64), (7, 64, 1), (320, 1 << 20, 64)])
def test_the_block_of_a_dimension_is_the_largest_power_of_two_that_divides_it(size, most, block):
  assert block_of(size, most) == block


@pytest.mark.parametrize('axes, inputs, shape, equation', [
  ('FD', 'F', (8, 5), 'BTF,FD->BTD'), ('NHD', 'NH', (2, 8, 5), 'BTNH,NHD->BTD'), ('EFD', 'F', (3, 8, 5), 'grouped')])
def test_a_rotated_weight_multiplies_as_its_values_do(axes, inputs, shape, equation):
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
