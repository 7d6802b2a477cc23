"""Normalisation and rotary positions have the properties that attention relies on."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.models.layers import RMSNorm, apply_rope

B, T, N, H = 1, 6, 2, 8
THETA = 100.0
# Angles below 100 radians carry an error of 100 * 2**-24 in float32; every bound here is a few of those.
ROUNDING = dict(rtol=1e-4, atol=5e-5)
rotated = jax.jit(apply_rope, static_argnums=(2, 3))


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
