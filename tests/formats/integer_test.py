"""Grids of equal steps have the levels, the zero points and the scales that their definitions name."""
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import fields
from efficient_lm.formats import FullRangeInt, Group, Int, MidRise, Ternary


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


HALF = [Int(scale_dtype='float16'), Int(bits=4, scales=Group(size=32), scale_dtype='float16'),
        Int(bits=4, symmetric=False, scale_dtype='float16'), FullRangeInt(scale_dtype='float16'),
        Ternary(scale_dtype='float16')]


@pytest.mark.parametrize('format', HALF, ids=lambda format: format.name)
@pytest.mark.parametrize('size', [0., 1e-4, 1e7])
def test_scales_of_half_precision_are_those_that_numbers_are_rounded_with(format, size):
  """They are positive and finite whatever the weights are, so that no number becomes NaN."""
  w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 64)) * size, jnp.float32)
  scales = format.scales_for(w)
  assert scales.scale.dtype == jnp.float16
  step = np.asarray(format.steps(scales)[0])
  positive = step > 0 if format.symmetric or scales.zero is not None else step != 0   # of either sign
  assert np.all(np.isfinite(step)) and np.all(positive) and step.dtype == np.float32
  codes = np.asarray(format.rounded(w, scales)).reshape(8, step.shape[1], -1) / step[..., None]
  np.testing.assert_array_equal(codes, np.round(codes))   # whole multiples of the scale in 16 bits: division is exact


def test_a_format_with_scales_of_32_bits_is_stored_as_it_always_was():
  assert fields.to_json(Int(bits=4)) == {'class': 'Int', 'bits': 4, 'scales': {'class': 'Channel'}, 'symmetric': True}
  assert fields.to_json(Int(scale_dtype='float16'))['scale_dtype'] == 'float16'
  assert fields.to_json(Ternary()) == {'class': 'Ternary', 'scales': {'class': 'Tensor'}}
  assert [field for field, _, _ in Int(scale_dtype='bfloat16').check()] == ['scale_dtype']


@pytest.mark.parametrize('format', HALF[:3], ids=lambda format: format.name)
def test_rounding_with_scales_of_half_precision_errs_by_half_a_step_and_keeps_what_is_on_the_grid(format):
  w = jnp.asarray(np.random.default_rng(1).normal(size=(8, 64)), jnp.float32)
  scales = format.scales_for(w)
  rounded, step = format.rounded(w, scales), np.repeat(format.steps(scales)[0], 64 // format.scales.counts(8, 64)[1], 1)
  # Half a step, and what the nearest scale leaves beyond the grid: 127 steps times 2^-11, both ends of an asymmetric one.
  assert np.all(np.abs(np.asarray(w - rounded)) <= np.abs(step) * (.5 + 255 * 2. ** -11))
  np.testing.assert_array_equal(format.decode(format.encode(w, scales)), rounded)
  if format.symmetric: np.testing.assert_array_equal(format.scales_for(w).scale, format.scales_for(rounded).scale)
