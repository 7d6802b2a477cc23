"""The dense feed-forward layer is its equation."""
import jax
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
