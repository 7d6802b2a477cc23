"""What QAT trains and what is stored of it are equal, whatever the letters."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.formats import Float8, Int, Ternary
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Dense, Transposed
from tests.formats.every import FORMATS, NAMES
from tests.weights.every import EQUATIONS, draw, pair

every = pytest.mark.parametrize('format', FORMATS, ids=NAMES)


@every
@pytest.mark.parametrize('equation, inputs', EQUATIONS[:2])
def test_stored_and_trained_weights_have_the_same_values(equation, inputs, format):
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
  rounded = trained.prepare_input(x, equation.split(',')[0])
  magnitudes = jnp.einsum(equation, jnp.abs(rounded), jnp.abs(trained.materialize()))
  difference = jnp.abs(stored.contract(equation, x) - trained.contract(equation, x))
  assert np.all(difference <= 64 * 2. ** -24 * magnitudes)


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
