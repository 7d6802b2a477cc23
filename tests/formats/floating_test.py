"""Grids whose steps grow with the numbers: float8, NF4 and the block formats."""
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from efficient_lm.formats import MXFP4, MXFP8, NF4, NVFP4, Float8
from efficient_lm.formats.floating import E2M1, exponent_above

Y = np.concatenate([np.linspace(-8, 8, 4001), np.float32(2.) ** np.arange(-20, 3)]).astype(np.float32)


@pytest.mark.parametrize('variant, dtype', [('e4m3', ml_dtypes.float8_e4m3fn), ('e5m2', ml_dtypes.float8_e5m2)])
def test_float8_rounds_as_its_dtype_does_and_stops_at_the_largest(variant, dtype):
  format = Float8(variant=variant)
  np.testing.assert_array_equal(format.numbers(format.codes(jnp.asarray(Y))), Y.astype(dtype).astype(np.float32))
  assert format.numbers(format.codes(jnp.asarray([-1e9, 1e9]))).tolist() == [-format.largest, format.largest]


def test_floats_of_four_bits_round_as_their_dtype_does():
  format = MXFP4()
  wanted = Y.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
  np.testing.assert_array_equal(format.numbers(format.codes(jnp.asarray(Y))), wanted)


def test_normal_quantiles_are_sixteen_and_begin_and_end_at_one():
  numbers = np.asarray(NF4().numbers(jnp.arange(16)))
  assert numbers[0] == -1 and numbers[15] == 1 and numbers[7] == 0 and np.all(np.diff(numbers) > 0)
  np.testing.assert_array_equal(NF4().codes(jnp.asarray(numbers)), np.arange(16))


@pytest.mark.parametrize('format', [MXFP8(), MXFP4()], ids=lambda format: format.element)
def test_the_shared_scale_is_the_least_power_of_two_that_cuts_nothing_off(format):
  w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)) * [[1e-6], [1], [1e6], [0]], jnp.float32)
  step = np.asarray(format.steps(format.scales_for(w))[0])
  assert np.all(np.log2(step) == np.round(np.log2(step)))
  largest = np.abs(np.asarray(w).reshape(4, 2, 32)).max(-1)
  assert np.all(largest <= step * format.largest) and np.all(largest[:3] > step[:3] / 2 * format.largest)
  assert format.scales_for(w).scale.dtype == jnp.uint8


def test_two_levels_of_scales_hold_groups_of_any_size():
  """The largest group determines the outer scale; a tiny group has the smallest positive float8."""
  w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32)) * np.repeat([1e-9, 1.], 16), jnp.float32)
  scales = NVFP4().scales_for(w)
  assert scales.scale.dtype == jnp.float8_e4m3fn and scales.outer.shape == (1, 1)
  assert np.all(np.asarray(scales.scale, np.float32) > 0)
  error = np.abs(np.asarray(NVFP4().rounded(w, scales) - w))[:, 16:]
  # Half the widest step, which is 2, of a scale that rounding may have enlarged by a 16th.
  assert np.all(error <= np.abs(np.asarray(w))[:, 16:].max() / 6 * 1.07)


def test_exponents_are_whole_and_just_above():
  x = jnp.asarray([1., 1.001, 0.75, 2. ** -10, 3.])
  assert exponent_above(x).tolist() == [0, 1, 0, -10, 2]
  assert E2M1[-1] == MXFP4.largest


def test_an_unknown_variant_is_named():
  assert [field for field, _, _ in Float8(variant='e3m4').check()] == ['variant']
