"""Absmax rounding errs by at most half a step, uses the whole grid, and leaves zeros alone."""
import hypothesis
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies

from efficient_lm.ops.absmax import SMALL, TINY, largest, nearest, scale_of, values_and_scale


@hypothesis.given(strategies.sampled_from([127, 7, 3, 1]), strategies.sampled_from([0, -1]), strategies.integers(-30, 30),
                  strategies.integers(0, 2 ** 30))
@hypothesis.settings(max_examples=25, deadline=None)
def test_integers_err_by_at_most_half_a_step_and_reach_the_end_of_the_grid(limit, axis, size, seed):
  x = jnp.asarray(np.random.default_rng(seed).normal(size=(5, 12)) ** 3 * 10. ** size, jnp.float32)
  values, scale = values_and_scale(x, axis=axis, limit=limit)
  assert values.dtype == jnp.int8 and values.shape == x.shape and scale.shape == ((1, 12) if axis == 0 else (5, 1))
  # The quotient and the product that undoes it are rounded to 24 bits: 2 * limit * 2^-24 of a step.
  assert (jnp.abs(values * scale - x) <= scale * (0.5 + limit * 2 ** -23)).all()
  assert (jnp.abs(values).max(axis) == limit).all()


@pytest.mark.parametrize('name', ['float8_e4m3fn', 'float8_e5m2'])
def test_float8_is_what_its_dtype_rounds_to_and_stops_at_the_largest(name):
  y = np.linspace(-1.2, 1.2, 4001, dtype=np.float32) * np.float32(largest(name))
  within = np.clip(y, -largest(name), largest(name)).astype(getattr(ml_dtypes, name))
  np.testing.assert_array_equal(nearest(jnp.asarray(y), name).astype(jnp.float32), within.astype(np.float32))


def test_ties_go_to_the_even_and_the_grid_ends_where_it_is_told():
  y = jnp.asarray([-9., -7.5, -0.5, 0.5, 1.5, 2.5, 7.4, 9.])
  assert nearest(y, limit=7).tolist() == [-7, -7, 0, 0, 2, 2, 7, 7]
  assert nearest(y, limit=7, lowest=-8).tolist() == [-8, -8, 0, 0, 2, 2, 7, 7]
  assert nearest(jnp.asarray([-300., 300.])).tolist() == [-127, 127]


@pytest.mark.parametrize('least', [None, SMALL])
@pytest.mark.parametrize('limit', [1., 1.5, 7., 127., 448.])
def test_the_scale_of_nothing_is_a_normal_number_and_so_is_its_reciprocal(limit, least):
  scale = np.asarray(scale_of(jnp.asarray([0., 1e-45, 1.]), limit, least))
  assert (scale >= TINY).all() and np.isfinite(1 / scale).all() and scale[2] == np.float32(1) / np.float32(limit)
  assert scale[0] == scale[1] == (TINY if least is None else np.float32(SMALL) / np.float32(limit))
  assert not values_and_scale(jnp.zeros((2, 3)), limit=limit, least=least)[0].any()


def test_the_largest_values_are_those_of_the_dtypes():
  assert [largest(name) for name in ('int8', 'float8_e4m3fn', 'float8_e5m2')] == [127, 448, 57344]
