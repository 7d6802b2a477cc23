"""Grids of equal steps have the levels, the zero points and the scales that their definitions name."""
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.formats import FullRangeInt, Int, MidRise, Ternary


def test_a_symmetric_grid_has_as_many_levels_above_as_below():
  y = jnp.asarray([-9., -7.5, -0.5, 0.5, 1.5, 2.5, 7.4, 9.])
  np.testing.assert_array_equal(Int(bits=4).codes(y), [-7, -7, 0, 0, 2, 2, 7, 7])


def test_a_zero_point_is_whole_and_zero_stays_zero():
  """For numbers from -1 to 3, which are not symmetric around zero, all sixteen levels are used."""
  format, w = Int(bits=4, symmetric=False), jnp.linspace(-1, 3, 64)[None]
  scales = format.scales_for(w)
  assert scales.zero.dtype == jnp.int8
  codes = format.codes(w / scales.scale + scales.zero)
  assert (int(codes.min()), int(codes.max())) == (-8, 7)
  assert format.rounded(jnp.zeros((1, 64)), scales).max() == 0
  # The range contains zero also where all numbers are positive.
  assert format.rounded(jnp.zeros((1, 64)), format.scales_for(w + 5)).max() == 0


@pytest.mark.parametrize('sign', [1, -1])
def test_a_full_range_has_its_additional_level_on_the_side_of_the_largest_magnitude(sign):
  """Here 2^(bits - 1) steps of 1/2 or 1 reach it exactly, and all numbers lie on the grid, the largest on its side too."""
  w = sign * jnp.asarray([[2., -1.5, 1., 0.5, -0.5, 0., 1.5, -1.]])
  format = FullRangeInt(bits=3)
  scales = format.scales_for(w)
  assert float(scales.scale[0, 0]) == -0.5 * sign
  np.testing.assert_array_equal(format.rounded(w, scales), w)


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_a_full_range_has_no_longer_steps_than_balanced_levels_and_mostly_shorter_ones(bits):
  w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
  full, balanced = (np.abs(format.scales_for(w).scale) for format in (FullRangeInt(bits=bits), Int(bits=bits)))
  limit = 2 ** (bits - 1)
  assert np.all(full <= balanced * (limit - 1) / (limit - 0.5) * (1 + 1e-6)), 'at most as if half a step were cut off'
  assert np.any(np.isclose(full, balanced * (limit - 1) / limit)), 'a level more where the other side is shorter'


def test_mid_rise_has_all_levels_and_no_zero():
  y = jnp.asarray([-9., -1.2, -0.2, 0.2, 1.2, 9.])
  format = MidRise(bits=2)
  np.testing.assert_array_equal(format.numbers(format.codes(y)), [-1.5, -1.5, -.5, .5, 1.5, 1.5])


def test_ternary_is_scaled_by_the_mean_magnitude_of_the_whole_matrix():
  """Ma et al. 2024, eq. 1-3."""
  w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)
  gamma = np.abs(w).mean()
  wanted = np.clip(np.round(w / gamma), -1, 1) * gamma
  np.testing.assert_allclose(Ternary().rounded(w, Ternary().scales_for(w)), wanted, rtol=1e-6)


@pytest.mark.parametrize('format', [Int(bits=5), FullRangeInt(bits=5), MidRise(bits=1)], ids=repr)
def test_bits_that_have_no_storage_are_named(format):
  assert [field for field, _, _ in format.check()] == ['bits']
