"""The smallest numbers of a group, found without sorting, are those that sorting finds."""
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from efficient_lm.compression.selection import lowest

found = jax.jit(lowest)
NUMBERS = st.one_of(st.floats(width=32, allow_nan=False),
                    st.sampled_from([0., -0., 1., -1., 2.**-149, -2.**-149, np.inf, -np.inf]))


def by_sorting(values, count):
  """The definition: of equal values the first go, zeros of either sign being equal."""
  order = np.argsort(np.where(values == 0, 0, values), kind='stable')
  gone = np.zeros(values.shape, bool)
  gone[order[:count]] = True
  return gone


@given(hnp.arrays(np.float32, (3, 24), elements=NUMBERS), st.lists(st.integers(0, 24), min_size=3, max_size=3))
@settings(deadline=None, max_examples=200)
def test_bisecting_bits_is_sorting_for_numbers_of_either_sign(values, counts):
  got = np.asarray(found(values, np.array(counts)[:, None]))
  for row, count, gone in zip(values, counts, got, strict=True): np.testing.assert_array_equal(gone, by_sorting(row, count))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_other_floats_are_compared_by_their_values(dtype):
  values = np.asarray(jax.numpy.asarray(np.random.default_rng(0).normal(size=500), dtype))
  for count in (0, 1, 250, 500):
    np.testing.assert_array_equal(found(values, count), by_sorting(np.asarray(values, np.float32), count))
