"""A weight with an adapter multiplies as one matrix, the sum, does."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.formats import Group, Int
from efficient_lm.tree import num_bytes
from efficient_lm.weights.low_rank import LowRank, held, low_rank, released
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.quantized import round_to_nearest
from efficient_lm.weights.weight import Dense, Transposed
from tests.weights.every import EQUATIONS, draw

P = 3
STORED = {'float': lambda dense: dense, 'int8': lambda dense: round_to_nearest(dense, Int()),
          'int4': lambda dense: round_to_nearest(dense, Int(bits=4, scales=Group(size=16)))}


def adapted(axes, inputs, stored='float', seed=0):
  """A weight whose adapter adds something."""
  made = low_rank(STORED[stored](Dense(draw(axes, seed), axes, inputs)), P, 0.5, jax.random.key(seed))
  up = np.random.default_rng(seed).normal(size=made.up.get_value().shape)
  return LowRank(made.inner, made.down, jnp.asarray(up, jnp.float32), made.scale)


def close(got, wanted, terms: int):
  """Sums in another order: at most so many roundings of 2^-24 of numbers of the largest size."""
  np.testing.assert_allclose(got, wanted, rtol=0, atol=terms * 2. ** -23 * float(jnp.abs(wanted).max(initial=0.)))


@pytest.mark.thinned
@pytest.mark.parametrize('stored', STORED)
@pytest.mark.parametrize('equation, inputs', EQUATIONS)
def test_a_product_is_that_of_the_sum(equation, inputs, stored):
  x_axes, w_axes = equation.split('->')[0].split(',')
  weight, x = adapted(w_axes, inputs, stored), draw(x_axes, 1)
  close(weight.contract(equation, x), jnp.einsum(equation, x, weight.materialize()), 64)
  assert weight.contract(equation, x, jnp.float32).dtype == jnp.float32 and weight.rank == P
  close(weight.for_decoding().contract(equation, x), weight.contract(equation, x), 64)
  assert weight.shape == weight.merged().shape and isinstance(weight.merged(), Dense)
  np.testing.assert_array_equal(weight.merged().materialize(), weight.materialize())


@pytest.mark.parametrize('stored', STORED)
@pytest.mark.parametrize('axes, inputs', [('EDF', 'D'), ('EFD', 'F')])
def test_each_expert_has_an_adapter_of_its_own(axes, inputs, stored):
  weight, sizes_E = adapted(axes, inputs, stored), jnp.array([2, 0, 3, 1])
  x = jnp.asarray(np.random.default_rng(2).normal(size=(8, weight.shape[1])), jnp.float32)
  got, array = weight.contract_grouped(x, sizes_E), weight.materialize()
  starts = np.cumsum([0, *sizes_E])
  for e in range(4): close(got[starts[e]:starts[e + 1]], x[starts[e]:starts[e + 1]] @ array[e], 64)
  assert not np.any(got[6:])


def test_layers_of_a_stack_have_one_each():
  stack = low_rank(Dense(jnp.stack([draw('DNH', 0), draw('DNH', 1)]), 'DNH', 'D'), P, 1.0, jax.random.key(0))
  assert stack.down.get_value().shape == (2, 64, P) and stack.up.get_value().shape == (2, P, 2, 32)
  assert np.any(stack.down.get_value()[0] != stack.down.get_value()[1])
  np.testing.assert_array_equal(stack.materialize(), stack.inner.materialize())


def test_a_new_adapter_adds_nothing_bit_for_bit():
  dense, x = Dense(draw('DF'), 'DF', 'D'), draw('BTD', 1)
  np.testing.assert_array_equal(low_rank(dense, P, 2.0, jax.random.key(0)).contract('BTD,DF->BTF', x),
                                dense.contract('BTD,DF->BTF', x))


def test_under_a_mask_the_sum_is_masked():
  weight, keep = adapted('DF', 'D'), draw('DF', 5) > 0
  masked, x = Masked(weight, keep), draw('BTD', 1)
  assert not np.any(masked.materialize()[~keep]) and np.all(masked.materialize()[keep] == weight.materialize()[keep])
  close(masked.contract('BTD,DF->BTF', x), x @ masked.materialize(), 64)
  assert [one.kind for one in masked.invariants()] == ['zeros']
  merged = Masked(weight.merged(), keep).cleaned()
  np.testing.assert_array_equal(merged.inner.materialize(), masked.materialize())


def test_a_product_over_outputs_reads_the_sum():
  table, x = adapted('VD', 'D'), draw('BTD', 1)
  close(Transposed(table).contract('BTD,DV->BTV', x), x @ table.materialize().T, 64)


def test_what_is_held_has_no_parameters_and_comes_back():
  from flax import nnx
  weight = adapted('DF', 'D')
  assert not jax.tree.leaves(nnx.state(held(weight), nnx.Param)) and num_bytes(held(weight)) == num_bytes(weight)
  back = released(held(weight))
  assert jax.tree.structure(back) == jax.tree.structure(weight)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(weight), strict=True): np.testing.assert_array_equal(a, b)


def test_a_cast_casts_both():
  assert {leaf.dtype for leaf in jax.tree.leaves(adapted('DF', 'D').cast(jnp.bfloat16))} == {jnp.dtype('bfloat16')}
