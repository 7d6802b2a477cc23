"""Weights: the three verbs agree with the one array that a weight stands for."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.formats import Int, Ternary
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.quantized import round_to_nearest
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Dense, OutputsFirst, Transposed, initial

B, T, D, F, V, E = 2, 3, 8, 12, 10, 4
# Sums of at most 12 float32 products of order one, in another order: 12 * 2**-24 apiece, with room.
ROUNDING = dict(rtol=1e-5, atol=1e-5)


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def kinds(array, axes, inputs):
  dense = Dense(array, axes, inputs)
  rounded = lambda weight, bits: FakeQuantized(weight, Rounding(Int(bits=bits)))
  stored = {f'stored in {bits}': round_to_nearest(dense, Int(bits=bits)) for bits in (8, 4)}
  return {'dense': dense, 'rounded': rounded(dense, 4), 'nested': rounded(rounded(dense, 8), 4), **stored,
          'ternary': round_to_nearest(dense, Ternary())}


KINDS = ['dense', 'rounded', 'nested', 'stored in 8', 'stored in 4', 'ternary']


@pytest.mark.parametrize('kind', KINDS)
def test_contract_is_the_einsum_of_the_materialized_weight(kind):
  weight, x = kinds(draw(D, F), 'DF', 'D')[kind], draw(B, T, D, seed=1)
  got, wanted = weight.contract('BTD,DF->BTF', x), jnp.einsum('BTD,DF->BTF', x, weight.materialize())
  # Scales of stored weights multiply the sum, not what is summed.
  if 'stored' in kind or kind == 'ternary': np.testing.assert_allclose(got, wanted, **ROUNDING)
  else: np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize('kind', KINDS)
def test_contract_grouped_multiplies_each_row_by_its_experts_matrix(kind):
  weight, x = kinds(draw(E, D, F), 'EDF', 'D')[kind], draw(7, D, seed=1)
  sizes, expert = jnp.array([2, 0, 3, 1]), [0, 0, 2, 2, 2, 3]
  y = weight.contract_grouped(x, sizes)
  x, matrices = np.asarray(x), np.asarray(weight.materialize())
  each = [x[i] @ matrices[e] for i, e in enumerate(expert)]
  np.testing.assert_allclose(y, np.stack([*each, np.zeros(F)]), **ROUNDING)


@pytest.mark.parametrize('kind', KINDS)
def test_take_reads_rows_and_transposed_is_the_same_array_the_other_way(kind):
  weight, ids, x = kinds(draw(V, D), 'VD', 'D')[kind], jnp.array([[3, 0], [9, 3]]), draw(B, T, D, seed=1)
  np.testing.assert_array_equal(weight.take(ids), weight.materialize()[ids])
  head = Transposed(weight)
  assert (head.axes, head.inputs) == ('DV', 'D')
  np.testing.assert_array_equal(head.materialize(), weight.materialize().T)
  by_einsum = jnp.einsum('BTD,DV->BTV', x, head.materialize())
  np.testing.assert_allclose(head.contract('BTD,DV->BTV', x, jnp.float32), by_einsum, **ROUNDING)


@pytest.mark.parametrize('equation, inputs', [('BTD,DNH->BTNH', 'D'), ('BTNH,NHD->BTD', 'NH'), ('BTD,DF->BTF', 'D')])
def test_with_its_outputs_first_a_weight_has_the_same_values(equation, inputs):
  sizes = dict(B=B, T=T, D=D, F=F, N=2, H=6)
  x_axes, w_axes = equation.split('->')[0].split(',')
  dense = Dense(draw(*(sizes[letter] for letter in w_axes)), w_axes, inputs)
  moved, x = OutputsFirst(dense), draw(*(sizes[letter] for letter in x_axes), seed=1)
  assert moved.order.endswith(inputs) and (moved.axes, moved.inputs) == (dense.axes, dense.inputs)
  np.testing.assert_array_equal(moved.materialize(), dense.materialize())
  np.testing.assert_allclose(moved.contract(equation, x), dense.contract(equation, x), **ROUNDING)


@pytest.mark.parametrize('wrap', [lambda w: w, lambda w: FakeQuantized(w, Rounding(Int(bits=4)), Rounding(Int(bits=4)))],
                         ids=['float', '4 bits'])
def test_nll_is_minus_the_log_softmax_of_the_logits(wrap):
  head, x, labels = wrap(Dense(draw(D, V), 'DV', 'D')), draw(B, T, D, seed=1), jnp.array([[0, 3, 9], [1, 1, 5]])
  nll, normaliser = head.nll(x, labels)
  logits = head.contract('BTD,DV->BTV', x, jnp.float32)
  log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
  np.testing.assert_allclose(nll, -log_p, **ROUNDING)
  np.testing.assert_allclose(normaliser, jax.nn.logsumexp(logits, -1), **ROUNDING)


def test_contract_computes_in_the_dtype_of_x_and_answers_in_the_one_asked_for():
  weight, x = Dense(draw(D, F), 'DF', 'D'), draw(B, T, D).astype(jnp.bfloat16)
  assert weight.contract('BTD,DF->BTF', x).dtype == jnp.bfloat16
  assert weight.contract('BTD,DF->BTF', x, jnp.float32).dtype == jnp.float32
  assert weight.materialize().dtype == jnp.float32


@pytest.mark.parametrize('axes, inputs, fan_in', [('DF', 'D', 64), ('NHD', 'NH', 32), ('EFD', 'F', 128)])
def test_initial_weights_keep_the_variance_of_what_they_multiply(axes, inputs, fan_in):
  sizes = dict(D=64, F=128, N=4, H=8, E=4)
  weight = initial(jax.random.key(0), sizes, axes, inputs, scale=0.5)
  array = weight.materialize()
  assert array.shape == tuple(sizes[letter] for letter in axes)
  # Deviation of a sample deviation: 1 / sqrt(2 * size), under 1.6 % for the 2048 numbers of the smallest.
  assert np.std(array) == pytest.approx(0.5 * fan_in ** -0.5, rel=0.06)
  assert weight.array.get_metadata()['axes'] == axes and isinstance(weight.array, nnx.Param)


@pytest.mark.parametrize('sizes', [(2, 2, 1, 2), (1, 1, 2, 4), (8, 1, 1, 1)])
def test_nll_over_devices_is_that_of_one(mesh, sizes):
  """Tokens over data, fsdp and expert, vocabulary over tensor: values and gradients, weighted so that each counts."""
  hidden, head, labels, weights = jax.random.split(jax.random.key(0), 4)
  hidden_BTD, labels_BT = jax.random.normal(hidden, (8, 3, 16)), jax.random.randint(labels, (8, 3), 0, 20)
  head = initial(head, dict(D=16, V=20), 'DV', 'D', scale=4)
  weights_BT2 = jax.random.normal(weights, (8, 3, 2))
  def loss(head, hidden_BTD):
    return jnp.sum(jnp.stack(head.nll(hidden_BTD, labels_BT), -1) * weights_BT2), head.nll(hidden_BTD, labels_BT)
  run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  with mesh(*sizes): got = jax.jit(run)(head, hidden_BTD)
  # Sums of 20 words and 24 tokens, in another order.
  jax.tree.map(lambda got, wanted: np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5), got, run(head, hidden_BTD))
