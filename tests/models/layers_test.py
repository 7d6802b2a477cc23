"""Normalisation and rotary positions have the properties that attention relies on."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.models import spec
from efficient_lm.models.layers import ACTIVATIONS, LayerNorm, RMSNorm, apply_rope
from efficient_lm.models.rope import LinearScaling, Yarn

B, T, N, H = 1, 6, 2, 8
THETA = 100.0
# Angles below 100 radians carry an error of 100 * 2**-24 in float32; every bound here is a few of those.
ROUNDING = dict(rtol=1e-4, atol=5e-5)
rotated = jax.jit(apply_rope, static_argnums=(2, 3, 4))


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def positions(*values):
  return np.array([values], np.int32)


both_layouts = pytest.mark.parametrize('layout', ['half', 'interleaved'])


@both_layouts
def test_rotation_keeps_norms_and_leaves_position_0_alone(layout):
  x = draw(B, T, N, H)
  y = rotated(x, positions(*range(T)), THETA, layout)
  np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), **ROUNDING)
  np.testing.assert_array_equal(y[:, 0], x[:, 0])
  assert np.abs(y[:, 1:] - x[:, 1:]).max() > 0.1, 'other positions turn'


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(['half', 'interleaved']), st.integers(0, 50), st.integers(0, 50), st.integers(0, 40))
def test_scores_depend_on_the_difference_of_positions_only(layout, query, key, shift):
  q, k = draw(1, 1, N, H), draw(1, 1, N, H, seed=1)
  score = lambda m, n: np.sum(np.asarray(rotated(q, positions(m), THETA, layout)) *
                              np.asarray(rotated(k, positions(n), THETA, layout)), -1)
  np.testing.assert_allclose(score(query + shift, key + shift), score(query, key), rtol=1e-3, atol=3e-4)


def test_the_layouts_are_one_rotation_up_to_the_order_of_dimensions():
  x, where = draw(B, T, N, H), positions(*range(T))
  order = np.concatenate([np.arange(0, H, 2), np.arange(1, H, 2)])   # what lies at 2i, 2i + 1 goes to i, i + H/2
  interleaved = np.asarray(rotated(x, where, THETA, 'interleaved'))
  np.testing.assert_allclose(interleaved[..., order], rotated(x[..., order], where, THETA, 'half'), **ROUNDING)


@both_layouts
def test_pair_i_turns_by_position_times_its_frequency(layout):
  """Written with complex numbers: the pair (a, b) is a + ib, and turning multiplies by exp(i angle)."""
  x, position = draw(1, 1, 1, H), 7
  split = (slice(0, H // 2), slice(H // 2, H)) if layout == 'half' else (slice(0, H, 2), slice(1, H, 2))
  pairs = x[0, 0, 0, split[0]] + 1j * x[0, 0, 0, split[1]]
  expected = pairs * np.exp(1j * position * THETA ** (-2 * np.arange(H // 2) / H))
  y = np.asarray(rotated(x, positions(position), THETA, layout))[0, 0, 0]
  np.testing.assert_allclose(y[split[0]] + 1j * y[split[1]], expected, **ROUNDING)


@both_layouts
def test_positions_that_are_interpolated_turn_as_those_between_would(layout):
  """Position 8 of a text that is read at a quarter of the frequency is position 2."""
  x = draw(1, 1, N, H)
  quarter = rotated(x, positions(8), THETA, layout, LinearScaling(factor=4.))
  np.testing.assert_allclose(quarter, rotated(x, positions(2), THETA, layout), **ROUNDING)


def test_yarn_makes_what_is_rotated_longer_by_its_magnitude():
  x, yarn = draw(B, T, N, H), Yarn(factor=4., original_length=64)
  y = rotated(x, positions(*range(T)), THETA, 'half', yarn)
  np.testing.assert_allclose(np.linalg.norm(y, axis=-1), yarn.magnitude * np.linalg.norm(x, axis=-1), **ROUNDING)


def test_rotation_computes_in_float32_and_answers_in_the_dtype_of_x():
  x = jnp.asarray(draw(B, T, N, H), jnp.bfloat16)
  y = rotated(x, positions(*range(1000, 1000 + T)), THETA, 'half')
  exact = rotated(x.astype(jnp.float32), positions(*range(1000, 1000 + T)), THETA, 'half')
  assert y.dtype == jnp.bfloat16
  # One rounding to 8 significant bits; bfloat16 angles of a thousand radians would be off by whole turns.
  np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2 ** -8, atol=1e-6)


@functools.cache
def norm(axes):
  module = RMSNorm(tuple({'N': N, 'H': H}[letter] for letter in axes), axes, 1e-6)
  module.scale.set_value(jnp.asarray(draw(*module.scale.get_value().shape, seed=3)))
  return module


@pytest.mark.parametrize('axes', ['H', 'NH'])
def test_norm_is_its_equation_over_the_dimensions_it_names(axes):
  x, dims = draw(B, T, N, H), tuple(range(-len(axes), 0))
  expected = x / np.sqrt(np.mean(x ** 2, dims, keepdims=True) + 1e-6) * np.asarray(norm(axes).scale.get_value())
  np.testing.assert_allclose(jax.jit(norm(axes))(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('axes', ['H', 'NH'])
def test_norm_does_not_see_the_size_of_its_input(axes):
  x = draw(B, T, N, H)
  # eps is 1e-6 of a mean square of one: half of it relative.
  np.testing.assert_allclose(jax.jit(norm(axes))(8 * x), jax.jit(norm(axes))(x), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize('bias', [True, False])
def test_layer_norm_is_its_equation_and_does_not_see_a_shift(bias):
  module, x = LayerNorm(H, 1e-5, bias), draw(B, T, N, H)
  module.scale.set_value(jnp.asarray(draw(H, seed=3)))
  if bias: module.bias.set_value(jnp.asarray(draw(H, seed=4)))
  expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * draw(H, seed=3)
  run = jax.jit(lambda x: module(x))
  np.testing.assert_allclose(run(x), expected + (draw(H, seed=4) if bias else 0), rtol=1e-5, atol=2e-6)
  np.testing.assert_allclose(run(x + 2), run(x), rtol=1e-4, atol=1e-5)   # 2 takes two bits of each number
  assert run(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
  assert (module.bias is None) == (not bias)


def test_activations_are_their_equations():
  x = np.linspace(-4, 4, 33)
  phi = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x])
  expected = {'silu': x / (1 + np.exp(-x)), 'gelu': x * phi, 'relu': np.maximum(x, 0), 'relu2': np.maximum(x, 0) ** 2,
              'gelu_tanh': x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))}
  assert set(expected) == set(ACTIVATIONS) == set(spec.ACTIVATIONS)
  for name, values in expected.items():
    np.testing.assert_allclose(ACTIVATIONS[name](x.astype(np.float32)), values, rtol=2e-5, atol=1e-6)
  assert np.abs(expected['gelu'] - expected['gelu_tanh']).max() > 1e-4, 'they are two'
