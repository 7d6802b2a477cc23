"""Every implementation of the grouped product agrees with the reference, in value and in gradient."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.ops.grouped_matmul import grouped_matmul
from efficient_lm.ops.grouped_matmul.cases import CASES

# Sums of at most 101 products of unit normals, in another order: a few float32 roundings. In bfloat16 sums are float32
# too and only the result is rounded, to 8 bits.
TOLERANCE = {'float32': 1e-5, 'bfloat16': 2 ** -8}


def value_and_gradients(implementation, x_MK, w_EKN, sizes_E, g_MN):
  run = lambda x, w: grouped_matmul(x, w, sizes_E, implementation=implementation)
  y_MN, pull = jax.vjp(run, x_MK, w_EKN)
  return y_MN, *pull(g_MN)


@pytest.mark.parametrize('implementation', ['auto', 'xla', 'ragged_dot'])
@pytest.mark.parametrize('name', CASES)
def test_equals_the_reference(name, implementation):
  case = CASES[name]
  x_MK, w_EKN, sizes_E, g_MN = case.arrays()
  arguments = (x_MK, w_EKN, sizes_E, g_MN)
  # The reference has no say in what rows past the groups do: it is given zeros.
  clean = (jnp.where(jnp.arange(case.rows)[:, None] < sum(case.sizes), x_MK, 0), w_EKN, sizes_E, g_MN)
  for got, wanted in zip(jax.jit(value_and_gradients, static_argnums=0)(implementation, *arguments),
                         value_and_gradients('reference', *clean)):
    assert got.dtype == wanted.dtype
    got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE[x_MK.dtype.name] * max(1, np.abs(wanted).max(initial=0)))


def test_each_row_meets_its_own_matrix():
  w_E11 = jnp.array([[[10.]], [[100.]], [[1000.]]])
  y = grouped_matmul(jnp.arange(1., 6)[:, None], w_E11, jnp.array([2, 0, 2]))
  assert y[:, 0].tolist() == [10, 20, 3000, 4000, 0]


def test_rows_past_the_sum_may_hold_anything():
  x_MK, w_EKN, sizes_E, g_MN = CASES['rows left over'].arrays()
  assert np.isnan(x_MK[45:]).all()
  cleaned = x_MK.at[45:].set(7)
  for got, wanted in zip(value_and_gradients('xla', x_MK, w_EKN, sizes_E, g_MN),
                         value_and_gradients('xla', cleaned, w_EKN, sizes_E, g_MN)):
    np.testing.assert_array_equal(got, wanted)


def test_an_implementation_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match='no implementation'):
    grouped_matmul(*CASES['one group'].arrays()[:3], implementation='cuda')
