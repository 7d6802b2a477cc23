"""Weights in few bits: worth the same in training and in storage, whatever their letters; integers are multiplied."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import MXFP4, NVFP4, Block, Float8, Group, Int, MidRise, Tensor, Ternary
from efficient_lm.parallel.sharding import shardings
from efficient_lm.tree import num_bytes
from efficient_lm.weights.quantized import FakeQuantized, Layout, Quantized, Rounding, quantized, straight_through
from efficient_lm.weights.weight import Dense, Transposed
from tests.formats.every import FORMATS, NAMES

SIZES = dict(B=2, T=3, D=64, F=32, N=2, H=32, V=40, E=4, R=32)
EQUATIONS = [('BTD,DNH->BTNH', 'D'), ('BTNH,NHD->BTD', 'NH'), ('BTD,DF->BTF', 'D'), ('BTR,RNH->BTNH', 'R')]
every = pytest.mark.parametrize('format', FORMATS, ids=NAMES)


def draw(letters, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=[SIZES[letter] for letter in letters]), jnp.float32)


def pair(equation, inputs, format, activations=None):
  """A weight as trained and as stored, and what they are multiplied with."""
  x_axes, w_axes = equation.split('->')[0].split(',')
  rounding = None if activations is None else Rounding(activations)
  trained = FakeQuantized(Dense(draw(w_axes), w_axes, inputs), Rounding(format), rounding)
  return trained, trained.converted(), draw(x_axes, seed=1)


@pytest.mark.parametrize('axes, inputs, order', [
  ('DNH', 'D', 'NHD'), ('NHD', 'NH', 'DNH'), ('DF', 'D', 'FD'), ('VD', 'D', 'VD'), ('EFD', 'F', 'EDF'), ('RNH', 'R', 'NHR')])
def test_a_weight_is_a_matrix_with_its_outputs_first(axes, inputs, order):
  array = jnp.stack([draw(axes), draw(axes, seed=1)])   # two layers
  layout = Layout.of(Dense(array, axes, inputs))
  matrix = layout.matrix(array)
  K = np.prod([SIZES[letter] for letter in inputs])
  np.testing.assert_array_equal(matrix, jnp.einsum(f'L{axes}->L{order}', array).reshape(*matrix.shape[:-1], K))
  np.testing.assert_array_equal(layout.array(matrix), array)


@every
@pytest.mark.parametrize('equation, inputs', EQUATIONS[:2])
def test_stored_and_trained_weights_are_worth_the_same(equation, inputs, format):
  """Bit for bit, in the same program or in two. Only the sum of a mean depends on the program."""
  trained, stored, _ = pair(equation, inputs, format)
  wanted = jax.jit(lambda weight: weight.materialize())(trained)
  if isinstance(format, Ternary): np.testing.assert_allclose(stored.materialize(), wanted, rtol=2. ** -21)
  else: np.testing.assert_array_equal(jax.jit(lambda weight: weight.materialize())(stored), wanted)


@pytest.mark.parametrize('activations', [None, Int(), Int(bits=4), Float8()], ids=lambda x: getattr(x, 'name', 'float'))
@pytest.mark.parametrize('format', FORMATS, ids=NAMES)
def test_stored_and_trained_weights_multiply_alike(format, activations):
  """K = 64 products are summed in another order, and scales multiply the sum: 64 * 2^-24 of the sum of magnitudes."""
  equation, inputs = EQUATIONS[1]
  trained, stored, x = pair(equation, inputs, format, activations)
  magnitudes = jnp.einsum(equation, jnp.abs(trained.rounded(x, equation.split(',')[0])), jnp.abs(trained.materialize()))
  difference = jnp.abs(stored.contract(equation, x) - trained.contract(equation, x))
  assert np.all(difference <= 64 * 2. ** -24 * magnitudes)


@pytest.mark.parametrize('format, activations, product', [
  (Int(), Int(), 'int8 x int8'), (Int(), None, 'float x int8'), (Int(bits=4, scales=Group(size=32)), None, 'float x int4'),
  (Ternary(), Int(), 'int8 x ternary'), (Int(bits=3), None, 'float, multiplied out'),
  (Float8(), Float8(), 'float8_e4m3fn x float8 e4m3')], ids=lambda x: x if isinstance(x, str) else '')
def test_the_table_says_what_is_multiplied(format, activations, product):
  trained, stored, x = pair(*EQUATIONS[2], format, activations)
  assert stored.product == product and stored.kind == format.name and trained.kind == f'float32, rounded to {format.name}'
  text = jax.jit(functools.partial(stored.contract, EQUATIONS[2][0])).lower(x).as_text()
  integers = 'i8>, tensor' in text.replace('xi8>', 'i8>') and 'dot_general' in text and 'xi32>' in text
  assert integers == (product in ('int8 x int8', 'int8 x ternary'))


@every
def test_experts_multiply_their_own_rows(format):
  array, sizes, x = draw('EDF'), jnp.array([2, 0, 3, 1]), draw('BTD', seed=1).reshape(6, 64)
  x = jnp.concatenate([x, jnp.full((1, 64), 1e3)])   # past the last group
  stored = quantized(Dense(array, 'EDF', 'D'), format)
  each = [np.asarray(x[i]) @ np.asarray(stored.materialize())[e] for i, e in enumerate([0, 0, 2, 2, 2, 3])]
  # Sums of 64 products of order one, in another order.
  np.testing.assert_allclose(stored.contract_grouped(x, sizes), np.stack([*each, np.zeros(32)]), rtol=1e-4, atol=1e-4)


@every
def test_an_embedding_is_read_by_rows_and_as_a_head(format):
  table = quantized(Dense(draw('VD'), 'VD', 'D'), format)
  ids = jnp.array([[3, 0, 39], [9, 3, 1]])
  np.testing.assert_array_equal(table.take(ids), table.materialize()[ids])
  head, x = Transposed(table), draw('BTD', seed=2)
  wanted = jnp.einsum('BTD,VD->BTV', x, table.materialize())
  np.testing.assert_allclose(head.contract('BTD,DV->BTV', x, jnp.float32), wanted, rtol=1e-4, atol=1e-4)
  assert head.kind == format.name


def test_tokens_are_rounded_by_themselves():
  weight, x = FakeQuantized(Dense(draw('NHD'), 'NHD', 'NH'), None, Rounding(Int(bits=4))), draw('BTNH', seed=1)
  other = np.array(x)
  other[1, 0] *= 50
  before, after = (np.asarray(weight.rounded(v, 'BTNH')) for v in (x, jnp.asarray(other)))
  np.testing.assert_array_equal(np.argwhere((before != after).any((2, 3))), [[1, 0]])
  assert len(np.unique(np.round(before[0, 0] / np.abs(before[0, 0]).max() * 7, 3))) <= 15
  assert weight.rounded(x, 'BTN') is x, 'a product over other dims is another one'


def test_every_product_rounds_its_activations():
  rounding, x, sizes = Rounding(Int(bits=3)), draw('BTD', seed=1), jnp.array([6, 0, 0, 0])
  rounded = FakeQuantized(Dense(draw('DF'), 'DF', 'D'), None, rounding).rounded(x, 'BTD')
  trained = lambda weight: FakeQuantized(weight, Rounding(Int()), rounding)
  for make in (trained, lambda weight: trained(weight).converted()):
    matrix, stacked, table = (make(Dense(draw(axes), axes, 'D')) for axes in ('DF', 'EDF', 'VD'))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)   # sums of 64 products of order one
    close(matrix.contract('BTD,DF->BTF', x), jnp.einsum('BTD,DF->BTF', rounded, matrix.materialize()))
    close(stacked.contract_grouped(x.reshape(6, -1), sizes), rounded.reshape(6, -1) @ stacked.materialize()[0])
    close(Transposed(table).contract('BTD,DV->BTV', x), jnp.einsum('BTD,VD->BTV', rounded, table.materialize()))


def test_the_gradient_passes_straight_through():
  direction = draw('DF', seed=2)
  weight = lambda array: FakeQuantized(Dense(array, 'DF', 'D'), Rounding(Int(bits=2))).materialize()
  np.testing.assert_array_equal(jax.grad(lambda array: jnp.sum(direction * weight(array)))(draw('DF')), direction)
  value, tangent = jax.jvp(straight_through, (jnp.float32(0.1), jnp.float32(0.3)), (jnp.float32(1), jnp.float32(5)))
  assert (value, tangent) == (jnp.float32(0.3), 1)


def test_a_stored_weight_is_frozen_and_as_small_as_its_codes():
  stored = quantized(Dense(draw('DF'), 'DF', 'D'), Int(bits=4, scales=Group(size=64)))
  assert num_bytes(stored) == 64 * 32 // 2 + 4 * 32
  assert not jax.tree.leaves(nnx.state(stored, nnx.Param))


@pytest.mark.parametrize('sizes', [(1, 2, 1, 4), (2, 1, 2, 2)])
@pytest.mark.parametrize('format', [Int(), Int(bits=4, scales=Group(size=16)), Int(scales=Tensor()), MidRise(), Float8()],
                         ids=lambda format: format.name)
def test_over_devices_a_stored_weight_is_cut_and_multiplies_as_on_one(mesh, sizes, format):
  stored, x = quantized(Dense(draw('DF'), 'DF', 'D'), format, Rounding(Int())), draw('BTD', seed=1)
  run = jax.jit(lambda weight, x: weight.contract('BTD,DF->BTF', x))
  wanted = run(stored, x)
  with mesh(*sizes):
    placed = jax.device_put(stored, shardings(stored, jax.sharding.get_mesh()))
    shard = placed.values.get_value().addressable_shards[0].data
    assert shard.size * sizes[1] * sizes[3] == stored.values.get_value().size
    # Integers sum exactly; floats in another order.
    np.testing.assert_allclose(run(placed, x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('format', [one for one in FORMATS if not isinstance(one.scales, Block)], ids=lambda one: one.name)
def test_no_token_s_rounding_depends_on_another_token(format):
  """Those after it, above all: rounding must not make a model look ahead."""
  x_BTD = draw('BTD', seed=3)
  weight = FakeQuantized(Dense(draw('DF'), 'DF', 'D'), None, Rounding(format))
  changed = x_BTD.at[:, 2:].multiply(100)
  rounded = lambda x_BTD: weight.rounded(x_BTD, 'BTD')[:, :2]
  np.testing.assert_array_equal(rounded(changed), rounded(x_BTD))
  assert np.any(rounded(x_BTD) != x_BTD[:, :2])


@pytest.mark.parametrize('format, refused', [(NVFP4(), True), (MXFP4(), False)], ids=lambda value: str(value))
def test_a_factor_that_devices_would_have_to_share_is_refused(mesh, format, refused):
  """Where `shard_map` cuts an expert, each would find a factor of its own, and train what is not stored."""
  local = lambda w_DF: FakeQuantized(Dense(w_DF, 'DF', 'D'), Rounding(format)).materialize()
  with mesh(1, 1, 4, 2):
    cut = PartitionSpec(None, 'tensor')
    mapped = jax.shard_map(local, in_specs=cut, out_specs=cut, check_vma=False)
    if refused:
      with pytest.raises(IncompatibleError, match=r"NVFP4 .*share an expert over \('tensor',\)"): mapped(draw('DF'))
    else: np.testing.assert_array_equal(mapped(draw('DF')), local(draw('DF')))


def test_blocks_of_tokens_are_refused():
  weight = FakeQuantized(Dense(draw('DF'), 'DF', 'D'), None, Rounding(Float8(scales=Block(outputs=8, inputs=32))))
  with pytest.raises(ValueError, match='blocks of 8 x 32 do not divide 1 outputs'): weight.rounded(draw('BTD'), 'BTD')


def test_a_float_teacher_and_a_quantized_student_never_affect_each_other():
  """The same einsum on arrays of the same shape, compiled in either order in one process."""
  dense, x = Dense(draw('DF'), 'DF', 'D'), draw('BTD', seed=1)
  run = jax.jit(lambda weight, x: weight.contract('BTD,DF->BTF', x))
  student = FakeQuantized(dense, Rounding(Int(bits=2)))
  kinds = [dense, student, student.converted()]
  forwards = [run(weight, x) for weight in kinds]
  jax.clear_caches()
  backwards = [run(weight, x) for weight in reversed(kinds)][::-1]
  for before, after in zip(forwards, backwards, strict=True): np.testing.assert_array_equal(before, after)
  np.testing.assert_allclose(forwards[0], jnp.einsum('BTD,DF->BTF', x, dense.materialize()), rtol=1e-5, atol=1e-5)
  assert np.abs(forwards[1] - forwards[0]).max() > 1
  assert isinstance(kinds[2], Quantized)


def test_eight_bit_rules_put_products_of_integers_for_experts_into_the_compiled_program():
  """What other stacks leave out in silence. Read off the program that XLA has compiled."""
  rounding, sizes = Rounding(Int()), jnp.array([2, 0, 3, 1])
  expert = quantized(Dense(draw('EDF'), 'EDF', 'D'), Int(), rounding)
  assert expert.product == 'int8 x int8'
  compiled = jax.jit(lambda weight, x: weight.contract_grouped(x, sizes)).lower(expert, draw('BTD').reshape(6, 64)).compile()
  text = compiled.as_text()
  assert 's32[' in text and 's8[4,64,32]' in text, 'the matrices enter as they are stored, and integers come out'
  assert re.search(r's32\[\d+,32\]\S* (dot|custom-call|fusion|call)\(', text)
