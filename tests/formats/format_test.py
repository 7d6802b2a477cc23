"""Every format errs by at most half a step, rounds to its grid, packs without loss, and rounds each matrix by itself."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.formats import Channel, Float8, Group, Int, Ternary
from efficient_lm.formats.granularity import tile, untile
from tests.formats.every import FORMATS, NAMES

O, I = 16, 64
every = pytest.mark.parametrize('format', FORMATS, ids=NAMES)
# Formats whose grid holds all numbers: one that is scaled by a mean clips the largest.
HOLDING = [format for format in FORMATS if not isinstance(format, Ternary)]


def draw(*shape, seed=0, exponent=0.):
  """Rows of very different magnitudes, as rows with outliers have."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1)) + exponent), jnp.float32)


def grid(format) -> np.ndarray:
  """All numbers of a format in steps, in order."""
  if isinstance(format, Float8) or format.element == 'MXFP8':
    dtype = format.codes(jnp.zeros(1)).dtype
    codes = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8), dtype)
  else: codes = jnp.arange(-2 ** (format.bits - 1), 2 ** (format.bits - 1), dtype=jnp.int8)
  numbers = np.asarray(format.numbers(codes))
  if format.symmetric: numbers = numbers[np.abs(numbers) <= format.largest]
  return np.unique(numbers[np.isfinite(numbers)])


@pytest.mark.thinned
@pytest.mark.parametrize('format', HOLDING, ids=lambda format: format.name)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2 ** 16), exponent=st.floats(-20, 20))
def test_rounding_errs_by_at_most_half_the_distance_of_neighbours_and_lies_on_the_grid(format, seed, exponent):
  if format.scale_dtype == 'float16': exponent = np.clip(exponent, -4, 4)   # what is far from 1 has no scale in float16
  w = draw(O, I, seed=seed, exponent=exponent)
  scales = format.scales_for(w)
  step, zero = format.steps(scales)
  tiles, rounded = (np.asarray(tile(x, step.shape), np.float64) for x in (w, format.rounded(w, scales)))
  spread = lambda x: None if x is None else np.asarray(x, np.float64)[:, None, :, None]
  y, on_grid = (format.in_steps(x, spread(step), spread(zero)) for x in (tiles, rounded))
  numbers = grid(format)
  nearest = np.min(np.abs(y[..., None] - numbers), axis=-1)
  # A number moves no farther than to the nearest number of the grid; the float32 division may add some 2^-23 of the
  # quotient, which may be larger than the place on the grid, where a zero is added to it.
  slack = 2. ** -22 * np.maximum(np.maximum(np.abs(y), np.abs(tiles / spread(step))), 1)
  assert np.all(np.abs(y - on_grid) <= nearest + slack)
  assert np.all(np.min(np.abs(on_grid[..., None] - numbers), axis=-1) <= slack)
  assert np.all(y <= numbers.max() + .5 * (numbers[-1] - numbers[-2]) + slack), 'a number lies beyond the grid'


@pytest.mark.thinned
@every
def test_stored_matrices_dequantize_to_what_training_rounds_to(format):
  w = draw(3, O, I)
  scales = format.scales_for(w)
  np.testing.assert_array_equal(format.decode(format.encode(w, scales)), format.rounded(w, scales))


@every
def test_numbers_on_the_grid_stay_as_they_are(format):
  """With the same scales: scales that are fitted again may differ, where they are means."""
  w = draw(O, I)
  scales = format.scales_for(w)
  once = format.rounded(w, scales)
  # w / step is a float32 division: the quotient of a number that is a whole multiple is that multiple, exactly.
  np.testing.assert_array_equal(format.rounded(once, scales), once)


@pytest.mark.thinned
@every
def test_bytes_are_those_of_the_codes_and_scales(format):
  w = draw(2, O, I)
  encoded = format.encode(w, format.scales_for(w))
  assert encoded.values.size * encoded.values.dtype.itemsize == 2 * O * I * format.bits / 8
  n, q = format.scales.counts(O, I)
  assert encoded.scales.scale.shape == (2, q, n)


@pytest.mark.thinned
@every
def test_layers_and_experts_are_rounded_by_themselves(format):
  w = np.array(draw(2, 3, O, I))
  other = w.copy()
  other[1, 2] *= 100
  before, after = (np.asarray(format.rounded(jnp.asarray(x), format.scales_for(jnp.asarray(x)))) for x in (w, other))
  changed = np.argwhere((before != after).any((2, 3)))
  np.testing.assert_array_equal(changed, [[1, 2]])


@every
def test_zeros_stay_zeros_where_the_grid_has_one(format):
  w = np.array(draw(O, I))
  w[:, :I // 2] = 0
  rounded = np.asarray(format.rounded(jnp.asarray(w), format.scales_for(jnp.asarray(w))))
  assert np.all(np.isfinite(rounded))
  if format.has_zero: assert np.all(rounded[:, :I // 2] == 0)
  else: assert 'mid-rise' in format.name or 'affine' in format.name


@every
def test_one_compiled_program_rounds_as_single_operations_do(format):
  """Bit for bit, unless scales are means, whose sums depend on their order."""
  w = draw(O, I)
  alone = format.rounded(w, format.scales_for(w))
  together = jax.jit(lambda w: format.rounded(w, format.scales_for(w)))(w)
  if isinstance(format, Ternary): np.testing.assert_allclose(together, alone, rtol=2. ** -21)
  else: np.testing.assert_array_equal(together, alone)


@every
def test_formats_are_values_with_names(format):
  """Formats are static parts of modules, which jit compares."""
  same = type(format)(**{field: getattr(format, field) for field in getattr(format, '__dataclass_fields__', ())})
  assert same == format and hash(same) == hash(format)
  assert format.name.startswith(format.element) and list(getattr(format, 'check', tuple)()) == []


def test_more_bits_err_less():
  w = draw(O, I)
  error = lambda format: float(jnp.mean(jnp.square(format.rounded(w, format.scales_for(w)) - w)))
  by_bits = [error(Int(bits=bits)) for bits in (8, 4, 3, 2)]
  assert by_bits == sorted(by_bits)
  # Half the step has a quarter of the mean squared error; steps of 127 and of 7 levels differ by a factor of 329.
  assert by_bits[1] / by_bits[0] == pytest.approx((127 / 7) ** 2, rel=0.1)
  assert error(Int(bits=4, scales=Group(size=16))) < error(Int(bits=4, scales=Channel()))


def test_scales_that_a_mesh_has_cut_otherwise_than_the_matrix_are_refused():
  format = Int(bits=4, scales=Group(size=32))
  scales = format.scales_for(draw(O, I))
  with pytest.raises(ValueError, match='must cut scales as it cuts the matrix'):
    format.rounded(draw(O, I // 2), scales)


def test_tiles_are_cut_and_put_together():
  w = draw(2, O, I)
  tiles = tile(w, (4, 2))
  assert tiles.shape == (2, 4, O // 4, 2, I // 2)
  np.testing.assert_array_equal(tiles[0, 1, 2, 1, 3], w[0, O // 4 + 2, I // 2 + 3])
  np.testing.assert_array_equal(untile(tiles), w)
