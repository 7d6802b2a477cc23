"""Every implementation of the grouped product agrees with the reference, in value and in gradient."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.ops.grouped_matmul import grouped_matmul

CASES = {'equal': [4, 4, 4, 4], 'empty groups': [0, 9, 0, 7], 'one group': [0, 16, 0, 0], 'unequal': [1, 13, 2, 0],
         'a tail of rows': [3, 0, 5, 1], 'nothing': [0, 0, 0, 0]}


def inputs(sizes, M=16, K=8, N=12):
  keys = jax.random.split(jax.random.key(sum(sizes)), 3)
  return (jax.random.normal(keys[0], (M, K)), jax.random.normal(keys[1], (len(sizes), K, N)),
          jnp.array(sizes, jnp.int32), jax.random.normal(keys[2], (M, N)))


def value_and_gradients(implementation, x_MK, w_EKN, sizes_E, g_MN):
  run = lambda x, w: grouped_matmul(x, w, sizes_E, implementation=implementation)
  y_MN, pull = jax.vjp(run, x_MK, w_EKN)
  return y_MN, *pull(g_MN)


@pytest.mark.parametrize('implementation', ['auto', 'xla', 'ragged_dot'])
@pytest.mark.parametrize('name', CASES)
def test_equals_the_reference(name, implementation):
  arguments = inputs(CASES[name])
  # Sums of at most 16 products of unit normals, in another order: a few float32 roundings.
  for got, wanted in zip(jax.jit(value_and_gradients, static_argnums=0)(implementation, *arguments),
                         value_and_gradients('reference', *arguments)):
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_each_row_meets_its_own_matrix():
  w_E11 = jnp.array([[[10.]], [[100.]], [[1000.]]])
  y = grouped_matmul(jnp.arange(1., 6)[:, None], w_E11, jnp.array([2, 0, 2]))
  assert y[:, 0].tolist() == [10, 20, 3000, 4000, 0]


def test_rows_past_the_sum_may_hold_anything():
  x_MK, w_EKN, sizes_E, g_MN = inputs([3, 0, 5, 1])
  broken = x_MK.at[9:].set(jnp.nan)
  for got, wanted in zip(value_and_gradients('xla', broken, w_EKN, sizes_E, g_MN),
                         value_and_gradients('xla', x_MK, w_EKN, sizes_E, g_MN)):
    np.testing.assert_array_equal(got, wanted)


def test_an_implementation_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match='no implementation'):
    grouped_matmul(*inputs([16])[:3], implementation='cuda')
