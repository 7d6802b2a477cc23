"""Quantization-aware training reaches what it says it does, and leaves the float model where it should."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.learner import Learner
from efficient_lm.models import spec
from efficient_lm.techniques.quant_aware import QuantAware
from efficient_lm.tree import rewrite, select
from efficient_lm.weights import Dense, FakeQuantized, Weight, absmax_scale, fake_quantize

V, D = 24, 16
TOKENS = np.random.default_rng(1).integers(0, V, (2, 6)).astype(np.int32)
MIXTURE = spec.MoE(num_experts=4, hidden=8, num_shared=1)


@functools.cache
def learner(mlp='dense', attention='grouped'):
  """A learner without loss or optimizer: all that this technique touches is the model. Numbers drawn by numpy."""
  attentions = {'grouped': spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8),
                'latent': spec.Latent(num_heads=2, query_rank=6, kv_rank=5, nope_dim=4, rope_dim=4, value_dim=4)}
  stack = spec.Stack(num_layers=2, attention=attentions[attention],
                     mlp={'dense': spec.SwiGLU(hidden=24), 'experts': MIXTURE}[mlp])
  described = spec.Transformer(vocab_size=V, dim=D, stacks=(stack,))
  rng = np.random.default_rng(0)
  abstract = jax.eval_shape(lambda: described.build(rngs=nnx.Rngs(0)))
  number = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype)
  return Learner(jax.tree.map(number, abstract), None, None)


def quantized(technique, **kinds):
  return technique(learner(**kinds), jax.random.key(0))


@jax.jit
def logits_of(model):
  return model(TOKENS).logits_BTV


def test_every_rounded_weight_is_within_half_a_step_of_its_own_and_on_its_grid():
  found = dict(select(quantized(QuantAware(bits=4)).model, FakeQuantized))
  assert len(found) == 7
  for path, weight in found.items():
    inner, rounded = np.asarray(weight.inner.materialize()), np.asarray(jax.jit(weight.materialize)())
    step = np.asarray(absmax_scale(inner, weight.axes, weight.inputs, 4))
    assert np.all(np.abs(rounded - inner) <= step * 0.5001), path
    assert np.abs(rounded - inner).max() > step.min() * 0.25, f'{path} is rounded at all'
    np.testing.assert_allclose(rounded / step, np.round(rounded / step), atol=1e-4, err_msg=path)


@pytest.mark.parametrize('kinds, names', [
  ({}, {'query', 'key', 'value', 'output', 'gate', 'up', 'down'}),
  ({'mlp': 'experts'}, {'query', 'key', 'value', 'output', 'gate', 'up', 'down'}),
  ({'attention': 'latent'}, {'query_down', 'query_nope', 'query_rope', 'latent_down', 'key_rope', 'key_up', 'value_up',
                             'output', 'gate', 'up', 'down'}),
], ids=['dense', 'experts', 'latent'])
def test_every_matrix_of_the_layers_but_routers_is_rounded(kinds, names):
  model = quantized(QuantAware(bits=4), **kinds).model
  assert {path.split('/')[-1] for path, _ in select(model, FakeQuantized)} == names
  plain = {path for path, weight in select(model, Weight) if not isinstance(weight, FakeQuantized)}
  routers = {'stacks/0/blocks/mlp/router'} if 'mlp' in kinds else set()
  assert plain == {'embed', 'own_head'} | routers


@jax.jit
def slopes(model):
  return jax.grad(lambda model: jnp.mean(model(TOKENS).logits_BTV ** 2))(model)


def test_the_gradient_is_that_of_the_rounded_numbers_passed_straight_through():
  """As if the model simply held the rounded numbers."""
  model = quantized(QuantAware(bits=4)).model
  hold = lambda _, weight: Dense(jax.jit(weight.materialize)(), weight.axes, weight.inputs)
  by_rounded = rewrite(model, FakeQuantized, hold)
  for a, b in zip(jax.tree.leaves(slopes(model)), jax.tree.leaves(slopes(by_rounded)), strict=True):
    # The same sums in another program.
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max())


def test_activations_are_rounded_by_the_products_themselves():
  """With the finest weights there are, what is left is the rounding of what they multiply."""
  weight = dict(select(quantized(QuantAware(bits=16, activation_bits=3)).model, FakeQuantized))['stacks/0/blocks/mlp/up']
  layer = jax.tree.map(lambda a: a[0], weight)
  x = np.random.default_rng(2).normal(size=(2, 3, D)).astype(np.float32)
  expected = jnp.einsum('BTD,DF->BTF', fake_quantize(x, 'BTD', 'D', 3), layer.materialize())
  np.testing.assert_allclose(layer.contract('BTD,DF->BTF', x), expected, rtol=1e-5, atol=1e-5)


def test_fewer_bits_err_more():
  exact = logits_of(learner().model)
  errors = [float(jnp.mean((logits_of(quantized(QuantAware(bits=bits)).model) - exact) ** 2)) for bits in (8, 4, 2)]
  # A bit less is twice the step and four times the squared error: 4 bits less, 256 times; well over 16.
  assert 0 < errors[0] * 16 < errors[1] < errors[2]


def test_activation_bits_alone_change_the_model():
  exact = logits_of(learner().model)
  assert np.abs(logits_of(quantized(QuantAware(bits=16, activation_bits=4)).model) - exact).max() > 1e-2


@pytest.mark.parametrize('technique', [QuantAware(bits=16), QuantAware(bits=32), QuantAware(bits=16, activation_bits=16)],
                         ids=str)
def test_sixteen_bits_are_the_float_model_itself(technique):
  assert quantized(technique) is learner()


def test_the_note_names_the_large_weights_that_stay_float():
  note, = quantized(QuantAware(bits=4)).notes
  assert note.startswith('QuantAware (4 bits) reaches ') and note.endswith('left as they are: embed, own_head')
  everything, = quantized(QuantAware(bits=4, where='')).notes
  assert 'left' not in everything


@pytest.mark.parametrize('bits', [4, 16])
def test_a_selector_that_matches_nothing_is_an_error_that_names_what_there_is(bits):
  with pytest.raises(ValueError, match=r"matches 'blcoks'; the paths are embed, .*stacks/0/blocks/attention/key"):
    quantized(QuantAware(bits=bits, where='blcoks'))


def test_a_wrong_field_is_named():
  assert [name for name, _, _ in QuantAware(bits=1, activation_bits=1).check()] == ['bits', 'activation_bits']
  assert list(QuantAware().check()) == []
