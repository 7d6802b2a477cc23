"""Weights for decoding: the numbers of the stored ones, products that differ by rounding only, nothing widened whole."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.formats import Affine, Group, Int, MidRise
from efficient_lm.ops.quantized_matmul import in_parts, quantized_matmul
from efficient_lm.tree import num_bytes
from efficient_lm.weights.parted import Parted
from efficient_lm.weights.quantized import round_to_nearest
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.rotated import Rotated
from efficient_lm.weights.weight import Dense, OutputsFirst, Transposed
from tests.formats.every import FORMATS
from tests.weights.every import draw

pytestmark = pytest.mark.usefixtures('quick_unless_long')

INTEGERS = [format for format in FORMATS if format.element.startswith(('int', 'full', 'affine', 'mid', 'tern'))]
FLOATS = [format for format in FORMATS if format not in INTEGERS]
named = {'ids': lambda format: getattr(format, 'name', None)}
SIZES = jnp.array([2, 0, 1, 3])   # experts chosen twice and thrice, one by nobody


def stored(letters, inputs, format, activations=None):
  store = jax.jit(lambda weight: round_to_nearest(weight, format, activations))
  return store(Dense(draw(letters), letters, inputs))


def assert_rounding(got, x_MI, w_IO):
  """Within the bound of the order of float32 sums that the class states, I * 2^-23 * sum |x_i w_oi|, for one sum; both."""
  x, w = np.asarray(x_MI, np.float64), np.asarray(w_IO, np.float64)
  bound = x.shape[-1] * 2. ** -23 * (np.abs(x) @ np.abs(w))
  assert (np.abs(np.asarray(got, np.float64) - x @ w) <= bound + 1e-30).all()


@pytest.mark.thinned
@pytest.mark.parametrize('format', INTEGERS, **named)
def test_it_holds_the_very_numbers_of_the_stored_weight(format):
  for letters, inputs in (('NHD', 'NH'), ('EDF', 'D')):
    weight = stored(letters, inputs, format)
    made = weight.for_decoding()
    assert isinstance(made, Parted) and made.for_decoding() is made
    assert (made.shape, made.axes, made.inputs, made.kind, made.product) == (
      weight.shape, weight.axes, weight.inputs, weight.kind, weight.product)
    values = jax.jit(lambda weight: weight.materialize())
    got, wanted = values(made), values(weight)
    atol = 2. ** -22 * np.abs(wanted).max() if isinstance(format, Affine) else 0   # see the class
    np.testing.assert_allclose(got, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize('format', FLOATS, **named)
def test_numbers_that_are_no_integers_stay_as_they_are_stored(format):
  weight = stored('DF', 'D', format)
  assert weight.for_decoding() is weight


@pytest.mark.thinned
@pytest.mark.parametrize('format', INTEGERS, **named)
def test_products_of_any_number_of_rows_differ_by_rounding_only(format):
  made = stored('DF', 'D', format).for_decoding()
  for rows in (1, 2, 3):
    x = jnp.asarray(np.random.default_rng(rows).normal(size=(1, rows, 64)), jnp.float32)
    got = jax.jit(lambda weight, x: weight.contract('BTD,DF->BTF', x))(made, x)
    assert_rounding(got[0], x[0], made.materialize())


@pytest.mark.parametrize('format', [Int(), Int(bits=4, scales=Group(size=16)), MidRise()], **named)
@pytest.mark.parametrize('rows', [1, 5])
def test_tokens_are_rounded_as_the_stored_product_rounds_them(format, rows):
  weight = stored('DF', 'D', format, Rounding(Int()))
  x = jnp.asarray(np.random.default_rng(rows).normal(size=(1, rows, 64)), jnp.float32)
  run = jax.jit(lambda weight, x: weight.contract('BTD,DF->BTF', x))
  rounded = weight.prepare_input(x, 'BTD')
  assert_rounding(run(weight.for_decoding(), x)[0], rounded[0], weight.materialize())
  assert_rounding(run(weight, x)[0], rounded[0], weight.materialize())


@pytest.mark.parametrize('format', [Int(), Int(bits=4, scales=Group(size=32)), MidRise(bits=3), None], **named)
@pytest.mark.parametrize('repeats', [1, 4])
def test_experts_multiply_their_own_rows_few_or_many(format, repeats):
  dense = Dense(draw('EDF'), 'EDF', 'D')
  made = (dense if format is None else round_to_nearest(dense, format)).for_decoding()
  assert isinstance(made, OutputsFirst if format is None else Parted)
  sizes, rows = SIZES * repeats, int(SIZES.sum()) * repeats
  x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, 64)), jnp.float32)
  x = jnp.concatenate([x, jnp.full((2, 64), jnp.nan)])   # past the last group
  got = np.asarray(jax.jit(lambda weight, x: weight.contract_grouped(x, sizes))(made, x))
  assert not got[rows:].any()
  for m, e in enumerate(np.repeat(np.arange(4), sizes)):
    assert_rounding(got[m:m + 1], x[m:m + 1], made.materialize()[e])


def test_an_embedding_is_read_by_rows_and_as_a_head():
  for format in (Int(bits=4, scales=Group(size=16)), Int(bits=8, symmetric=False)):
    table = stored('VD', 'D', format)
    made, ids = table.for_decoding(), jnp.array([[3, 0, 39], [9, 3, 1]])
    np.testing.assert_array_equal(made.take(ids), table.materialize()[ids])
    x = draw('BTD', seed=2)
    got = Transposed(made).contract('BTD,DV->BTV', x, jnp.float32)
    assert_rounding(got.reshape(6, -1), x.reshape(6, -1), table.materialize().T)
  embed = Dense(draw('VD'), 'VD', 'D')
  assert embed.for_decoding() is embed


def test_a_rotated_weight_decodes_by_what_it_holds():
  rotated = Rotated(stored('DF', 'D', Int(bits=4)), 64)
  made, x = rotated.for_decoding(), draw('BTD', seed=1)
  assert isinstance(made.inner, Parted)
  np.testing.assert_allclose(made.contract('BTD,DF->BTF', x), rotated.contract('BTD,DF->BTF', x), rtol=0, atol=1e-4)


def test_it_is_as_large_as_the_stored_weight_unless_groups_cross_parts():
  size = lambda size, bits=4: num_bytes(stored('DF', 'D', Int(bits=bits, scales=Group(size=size))).for_decoding())
  assert size(32) == 64 * 32 // 2 + 4 * 2 * 32
  assert size(64) == 64 * 32 // 2 + 4 * 32, 'one scale for all inputs of an output'
  assert size(32, bits=3) == size(32), '3 bits take 4'
  crossing = round_to_nearest(Dense(jnp.ones((96, 32)), 'DF', 'D'), Int(bits=4, scales=Group(size=32))).for_decoding()
  assert crossing.scale.get_value().shape == (32, 6), 'three groups of 32 in two parts of 48'


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('rows', [1, 16])
def test_a_loop_over_tokens_keeps_no_matrix_in_floats(bits, rows):
  """Neither in the loop, nor moved to before it because it is the same each time."""
  O, I = 512, 512
  weight = round_to_nearest(Dense(jnp.ones((I, O)), 'DF', 'D'), Int(bits=bits, scales=Group(size=64))).for_decoding()
  def tokens(weight, x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(weight.contract('BTD,DF->BTF', x)), None), x, length=8)[0]
  program = jax.jit(tokens).lower(weight, jnp.ones((1, rows, I))).compile()
  # A block of outputs in floats, or the codes of a matrix, but no matrix in floats.
  assert program.memory_analysis().temp_size_in_bytes < O * I * 4 * .75


def test_memory_of_few_rows_does_not_depend_on_the_number_of_experts():
  def temporary(E):
    dense = Dense(jax.random.normal(jax.random.key(0), (E, 64, 256)), 'EDF', 'D')
    found = []
    for weight in (dense.for_decoding(), round_to_nearest(dense, Int(bits=4, scales=Group(size=32))).for_decoding()):
      program = jax.jit(lambda weight, x, sizes: weight.contract_grouped(x, sizes))
      sizes = jnp.zeros(E, jnp.int32).at[1].set(2)
      found.append(program.lower(weight, jnp.ones((2, 64)), sizes).compile().memory_analysis().temp_size_in_bytes)
    return found
  few, many = temporary(2), temporary(32)
  # Sizes of groups are summed up, which takes a few integers an expert.
  assert all(b - a <= 32 * 32 for a, b in zip(few, many)), (few, many)
  floats, packed = many
  expert = 64 * 256 * 4   # bytes in floats, of which XLA from jax 0.12 on makes a copy before it multiplies
  assert packed < expert / 4 and floats < 1.1 * expert, (floats, packed)


def test_products_that_follow_each_other_share_their_memory():
  """What XLA sets aside for a chain of products does not grow with its length (it was one output a product)."""
  matrix = in_parts(jnp.ones((64, 64), jnp.int8), jnp.ones((64, 1)), bits=4)
  def chain(x_MI, matrices):
    for one in matrices: x_MI = quantized_matmul(x_MI, one)
    return x_MI
  def bytes_of(count):
    x_MI = jnp.ones((256, 64))
    return jax.jit(chain).lower(x_MI, [matrix] * count).compile().memory_analysis().temp_size_in_bytes
  assert bytes_of(12) <= bytes_of(3) + 256 * 64 * 4
