"""Ranges end a grid where they say, and the search for the least error never enlarges it."""
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.formats import AbsMax, Int, MeanSquaredError, Percentile
from efficient_lm.formats.ranges import Reduce
from tests.formats.every import FORMATS, NAMES


def matrix(outlier=1.):
  w = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
  w[:, 5] *= outlier
  return jnp.asarray(w)


def error(format, range, w):
  return float(jnp.mean(jnp.square(format.rounded(w, format.scales_for(w, range)) - w)))


@pytest.mark.thinned
@pytest.mark.parametrize('format', FORMATS, ids=NAMES)
def test_the_range_of_least_error_is_never_worse_than_the_formats_own(format):
  assert error(format, MeanSquaredError(), matrix(3.)) <= error(format, None, matrix(3.))


def test_an_outlier_is_cut_off_where_that_errs_less():
  """If one number in 64 is three times as large, clipping it costs less than longer steps for all others."""
  assert error(Int(bits=3), MeanSquaredError(), matrix(3.)) < 0.8 * error(Int(bits=3), AbsMax(), matrix(3.))


def test_all_of_the_percentiles_is_the_largest():
  for format in (Int(bits=4), Int(bits=4, symmetric=False)):
    whole, wanted = (format.scales_for(matrix(), range) for range in (Percentile(percent=100), AbsMax()))
    np.testing.assert_allclose(whole.scale, wanted.scale, rtol=1e-6)


def test_a_percentile_leaves_so_many_out():
  format = Int(bits=8)
  w = matrix()
  step = np.asarray(format.steps(format.scales_for(w, Percentile(percent=90)))[0])
  beyond = np.abs(np.asarray(w)) > step * format.largest * (1 + 1e-6)
  np.testing.assert_array_equal(beyond.sum(1), 7)   # of 64, the 90th percentile lies between the 57th and the 58th


def test_devices_that_share_a_tile_have_no_percentile():
  with pytest.raises(ValueError, match='choose AbsMax'): Int().scales_for(matrix(), Percentile(), Reduce(('tensor',)))


def test_wrong_settings_are_named():
  assert [field for field, _, _ in Percentile(percent=30).check()] == ['percent']
  assert [field for field, _, _ in MeanSquaredError(candidates=0, least=0).check()] == ['candidates', 'least']
