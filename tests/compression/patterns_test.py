"""Patterns of zeros: as many of every comparison as were asked for, the lowest, along the inputs; in pieces as at once."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from efficient_lm.compression.patterns import GONE, Blocks, NofM, PerMatrix, PerOutput, lowest
from efficient_lm.errors import IncompatibleError

O, I = 12, 32
PATTERNS = [PerMatrix(), PerOutput(), NofM(n=2, m=4), NofM(n=1, m=8), Blocks(outputs=4, inputs=2)]
SCORES = st.one_of(st.floats(0, width=32, allow_nan=False), st.sampled_from([GONE, 0., 1., 2.**-149, np.inf]))
by_bits = jax.jit(lowest)


def scores(*lead, seed=0):
  return jnp.asarray(np.random.default_rng(seed).random((*lead, O, I)), jnp.float32)


@pytest.mark.parametrize('size', [5, 40], ids='{} candidates'.format)
def test_the_lowest_are_those_that_sorting_finds(size):
  """Of equal ones the first, by comparing pairs and by bisecting bits."""
  @given(hnp.arrays(np.float32, (3, size), elements=SCORES), st.integers(0, size))
  @settings(deadline=None, max_examples=30)
  def holds(score, count):
    order = np.argsort(score, -1, kind='stable')
    expected = np.zeros(score.shape, bool)
    np.put_along_axis(expected, order[:, :count], True, -1)
    np.testing.assert_array_equal(by_bits(score, jnp.full((3, 1), count)), expected)
  holds()


def groups(pattern, x_OI):
  """(groups, candidates), by definition."""
  if isinstance(pattern, PerMatrix): return x_OI.reshape(1, -1)
  if isinstance(pattern, PerOutput): return x_OI
  if isinstance(pattern, NofM): return x_OI.reshape(-1, pattern.m)
  tiles = x_OI.reshape(O // pattern.outputs, pattern.outputs, I // pattern.inputs, pattern.inputs)
  return tiles.sum((1, 3)).reshape(1, -1)


@pytest.mark.parametrize('pattern', PATTERNS, ids=str)
def test_every_comparison_loses_its_lowest(pattern):
  share = pattern.share(0.5)
  for layer, keep in zip(scores(2), np.asarray(pattern.keep(scores(2), share)), strict=True):
    score, kept = groups(pattern, np.asarray(layer)), groups(pattern, keep.astype(float))
    gone = kept == 0
    assert np.all(gone.sum(-1) == np.floor(share * score.shape[-1]))
    assert np.all(np.where(gone, score, -np.inf).max(-1) <= np.where(gone, np.inf, score).min(-1))
    if isinstance(pattern, Blocks): assert set(np.unique(kept)) == {0, 8}, 'a tile falls whole'


@pytest.mark.parametrize('pattern', [one for one in PATTERNS if one.free], ids=str)
def test_each_matrix_may_have_a_share_of_its_own(pattern):
  shares = jnp.array([[0.25, 0.5, 0.75], [0., 0.1, 0.9]])
  zeros = 1 - np.mean(np.asarray(pattern.keep(scores(2, 3), shares)), (-2, -1))
  sizes = {PerMatrix: O * I, PerOutput: I, Blocks: O * I // 8}[type(pattern)]
  np.testing.assert_allclose(zeros, np.floor(np.asarray(shares) * sizes) / sizes, rtol=1e-6)


@pytest.mark.thinned
@pytest.mark.parametrize('pattern', PATTERNS, ids=str)
@pytest.mark.parametrize('share', [0.3, 0.5, 0.71])
def test_piece_by_piece_as_many_go_as_at_once(pattern, share):
  """As the column solver chooses; the last piece is a short one."""
  share, score = pattern.share(share), scores()
  pieces = [pattern.keep(score[:, first:first + 8], share, (first, first + 8)) for first in range(0, I, 8)]
  whole = np.asarray(pattern.keep(score, share))
  assert np.concatenate(pieces, -1).sum() == whole.sum()
  if not pattern.free: np.testing.assert_array_equal(np.concatenate(pieces, -1), whole)


@pytest.mark.parametrize('pattern', PATTERNS, ids=str)
def test_what_is_gone_already_goes_first(pattern):
  earlier = np.asarray(pattern.keep(scores(seed=1), pattern.share(0.25)))
  keep = np.asarray(pattern.keep(jnp.where(earlier, scores() + 1, GONE), pattern.share(0.5)))
  assert not np.any(keep & ~earlier) and np.mean(keep) == pattern.share(0.5) if pattern.free else np.any(keep)


@pytest.mark.parametrize('pattern, share, message', [
  (NofM(m=5), 0.6, '2:5: 5 does not divide 32 inputs'),
  (Blocks(outputs=5, inputs=4), 0.5, 'blocks of 5 x 4 do not divide 12 outputs x 32 inputs'),
  (Blocks(outputs=12, inputs=16), 0.25, 'a sparsity of 0.25 is not one zero in blocks of 12 x 16 of 12 outputs'),
  (PerOutput(), 0.03, 'a sparsity of 0.03 is not one zero in an output'), (PerMatrix(), 0.5, None)], ids=str)
def test_what_does_not_fit_a_matrix_is_refused_in_a_line(pattern, share, message):
  if message is None: return pattern.check_fits(O, I, share)
  with pytest.raises(IncompatibleError, match=message): pattern.check_fits(O, I, share)


@pytest.mark.parametrize('pattern, sparsity, fixes', [
  (PerMatrix(), 0.5, []), (PerMatrix(), None, ['give a share of zeros above 0 and below 1']),
  (PerOutput(), 1.0, ['must be above 0 and below 1']), (NofM(), None, []), (NofM(), 0.5, []),
  (NofM(n=1, m=4), 0.5, ['leave it out: 1:4 is 0.75'])], ids=str)
def test_a_sparsity_that_a_pattern_cannot_give_is_named(pattern, sparsity, fixes):
  assert list(pattern.problems(sparsity)) == fixes


@pytest.mark.parametrize('pattern, names', [
  (NofM(n=4), ['n']), (NofM(n=1, m=1), ['m', 'n']), (NofM(), []), (Blocks(outputs=0, inputs=0), ['outputs', 'inputs'])],
  ids=str)
def test_a_wrong_field_is_named(pattern, names):
  assert [name for name, _, _ in pattern.check()] == names


bisected = jax.jit(lowest)
SIGNED = st.one_of(st.floats(width=32, allow_nan=False),
                    st.sampled_from([0., -0., 1., -1., 2.**-149, -2.**-149, np.inf, -np.inf]))


def by_sorting(values, count):
  """The definition: of equal values the first go, zeros of either sign being equal."""
  order = np.argsort(np.where(values == 0, 0, values), kind='stable')
  gone = np.zeros(values.shape, bool)
  gone[order[:count]] = True
  return gone


@given(hnp.arrays(np.float32, (3, 24), elements=SIGNED), st.lists(st.integers(0, 24), min_size=3, max_size=3))
@settings(deadline=None, max_examples=200)
def test_bisecting_bits_is_sorting_for_numbers_of_either_sign(values, counts):
  got = np.asarray(bisected(values, np.array(counts)[:, None]))
  for row, count, gone in zip(values, counts, got, strict=True): np.testing.assert_array_equal(gone, by_sorting(row, count))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_other_floats_are_compared_by_their_values(dtype):
  values = np.asarray(jax.numpy.asarray(np.random.default_rng(0).normal(size=500), dtype))
  for count in (0, 1, 250, 500):
    np.testing.assert_array_equal(bisected(values, count), by_sorting(np.asarray(values, np.float32), count))
