"""What is masked is exactly zero, whatever lies under the mask, and no gradient reaches it."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.formats import Int
from efficient_lm.weights.fake_quantized import fake_quantized
from efficient_lm.weights.invariants import Pattern
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Dense
from tests.weights.every import EQUATIONS, draw


def masked(axes, inputs, hidden=7.):
  """Half of a weight, with `hidden` under the mask."""
  keep = np.random.default_rng(1).random(draw(axes).shape) < 0.5
  return Masked(Dense(jnp.where(keep, draw(axes), hidden), axes, inputs), jnp.asarray(keep)), keep


@pytest.mark.parametrize('hidden', [7., np.inf, np.nan, -0.])
def test_what_lies_under_the_mask_is_never_seen(hidden):
  weight, keep = masked('DF', 'D', hidden)
  expected = np.where(keep, draw('DF'), np.float32(0))
  np.testing.assert_array_equal(weight.materialize(), expected)
  assert not np.signbit(np.asarray(weight.materialize())[~keep]).any()
  np.testing.assert_array_equal(weight.cleaned().inner.materialize(), expected)
  np.testing.assert_array_equal(weight.cast(jnp.bfloat16).materialize(), jnp.asarray(expected, jnp.bfloat16))


@pytest.mark.parametrize('equation, inputs', EQUATIONS)
def test_it_multiplies_as_what_it_materializes(equation, inputs):
  x_axes, w_axes = equation.split('->')[0].split(',')
  (weight, _), x = masked(w_axes, inputs), draw(x_axes, seed=2)
  plain = Dense(weight.materialize(), w_axes, inputs)
  np.testing.assert_array_equal(weight.contract(equation, x), plain.contract(equation, x))


def test_experts_multiply_their_masked_matrices():
  weight, _ = masked('EDF', 'D')
  x, sizes = draw('BTD').reshape(6, -1), jnp.array([2, 0, 3, 1])
  plain = Dense(weight.materialize(), 'EDF', 'D')
  np.testing.assert_array_equal(weight.contract_grouped(x, sizes), plain.contract_grouped(x, sizes))


@pytest.mark.parametrize('wrap', [lambda weight: weight, lambda weight: fake_quantized(weight, Rounding(Int(bits=4)))],
                         ids=['float', 'QAT'])
def test_no_gradient_reaches_what_is_masked(wrap):
  weight, keep = masked('DF', 'D')
  direction = draw('DF', seed=3)
  by = jax.grad(lambda dense: jnp.sum(direction * wrap(Masked(dense, weight.keep)).materialize()))(weight.inner)
  np.testing.assert_array_equal(by.array.get_value(), np.where(keep, direction, 0))


def test_its_kind_names_mask_and_pattern_and_the_pattern_is_a_copy():
  pattern, (weight, _) = Pattern(2, 4), masked('DF', 'D')
  assert weight.kind == 'float32, masked'
  other = Masked(weight.inner, weight.keep, pattern)
  assert other.kind == 'float32, masked 2:4' and other.pattern == pattern and other.pattern is not pattern
  assert other.around(lambda inner: inner).pattern == pattern and other.shape == weight.shape and other.axes == 'DF'
