"""Tokens are rounded each by itself, and gradients pass straight through."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.formats import Block, Float8, Int
from efficient_lm.formats.ranges import Reduce
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.quantizers import Delayed, Rounding, straight_through
from efficient_lm.weights.weight import Dense
from tests.formats.every import FORMATS
from tests.weights.every import draw


def test_tokens_are_rounded_by_themselves():
  weight, x = FakeQuantized(Dense(draw('NHD'), 'NHD', 'NH'), None, Rounding(Int(bits=4))), draw('BTNH', seed=1)
  other = np.array(x)
  other[1, 0] *= 50
  before, after = (np.asarray(weight.prepare_input(v, 'BTNH')) for v in (x, jnp.asarray(other)))
  np.testing.assert_array_equal(np.argwhere((before != after).any((2, 3))), [[1, 0]])
  assert len(np.unique(np.round(before[0, 0] / np.abs(before[0, 0]).max() * 7, 3))) <= 15
  assert weight.prepare_input(x, 'BTN') is x, 'a product over other dims is another one'


@pytest.mark.thinned
@pytest.mark.parametrize('format', [one for one in FORMATS if not isinstance(one.scales, Block)], ids=lambda one: one.name)
def test_no_token_s_rounding_depends_on_another_token(format):
  """Those after it, above all: rounding must not make a model look ahead."""
  x_BTD = draw('BTD', seed=3)
  weight = FakeQuantized(Dense(draw('DF'), 'DF', 'D'), None, Rounding(format))
  changed = x_BTD.at[:, 2:].multiply(100)
  rounded = lambda x_BTD: weight.prepare_input(x_BTD, 'BTD')[:, :2]
  np.testing.assert_array_equal(rounded(changed), rounded(x_BTD))
  assert np.any(rounded(x_BTD) != x_BTD[:, :2])


def test_blocks_of_tokens_are_refused():
  weight = FakeQuantized(Dense(draw('DF'), 'DF', 'D'), None, Rounding(Float8(scales=Block(outputs=8, inputs=32))))
  with pytest.raises(ValueError, match='blocks of 8 x 32 do not divide 1 outputs'): weight.prepare_input(draw('BTD'), 'BTD')


def test_the_gradient_passes_straight_through():
  direction = draw('DF', seed=2)
  weight = lambda array: FakeQuantized(Dense(array, 'DF', 'D'), Rounding(Int(bits=2))).materialize()
  np.testing.assert_array_equal(jax.grad(lambda array: jnp.sum(direction * weight(array)))(draw('DF')), direction)
  value, tangent = jax.jvp(straight_through, (jnp.float32(0.1), jnp.float32(0.3)), (jnp.float32(1), jnp.float32(5)))
  assert (value, tangent) == (jnp.float32(0.3), 1)


def test_scales_are_those_with_which_it_would_be_stored():
  for format in FORMATS:
    quantizer, w_OI = Rounding(format), draw('FD')
    scales = quantizer.scales(w_OI, Reduce())
    np.testing.assert_array_equal(quantizer(w_OI, Reduce()), format.rounded(w_OI, scales))
    assert quantizer.format == format and quantizer.format is not format, 'a config that changes later changes no model'


@pytest.mark.parametrize('start', [1, 3])
def test_a_delayed_quantizer_is_the_identity_until_it_begins(start):
  """Bit for bit, and as a part of a stack, where each layer has a counter."""
  inner, w_OI = Rounding(Int(bits=3)), jnp.stack([draw('FD'), draw('FD', seed=1)])
  delayed = Delayed(inner, start, (2,))
  for steps in range(start + 2):
    delayed.counter.set_value(jnp.full(2, steps, jnp.float32))
    expected = w_OI if steps < start else inner(w_OI, Reduce())
    np.testing.assert_array_equal(jax.jit(lambda quantizer: quantizer(w_OI, Reduce()))(delayed), expected)
  slope = jax.grad(lambda quantizer: jnp.sum(quantizer(w_OI, Reduce())))(delayed).counter.get_value()
  np.testing.assert_array_equal(slope, [-1, -1], err_msg='the counter goes one step forward')
  assert delayed.after_training() is inner and delayed.format is inner.format
  np.testing.assert_array_equal(delayed.scales(w_OI, Reduce()).scale, inner.scales(w_OI, Reduce()).scale)
