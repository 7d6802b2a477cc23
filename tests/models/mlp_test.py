"""The dense feed-forward layers are their equations."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.models import spec

D, F = 16, 24


@pytest.fixture(scope='module')
def layer():
  return jax.jit(lambda: spec.SwiGLU(hidden=F).build(spec.Site(D, 1, 1e-6), rngs=nnx.Rngs(0)))()


@pytest.fixture(scope='module')
def run(layer):
  return jax.jit(lambda x: layer(x)[0])


def test_swiglu_equals_its_equation(layer, run):
  x = np.random.default_rng(0).normal(size=(2, 3, D)).astype(np.float32)
  gate, up, down = (np.asarray(weight.materialize()) for weight in (layer.gate, layer.up, layer.down))
  h = x @ gate
  expected = (h / (1 + np.exp(-h)) * (x @ up)) @ down
  # Two sums of 16 and 24 float32 products of order one.
  np.testing.assert_allclose(run(x), expected, rtol=1e-5, atol=1e-5)


def test_each_token_is_computed_by_itself(run):
  x = np.random.default_rng(0).normal(size=(2, 3, D)).astype(np.float32)
  other = x.copy()
  other[1, 2] += 1
  np.testing.assert_array_equal(np.argwhere((run(x) != run(other)).any(-1)), [[1, 2]])


def test_it_has_nothing_to_report(layer):
  assert jax.eval_shape(layer, jax.ShapeDtypeStruct((1, 1, D), 'float32'))[1] is None


def test_the_residual_branch_starts_smaller_in_a_deeper_model():
  build = jax.jit(lambda depth: spec.SwiGLU(hidden=F).build(spec.Site(D, depth, 1e-6), rngs=nnx.Rngs(0)))
  shallow, deep = build(1.0), build(9.0)
  np.testing.assert_allclose(deep.down.materialize() * 3, shallow.down.materialize(), rtol=1e-6)
  np.testing.assert_array_equal(deep.up.materialize(), shallow.up.materialize())


def drawn(described):
  """A layer of numbers drawn by numpy, biases too."""
  rng = np.random.default_rng(0)
  abstract = jax.eval_shape(lambda: described.build(spec.Site(D, 1, 1e-6), rngs=nnx.Rngs(0)))
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * .3, leaf.dtype), abstract)


def applied(weight, x):
  """x @ w, and the bias where there is one."""
  return x @ np.asarray(weight.materialize()) + (np.asarray(weight.bias.get_value()) if hasattr(weight, 'bias') else 0)


LAYERS = {
  'gated': (spec.Gated(hidden=F, activation='relu', biases=('gate', 'up', 'down')),
            lambda layer, x: applied(layer.down, np.maximum(applied(layer.gate, x), 0) * applied(layer.up, x))),
  'gated, silu': (spec.Gated(hidden=F), lambda layer, x: drawn(spec.SwiGLU(hidden=F))(x)[0]),
  'plain': (spec.Plain(hidden=F, activation='relu'),
            lambda layer, x: applied(layer.down, np.maximum(applied(layer.up, x), 0))),
  'plain, one bias': (spec.Plain(hidden=F, activation='relu', biases=('up',)),
                      lambda layer, x: applied(layer.down, np.maximum(applied(layer.up, x), 0))),
  'sigmoid gated': (spec.SigmoidGated(inner=spec.SwiGLU(hidden=F)),
                    lambda layer, x: np.asarray(layer.inner(x)[0]) / (1 + np.exp(-applied(layer.gate_out, x)))),
}


@pytest.mark.parametrize('name', LAYERS)
def test_each_layer_equals_its_equation(name):
  described, equation = LAYERS[name]
  layer, x = drawn(described), np.random.default_rng(1).normal(size=(2, 3, D)).astype(np.float32)
  y, report = jax.jit(lambda layer, x: layer(x))(layer, x)
  assert report is None
  np.testing.assert_allclose(y, equation(layer, x), rtol=1e-5, atol=1e-5)


def test_silu_with_a_gate_is_swiglu_as_it_always_was():
  """One structure, so that one compiled function and one checkpoint serve both."""
  assert jax.tree.structure(drawn(spec.Gated(hidden=F))) == jax.tree.structure(drawn(spec.SwiGLU(hidden=F)))


def test_biases_start_at_zero():
  layer = jax.jit(lambda: spec.Plain(hidden=F, activation='gelu').build(spec.Site(D, 1, 1e-6), rngs=nnx.Rngs(0)))()
  assert not np.any(layer.up.bias.get_value()) and not np.any(layer.down.bias.get_value())
  assert layer.up.bias.get_value().shape == (F,) and layer.down.bias.get_value().shape == (D,)
