"""Scores: what is worth least goes, an earlier mask first; magnitude asks for nothing."""
import jax.numpy as jnp
import numpy as np

from efficient_lm.compression.patterns import NofM, PerMatrix, PerOutput
from efficient_lm.compression.scores import Magnitude

W_OI = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8)), jnp.float32)


def test_the_smallest_magnitudes_go_and_the_matrix_stays():
  w_OI, keep_OI = Magnitude().pruned(W_OI, None, {}, PerOutput(), 0.5)
  assert w_OI is W_OI
  np.testing.assert_array_equal(np.asarray(keep_OI), np.argsort(np.argsort(np.abs(W_OI), -1), -1) >= 4)


def test_zeros_of_an_earlier_mask_count_and_none_comes_back():
  _, first = Magnitude().pruned(W_OI, None, {}, NofM(), 0.5)
  for share in (0.5, 0.75):
    _, second = Magnitude().pruned(W_OI, first, {}, PerMatrix(), share)
    assert not np.any(second & ~first) and np.mean(second) == 1 - share


def test_a_mask_over_what_is_zero_takes_none_of_what_is_kept_in_its_place():
  """A kept zero, as of an input that was never active, is worth as little as one can be, and still is kept longer."""
  w_OI, keep_OI = jnp.zeros((1, 8)), jnp.arange(8)[None] >= 4
  _, again = Magnitude().pruned(w_OI, keep_OI, {}, PerMatrix(), 0.5)
  np.testing.assert_array_equal(again, keep_OI)
