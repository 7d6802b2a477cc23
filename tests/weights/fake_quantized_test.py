"""What QAT trains and what is stored of it are equal, whatever the letters."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.compression.rules import LAYERS
from efficient_lm.formats import Float8, Int, MidRise, Ternary
from efficient_lm.tree import rewrite
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Dense, Transposed, Weight
from tests.compressing import logits_of, model_of
from tests.formats.every import FORMATS, NAMES
from tests.weights.every import EQUATIONS, draw, pair

pytestmark = pytest.mark.usefixtures('quick_unless_long')

every = pytest.mark.parametrize('format', FORMATS, ids=NAMES)


@pytest.mark.parametrize('format', [Int(), Float8()], ids=lambda one: one.name)
def test_in_bfloat16_a_stored_model_is_as_near_to_float32_as_the_one_that_was_trained(format):
  def logits(dtype, change):
    trained = lambda weight: FakeQuantized(weight, Rounding(format), Rounding(format))
    model = rewrite(model_of(), Weight, lambda _, weight: change(trained(weight)), LAYERS)
    model.dtype = dtype
    return np.asarray(logits_of(model))
  trained, stored = lambda weight: weight, FakeQuantized.converted
  exact = logits('float32', trained)
  off = lambda got, wanted: np.sqrt(np.mean(np.square(got - wanted)) / np.mean(np.square(wanted)))
  assert off(logits('float32', stored), exact) < 1e-6
  of_trained, of_stored = (off(logits('bfloat16', change), exact) for change in (trained, stored))
  assert 0.01 < of_trained < 0.1 and abs(of_stored / of_trained - 1) < 0.1


@pytest.mark.thinned
@every
@pytest.mark.parametrize('equation, inputs', EQUATIONS[:2])
def test_stored_and_trained_weights_have_the_same_values(equation, inputs, format):
  """Bit for bit, in the same program or in two. Only the sum of a mean depends on the program."""
  trained, stored, _ = pair(equation, inputs, format)
  wanted = jax.jit(lambda weight: weight.materialize())(trained)
  if isinstance(format, Ternary): np.testing.assert_allclose(stored.materialize(), wanted, rtol=2. ** -21)
  else: np.testing.assert_array_equal(jax.jit(lambda weight: weight.materialize())(stored), wanted)


def within_bound(stored, trained, magnitudes, dtype) -> float:
  """The largest difference of two products over K = 64, in parts of what the module states."""
  unit = 2. ** -8 if dtype == jnp.bfloat16 else 2. ** -24
  difference = jnp.abs(stored.astype(jnp.float32) - trained.astype(jnp.float32))
  return float(jnp.max(difference / (jnp.maximum(magnitudes, 1e-30) * (4 * unit + 64 * 2. ** -24))))


@pytest.mark.thinned
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('activations', [None, Int(), Int(bits=4), Float8()], ids=lambda x: getattr(x, 'name', 'float'))
@pytest.mark.parametrize('format', FORMATS, ids=NAMES)
def test_stored_and_trained_weights_multiply_alike(format, activations, dtype):
  """To the bound that the module states: products over one letter, over two, and of experts."""
  for equation, inputs in EQUATIONS[:2]:
    trained, stored, x = pair(equation, inputs, format, activations)
    x = x.astype(dtype)
    rounded = jnp.abs(trained.prepare_input(x, equation.split(',')[0]).astype(jnp.float32))
    magnitudes = jnp.einsum(equation, rounded, jnp.abs(trained.materialize()))
    a, b = stored.contract(equation, x), trained.contract(equation, x)
    assert a.dtype == b.dtype == dtype and within_bound(a, b, magnitudes, dtype) <= 1
    off = jnp.sqrt(jnp.mean(jnp.square(a.astype(jnp.float32) - b)) / jnp.mean(jnp.square(b.astype(jnp.float32))))
    # What the module says of bfloat16; of float32, a few units.
    assert off < (0.0035 if dtype == jnp.bfloat16 else 3e-7)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('activations', [None, Int(), Float8()], ids=lambda x: getattr(x, 'name', 'float'))
@pytest.mark.parametrize('format', [Int(), Float8(), Int(bits=4), MidRise()], ids=lambda one: one.name)
def test_stored_and_trained_experts_multiply_alike(format, activations, dtype):
  trained = FakeQuantized(Dense(draw('EDF'), 'EDF', 'D'), Rounding(format), activations and Rounding(activations))
  x, sizes = draw('BTD', seed=1).reshape(6, -1).astype(dtype), jnp.array([2, 0, 3, 1])
  rounded = jnp.abs(trained.prepare_input(x, 'MD').astype(jnp.float32))
  matrices = jnp.abs(trained.materialize())[jnp.array([0, 0, 2, 2, 2, 3])]
  a, b = (weight.contract_grouped(x, sizes) for weight in (trained.converted(), trained))
  assert within_bound(a, b, jnp.einsum('MD,MDF->MF', rounded, matrices), dtype) <= 1


def test_every_product_rounds_its_activations():
  rounding, x, sizes = Rounding(Int(bits=3)), draw('BTD', seed=1), jnp.array([6, 0, 0, 0])
  rounded = FakeQuantized(Dense(draw('DF'), 'DF', 'D'), None, rounding).prepare_input(x, 'BTD')
  trained = lambda weight: FakeQuantized(weight, Rounding(Int()), rounding)
  for make in (trained, lambda weight: trained(weight).converted()):
    matrix, stacked, table = (make(Dense(draw(axes), axes, 'D')) for axes in ('DF', 'EDF', 'VD'))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)   # sums of 64 products of order one
    close(matrix.contract('BTD,DF->BTF', x), jnp.einsum('BTD,DF->BTF', rounded, matrix.materialize()))
    close(stacked.contract_grouped(x.reshape(6, -1), sizes), rounded.reshape(6, -1) @ stacked.materialize()[0])
    close(Transposed(table).contract('BTD,DV->BTV', x), jnp.einsum('BTD,VD->BTV', rounded, table.materialize()))


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
