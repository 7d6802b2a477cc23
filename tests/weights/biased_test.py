"""A bias is added to what its weight's product is, whatever has become of the weight, and nothing but training moves it."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.compression import layerwise, rewriting
from efficient_lm.compression.rules import Rule
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Int
from efficient_lm.parallel.sharding import weight_spec
from efficient_lm.training import transforms
from efficient_lm.weights.biased import Biased, beneath, unbiased
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.quantized import Quantized, round_to_nearest
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.rotated import Rotated, innermost, within
from efficient_lm.weights.weight import Dense
from tests.compressing import masked_once
from tests.weights.every import EQUATIONS, draw


def biased(equation, inputs):
  letters = equation.split('->')[0].split(',')[1]
  outputs = ''.join(letter for letter in letters if letter not in inputs)
  return Biased(Dense(draw(letters), letters, inputs), draw(outputs, seed=2)), draw(equation.split(',')[0], seed=1)


@pytest.mark.parametrize('equation, inputs', EQUATIONS)
def test_the_product_is_that_of_the_weight_plus_the_bias(equation, inputs):
  weight, x = biased(equation, inputs)
  expected = weight.inner.contract(equation, x) + weight.bias.get_value()
  np.testing.assert_array_equal(weight.contract(equation, x), expected)


KINDS = {
  'quantized': lambda weight: round_to_nearest(weight, Int()),
  'fake-quantized': lambda weight: FakeQuantized(weight, Rounding(Int()), Rounding(Int())),
  'masked': lambda weight: Masked(weight, jnp.arange(weight.shape[-1]) % 2 == jnp.zeros(weight.shape, int)),
}


@pytest.mark.parametrize('kind', KINDS)
def test_what_stands_inside_keeps_its_bias(kind):
  equation = 'BTD,DF->BTF'
  weight, x = biased(equation, 'D')
  changed = beneath(weight, KINDS[kind])
  assert type(changed.inner) is type(KINDS[kind](weight.inner)) and changed.bias is weight.bias
  expected = KINDS[kind](weight.inner).contract(equation, x) + weight.bias.get_value()
  np.testing.assert_array_equal(changed.contract(equation, x), expected)


@pytest.mark.parametrize('kind', ['fake-quantized', 'masked'])
def test_a_wrapper_that_knows_no_bias_does_not_lose_it(kind):
  """Whoever wraps a weight without looking inside multiplies by its `multiply`."""
  equation = 'BTD,DF->BTF'
  weight, x = biased(equation, 'D')
  expected = beneath(weight, KINDS[kind]).contract(equation, x)
  np.testing.assert_allclose(KINDS[kind](weight).contract(equation, x), expected, rtol=1e-6, atol=1e-6)


def test_every_rewrite_finds_the_weight_inside():
  weight, _ = biased('BTD,DF->BTF', 'D')
  rule = Rule(where='w', weights=Int())
  model = {'w': weight}
  nearest = lambda path, one, rule: layerwise.nearest(path, one, rule, layerwise.RoundToNearest())
  stored = rewriting.apply(model, (rule,), nearest)
  pruned = rewriting.apply_where(model, 'w', lambda path, one: masked_once(one, .5))
  for changed, kind in ((stored['w'], Quantized), (pruned['w'], Masked)):
    assert isinstance(changed, Biased) and isinstance(changed.inner, kind) and changed.bias is weight.bias
    kinds = [one.kind for one in changed.invariants()]
    assert kinds and kinds == [one.kind for one in changed.inner.invariants()]
  turned = within(Biased(Rotated(weight.inner, 4), weight.bias), lambda inner: round_to_nearest(inner, Int()))
  assert isinstance(turned, Biased) and isinstance(turned.inner, Rotated) and isinstance(innermost(turned), Quantized)
  assert unbiased(turned) is turned.inner and unbiased(weight.inner) is weight.inner


def test_where_a_bias_has_no_meaning_it_is_refused():
  weight, _ = biased('BTR,RNH->BTNH', 'R')
  with pytest.raises(IncompatibleError, match='over the outputs of a weight with a bias'):
    weight.contract('BTNH,RNH->BTNR', draw('BTNH'))
  with pytest.raises(IncompatibleError, match='biases of experts'): Biased(Dense(draw('EDF'), 'EDF', 'D'), draw('EF'))
  with pytest.raises(IncompatibleError, match='a head with a bias'): weight.nll(draw('BTD'), jnp.zeros((2, 3), int))


def test_it_lies_as_its_outputs_do_and_does_not_decay(mesh):
  weight, _ = biased('BTD,DNH->BTNH', 'D')
  with mesh(1, 2, 2, 2):
    assert weight_spec('NH', weight.bias.get_value().shape, jax.sharding.get_abstract_mesh()) == jax.P('tensor', None)
  assert weight.bias.get_metadata()['axes'] == 'NH'
  decays = transforms.matrices(weight)
  assert decays.inner.array.get_value() and not decays.bias.get_value()
