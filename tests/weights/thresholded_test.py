"""Small inputs count as zero, all else is as the weight within has it, and a row that skips zeros gives the same sums."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.formats import Int
from efficient_lm.weights.quantized import round_to_nearest
from efficient_lm.weights.thresholded import WORTH, Skipping, Thresholded, skipped
from efficient_lm.weights.weight import Dense
from tests.weights.every import EQUATIONS, draw

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.mark.parametrize('kind', ['float', 'int8'])
@pytest.mark.parametrize('equation, inputs', EQUATIONS)
def test_it_multiplies_what_is_above_the_threshold(equation, inputs, kind):
  x_axes, axes = equation.split('->')[0].split(',')
  inner = Dense(draw(axes), axes, inputs)
  if kind == 'int8': inner = round_to_nearest(inner, Int())
  weight, x = Thresholded(inner, jnp.float32(0.5), 0.4), draw(x_axes, seed=1)
  above = jnp.where(jnp.abs(x) > 0.5, x, 0)
  np.testing.assert_array_equal(weight.contract(equation, x), inner.contract(equation, above))
  np.testing.assert_array_equal(weight.materialize(), inner.materialize())
  assert weight.shape == inner.shape and weight.kind == f'{inner.kind}, 40% of inputs zeroed'


def test_a_threshold_of_zero_changes_nothing():
  inner = Dense(draw('DF'), 'DF', 'D')
  x = draw('BTD')
  np.testing.assert_array_equal(Thresholded(inner, jnp.float32(0), 0.1).contract('BTD,DF->BTF', x),
                                inner.contract('BTD,DF->BTF', x))


def test_a_product_over_the_outputs_has_no_threshold():
  inner, x = Dense(draw('RNH'), 'RNH', 'R'), draw('BTNH')
  weight = Thresholded(inner, jnp.float32(9), 0.9)
  np.testing.assert_array_equal(weight.contract('BTNH,RNH->BTNR', x), inner.contract('BTNH,RNH->BTNR', x))


def test_layers_of_a_stack_have_thresholds_of_their_own():
  array, x = jnp.ones((2, 64, 1)), draw('BTD')
  weight = Thresholded(Dense(array, 'DF', 'D'), jnp.array([0.1, 1.]), 0.5)
  found = jax.lax.scan(lambda _, one: (None, one.contract('BTD,DF->BTF', x)), None, weight)[1]
  for layer, threshold in zip(found, (0.1, 1.)):
    np.testing.assert_allclose(layer[..., 0], jnp.sum(jnp.where(jnp.abs(x) > threshold, x, 0), -1), atol=1e-5)


@pytest.mark.parametrize('count', [0, 1, 5, 6, 64])
def test_a_row_that_skips_zeros_is_the_product(count):
  """Up to the most that is skipped to, and beyond. Small integers: any order of summation is exact."""
  rng = np.random.default_rng(count)
  x, w = np.zeros(64, np.float32), rng.integers(-4, 5, (64, 7)).astype(np.float32)
  x[rng.permutation(64)[:count]] = rng.integers(1, 5, count)
  np.testing.assert_array_equal(jax.jit(skipped, static_argnums=2)(x, w, 5), x @ w)


@pytest.mark.parametrize('rows', [1, 3])
@pytest.mark.parametrize('equation, inputs', EQUATIONS)
def test_for_decoding_zeros_are_skipped_where_they_are_worth_it(equation, inputs, rows):
  x_axes, axes = equation.split('->')[0].split(',')
  inner = Dense(draw(axes), axes, inputs)
  x = draw(x_axes, seed=1)[:1, :rows]
  for sparsity, kind in ((WORTH, Skipping), (WORTH - 0.1, type(inner.for_decoding()))):
    weight = Thresholded(inner, jnp.float32(1.8), sparsity)
    ready = weight.for_decoding()
    assert isinstance(ready.inner, kind) and ready.shape == weight.shape and ready.axes == weight.axes
    np.testing.assert_array_equal(ready.materialize(), weight.materialize())
    # Sums of at most 64 products of order one, in another order.
    np.testing.assert_allclose(ready.contract(equation, x), weight.contract(equation, x), atol=2e-5)
