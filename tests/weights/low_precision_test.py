"""Low precision changes no value of a weight; its products are those of the operation, its noise is new at each step."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.formats import Int
from efficient_lm.ops.low_precision_matmul import low_precision_contract, low_precision_grouped_matmul
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.low_precision import LowPrecision, low_precision
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.step_counter import StepCounter
from efficient_lm.weights.weight import Dense

B, T, D, F, V, E = 2, 6, 8, 12, 10, 4
INT8, PLAIN = dict.fromkeys(('forward', 'dgrad', 'wgrad'), 'int8'), dict.fromkeys(('forward', 'dgrad', 'wgrad'))


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def noisy(array, axes, inputs, seed=0):
  return low_precision(Dense(array, axes, inputs), INT8, jax.random.key(seed))


def at(weight, step):
  """The weight after `step` steps."""
  counter = StepCounter(jnp.full_like(weight.counter.get_value(), step))
  return LowPrecision(weight.inner, dict(weight.formats), counter, weight.seed)


def test_its_values_are_those_of_what_it_holds_and_it_looks_up_the_same_rows():
  dense = Dense(draw(V, D), 'VD', 'D')
  weight = low_precision(dense, INT8)
  np.testing.assert_array_equal(weight.materialize(), dense.materialize())
  np.testing.assert_array_equal(weight.take(jnp.array([3, 1])), dense.take(jnp.array([3, 1])))
  assert (weight.axes, weight.inputs) == ('VD', 'D')


def test_its_products_are_those_of_the_operation():
  dense, x = Dense(draw(D, F), 'DF', 'D'), draw(B, T, D, seed=1)
  y = low_precision(dense, INT8).contract('BTD,DF->BTF', x)
  np.testing.assert_array_equal(y, low_precision_contract('BTD,DF->BTF', x, dense.materialize(), **INT8))
  assert (y != dense.contract('BTD,DF->BTF', x)).any()
  experts, x, sizes = Dense(draw(E, D, F), 'EDF', 'D'), draw(9, D, seed=1), jnp.array([2, 0, 4, 1])
  y = low_precision(experts, INT8).contract_grouped(x, sizes)
  np.testing.assert_array_equal(y, low_precision_grouped_matmul(x, experts.materialize(), sizes, **INT8))


def test_activations_are_rounded_as_its_inner_weight_does():
  inner, x = FakeQuantized(Dense(draw(D, F), 'DF', 'D'), Rounding(Int(bits=4)), Rounding(Int(bits=4))), draw(B, T, D, seed=1)
  np.testing.assert_array_equal(low_precision(inner, PLAIN).contract('BTD,DF->BTF', x), inner.contract('BTD,DF->BTF', x))


def test_without_formats_it_is_its_inner_weight_bit_for_bit():
  dense, x = Dense(draw(D, F), 'DF', 'D'), draw(B, T, D, seed=1)
  slope = lambda weight: jax.grad(lambda weight: jnp.sum(weight.contract('BTD,DF->BTF', x) ** 2))(weight)
  np.testing.assert_array_equal(slope(low_precision(dense, PLAIN)).inner.array.get_value(), slope(dense).array.get_value())


def gradients(weight, x):
  """By x and by the array."""
  _, pull = jax.vjp(lambda x, dense: LowPrecision(dense, dict(weight.formats), weight.counter, weight.seed).contract(
    'BTD,DF->BTF', x), x, weight.inner)
  dx, dense = pull(draw(B, T, F, seed=2))
  return dx, dense.array.get_value()


def test_noise_differs_between_steps_and_weights_and_is_the_same_at_the_same_step():
  weight, x = noisy(draw(D, F), 'DF', 'D'), draw(B, T, D, seed=1)
  first = gradients(weight, x)
  for same in (weight, at(weight, 0)): jax.tree.map(np.testing.assert_array_equal, gradients(same, x), first)
  for other in (at(weight, 1), noisy(draw(D, F), 'DF', 'D', seed=5)):
    assert all((a != b).any() for a, b in zip(gradients(other, x), first))


def test_each_layer_of_a_stack_has_a_counter_and_a_seed_of_its_own():
  weight = noisy(draw(3, D, F), 'DF', 'D')
  assert weight.counter.get_value().shape == weight.seed.get_value().shape == (3,)
  assert len(set(weight.seed.get_value().tolist())) == 3
  assert noisy(draw(E, D, F), 'EDF', 'D').counter.get_value().shape == ()


def test_the_seed_is_no_parameter():
  _, params, rest = nnx.split(noisy(draw(D, F), 'DF', 'D'), nnx.Param, ...)
  assert len(jax.tree.leaves(params)) == 2 and [leaf.dtype for leaf in jax.tree.leaves(rest)] == [jnp.uint32]


def test_a_weight_that_is_cast_multiplies_as_before():
  weight, x = noisy(draw(D, F), 'DF', 'D'), draw(B, T, D, seed=1).astype(jnp.bfloat16)
  cast = weight.cast(jnp.bfloat16)
  assert cast.materialize().dtype == jnp.bfloat16 and cast.counter is weight.counter
  np.testing.assert_array_equal(cast.contract('BTD,DF->BTF', x), weight.contract('BTD,DF->BTF', x))


@pytest.mark.parametrize('formats', [PLAIN, INT8], ids=['float', 'int8'])
def test_nll_is_that_of_its_logits_in_pieces_as_in_one(formats, monkeypatch):
  weight, hidden = low_precision(Dense(draw(D, V), 'DV', 'D'), formats), draw(B, T, D, seed=1)
  labels = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)))
  logits = weight.contract('BTD,DV->BTV', hidden, jnp.float32)
  logsumexp = jax.nn.logsumexp(logits, -1)
  wanted = logsumexp - jnp.take_along_axis(logits, labels[..., None], -1)[..., 0], logsumexp
  for rows in (1024, 4):
    monkeypatch.setattr('efficient_lm.weights.weight.ROWS', rows)
    for got, one in zip(jax.jit(lambda w, h: w.nll(h, labels))(weight, hidden), wanted, strict=True):
      np.testing.assert_allclose(got, one, rtol=1e-5, atol=1e-5)
  slope = jax.jit(jax.grad(lambda hidden: jnp.sum(weight.nll(hidden, labels)[0])))(hidden)
  exact = jax.grad(lambda hidden: jnp.sum(Dense(draw(D, V), 'DV', 'D').nll(hidden, labels)[0]))(hidden)
  np.testing.assert_allclose(slope, exact, rtol=0, atol=(0.05 if formats is INT8 else 1e-5) * jnp.abs(exact).max())
