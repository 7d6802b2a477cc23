"""What goes together: units cover a matrix once, patterns lie along the contraction, and budgets are kept."""
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.compression.structures import ErdosRenyi, NofM, UniformShares, Unstructured, WeightBlocks
from efficient_lm.errors import IncompatibleError
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.weight import Dense

LETTERS = [('DF', 'D', (16, 8)), ('NHD', 'NH', (2, 8, 4)), ('EFD', 'F', (3, 8, 4)), ('DNH', 'D', (8, 2, 4)),
           ('KHD', 'D', (2, 4, 8))]
STRUCTURES = {'single': Unstructured(), 'blocks': WeightBlocks(outputs=2, inputs=4), 'pattern': NofM(n=1, m=4)}


def weight_of(axes, inputs, shape):
  return Dense(jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape)), jnp.float32), axes, inputs)


@pytest.mark.parametrize('axes, inputs, shape', LETTERS)
@pytest.mark.parametrize('structure', STRUCTURES.values(), ids=STRUCTURES)
def test_every_weight_is_in_one_unit_and_no_unit_leaves_its_matrix(structure, axes, inputs, shape):
  """Said of the numbers themselves: each unit gets a number, and comes back to the places that it was made of."""
  weight = weight_of(axes, inputs, shape)
  layout, array = Layout.of(weight), np.asarray(weight.materialize())
  structure.fits(weight)
  units = structure.units(layout, jnp.ones(array.shape), jnp.sum)
  numbers = jnp.arange(units.size, dtype=jnp.int32).reshape(units.shape)
  places_OI = np.asarray(layout.matrix(structure.spread(layout, numbers, array.shape)))
  matrices = places_OI.reshape(-1, *places_OI.shape[-2:])
  assert len(matrices) == 2 * (3 if 'E' in axes else 1)
  sets = [set(matrix.reshape(-1)) for matrix in matrices]
  assert sum(map(len, sets)) == len(set.union(*sets)) == units.size
  assert all(np.sum(places_OI == number) == units.reshape(-1)[number] for number in (0, units.size - 1))
  if isinstance(structure, WeightBlocks):
    blocks = matrices[0].reshape(matrices[0].shape[0] // 2, 2, -1, 4)
    assert np.all(blocks == blocks[:, :1, :, :1])
  if isinstance(structure, NofM):   # a group: successive inputs of one output
    groups = matrices[0].reshape(-1, 4)
    assert np.all(groups // 4 == groups[:, :1] // 4)


def test_blocks_are_scored_by_the_sum_of_their_weights():
  weight = weight_of('DF', 'D', (8, 4))
  structure, layout = WeightBlocks(outputs=2, inputs=4), Layout.of(weight)
  units = structure.units(layout, jnp.abs(weight.materialize()))
  matrix_OI = np.abs(np.asarray(layout.matrix(weight.materialize())))
  expected = [[matrix[2 * i:2 * i + 2, 4 * j:4 * j + 4].sum() for i in range(2) for j in range(2)] for matrix in matrix_OI]
  np.testing.assert_allclose(units, expected, rtol=1e-6)   # float32 sums of eight numbers


@pytest.mark.parametrize('structure, fix', [
  (WeightBlocks(outputs=3, inputs=4), 'blocks of 3x4 do not divide 4 outputs x 8 inputs'),
  (NofM(n=2, m=3), '2:3: 3 does not divide 8 inputs')])
def test_what_does_not_divide_a_matrix_is_refused(structure, fix):
  with pytest.raises(IncompatibleError, match=fix): structure.fits(weight_of('DF', 'D', (8, 4)))


def test_wrong_fields_are_named():
  problems = lambda structure: [field for field, _, _ in structure.check()]
  assert problems(WeightBlocks(outputs=0, inputs=-1)) == ['outputs', 'inputs'] and problems(NofM(n=4)) == ['n']
  assert not problems(WeightBlocks()) and not problems(NofM())
  (_, _, fix), = NofM(n=1, m=4).check_sparsity(0.5)
  assert fix == 'must be 0.75, which 1 of every 4 leave out (or 0)'
  assert not list(NofM(n=1, m=4).check_sparsity(0.75)) and not list(NofM().check_sparsity(0))


def test_a_pattern_grows_by_whole_weights():
  counts = [int(NofM(n=1, m=4).count(0.75, ramp, 4)) for ramp in (0., 0.3, 0.34, 0.9, 1.)]
  assert counts == [0, 0, 1, 2, 3]


# ------------------------------------------------------------------ allocation

SIZES = st.dictionaries(st.text('abc', min_size=1, max_size=3), st.tuples(*[st.integers(1, 40)] * 3), min_size=1, max_size=6)


@settings(deadline=None, max_examples=200)
@given(SIZES, st.floats(0.01, 0.99))
def test_erdos_renyi_keeps_the_budget_and_no_matrix_more_than_itself(sizes, sparsity):
  shares = ErdosRenyi().shares(sparsity, sizes)
  numbers = {path: count * outputs * inputs for path, (count, outputs, inputs) in sizes.items()}
  assert set(shares) == set(sizes) and all(-1e-9 <= share < 1 for share in shares.values())
  gone = sum(shares[path] * numbers[path] for path in sizes)
  np.testing.assert_allclose(gone, sparsity * sum(numbers.values()), rtol=1e-9)
  density = lambda path: (1 - shares[path]) * sizes[path][1] * sizes[path][2] / sum(sizes[path][1:])
  scales = [density(path) for path in sizes if shares[path] > 1e-9]
  np.testing.assert_allclose(scales, scales[:1] * len(scales), rtol=1e-6)


def test_erdos_renyi_of_two_matrices_that_can_be_done_by_hand():
  """16 x 16 and 4 x 64, of 256 numbers each; (O + I) / (O I) are 1/8 and 17/64. Half of 512 are 256 = e (32 + 68)."""
  shares = ErdosRenyi().shares(0.5, {'square': (1, 16, 16), 'long': (1, 4, 64)})
  assert shares['square'] == pytest.approx(1 - 2.56 / 8) and shares['long'] == pytest.approx(1 - 2.56 * 17 / 64)
  assert UniformShares().shares(0.5, {'a': (1, 2, 2), 'b': (3, 4, 4)}) == {'a': 0.5, 'b': 0.5}


def test_a_matrix_that_would_keep_more_than_all_of_it_is_dense():
  shares = ErdosRenyi().shares(0.5, {'small': (1, 2, 2), 'large': (1, 100, 100)})
  assert shares['small'] == 0 and shares['large'] == pytest.approx(0.5 * 10_004 / 10_000)
