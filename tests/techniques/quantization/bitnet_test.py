"""BitNet: three levels by the mean, a norm where a layer has none, and gradients through all of it."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.compression import layerwise
from efficient_lm.compression.rules import Rule
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Int, Ternary
from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.parallel import sharding
from efficient_lm.techniques.quantization.bitnet import BitNet
from efficient_lm.training.learner import Learner
from efficient_lm.tree import rewrite, select
from efficient_lm.weights.fake_quantized import FakeQuantized, Normalized
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Dense, Weight

V, D, F = 24, 16, 32
# Optimising these small programs takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def learner(mlp=None):
  """Numbers drawn by numpy."""
  stack = spec.Stack(num_layers=2, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8),
                     mlp=mlp or spec.SwiGLU(hidden=F))
  rng = np.random.default_rng(0)
  abstract = jax.eval_shape(lambda: spec.Transformer(vocab_size=V, dim=D, stacks=(stack,)).build(rngs=nnx.Rngs(0)))
  return Learner(jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), abstract), None, None)


@functools.cache
def ternary(): return BitNet()(learner(), None)


def test_every_weight_is_minus_or_plus_the_mean_magnitude_or_zero():
  found = dict(select(ternary().model, FakeQuantized))
  assert {path.split('/')[-1] for path in found} == {'query', 'key', 'value', 'gate', 'up', 'inner'} and len(found) == 7
  for weight in found.values():
    inner, rounded = np.asarray(weight.inner.materialize()), np.asarray(jit(weight.materialize)())
    mean = np.abs(inner).reshape(2, -1).mean(1).reshape(2, *[1] * (inner.ndim - 1))   # a layer each
    np.testing.assert_allclose(rounded, np.clip(np.round(inner / mean), -1, 1) * mean, rtol=1e-5)


def test_only_products_that_no_norm_precedes_get_one():
  names = {path.split('/')[-1] for path, _ in select(ternary().model, Normalized)}
  assert names == {'output', 'down'}
  assert {path for path, weight in select(ternary().model, Weight) if isinstance(weight, Dense)} == {'embed', 'own_head'}


def test_a_layer_computes_what_the_paper_says():
  """Norm, eight bits to a token, three levels (sections 2 and 2.1), written out."""
  weight = jax.tree.map(lambda a: a[0], ternary().model.stacks[0].blocks.mlp.down)
  x = draw(2, 3, F) * 5
  normal = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
  step = jnp.abs(normal).max(-1, keepdims=True) / 127
  w_FD = weight.inner.inner.materialize()
  mean = jnp.abs(w_FD).mean()
  expected = (jnp.round(normal / step) * step) @ (jnp.clip(jnp.round(w_FD / mean), -1, 1) * mean)
  np.testing.assert_allclose(jit(weight.contract, static_argnums=0)('BTF,FD->BTD', x), expected, rtol=1e-4, atol=1e-4)


def test_a_normalized_product_does_not_see_how_large_its_inputs_are():
  weight, x = Normalized(Dense(draw(F, D), 'FD', 'F')), draw(3, 4, F)
  of = lambda x: weight.contract('BTF,FD->BTD', x)
  np.testing.assert_allclose(of(x * 100), of(x), rtol=1e-4, atol=1e-4)
  # So no gradient has a part along them.
  gradient = jax.grad(lambda x: jnp.vdot(draw(3, 4, D, seed=1), of(x)))(x)
  assert np.abs(jnp.sum(gradient * x, -1)).max() < 1e-4


def test_a_norm_is_all_that_is_added_whatever_is_inside():
  x, sizes = draw(6, F), jnp.array([2, 0, 4])
  normal = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
  inner = FakeQuantized(Dense(draw(3, F, D), 'EFD', 'F'), Rounding(Int(bits=4)))
  got, wanted = Normalized(inner).contract_grouped(x, sizes), inner.contract_grouped(normal, sizes)
  np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(Normalized(inner).materialize(), inner.materialize())
  heads = Dense(draw(2, F // 2, D), 'NHD', 'NH')
  got = Normalized(heads).contract('BTNH,NHD->BTD', x.reshape(2, 3, 2, F // 2))
  np.testing.assert_allclose(got, heads.contract('BTNH,NHD->BTD', normal.reshape(2, 3, 2, F // 2)), rtol=1e-4, atol=1e-4)


def test_a_norm_stays_when_its_weight_is_stored_in_few_bits_however_the_two_are_nested():
  dense, x = Dense(draw(F, D), 'FD', 'F'), draw(2, 3, F)
  rounding, tokens = Rounding(Int(bits=4)), Rounding(Int())
  trained = FakeQuantized(Normalized(dense), rounding, tokens)
  wanted = Normalized(FakeQuantized(dense, rounding, tokens)).contract('BTF,FD->BTD', x)
  np.testing.assert_array_equal(trained.contract('BTF,FD->BTD', x), wanted)
  inside = rewrite(Normalized(FakeQuantized(dense, rounding, tokens)), FakeQuantized, lambda _, weight: weight.converted())
  for stored in (trained.converted(), inside):
    assert isinstance(stored, Normalized) and isinstance(stored.inner, Quantized)
    np.testing.assert_allclose(stored.contract('BTF,FD->BTD', x), wanted, rtol=1e-4, atol=1e-4)
  # A norm that no training has put there: post-training quantization would drop it.
  with pytest.raises(IncompatibleError, match='is trained as float32, after a norm'):
    layerwise.nearest('down', Normalized(dense), Rule(weights=Int(bits=4)), layerwise.RoundToNearest())


def test_it_says_what_it_reaches():
  note, = ternary().notes
  assert note.startswith('BitNet reaches ') and 'left as they are: embed, own_head' in note
  assert note.endswith('a norm before stacks/0/blocks/attention/output, stacks/0/blocks/mlp/down')


@pytest.mark.parametrize('technique, message', [
  (BitNet(where='blcoks'), "'blcoks' decides nothing"), (BitNet(normalized='dwon'), "'dwon' matches none of the weights")],
  ids=['where', 'normalized'])
def test_a_selector_that_matches_nothing_is_an_error(technique, message):
  with pytest.raises(ValueError, match=message): technique(learner(), None)


def test_a_wrong_field_is_named():
  assert [name for name, _, _ in BitNet(where='(', normalized='[').check()] == ['where', 'normalized']
  assert list(BitNet().check()) == []


def test_experts_whose_inputs_are_cut_over_devices_are_normalised_over_all_of_them(mesh):
  """Float weights, so that nothing jumps: what is new here is the mean over devices and its gradient."""
  site = spec.Site(dim=D, depth=2, norm_eps=1e-6)
  moe = spec.MoE(num_experts=4, hidden=F, dispatch=routing.Dispatch(transport='gather')).build(site, rngs=nnx.Rngs(params=0))
  moe = rewrite(moe, Weight, lambda _, weight: Normalized(weight), 'experts/down')
  x_BTD, g_BTD = draw(8, 4, D), draw(8, 4, D, seed=1)
  of = lambda call: jit(jax.value_and_grad(lambda moe, x_BTD: jnp.vdot(g_BTD, call(moe, x_BTD)), argnums=(0, 1)))
  wanted = of(lambda moe, x_BTD: moe.oracle(x_BTD))(moe, x_BTD)
  with mesh(1, 2, 2, 2):
    placed = jax.device_put(moe, sharding.shardings(moe, jax.sharding.get_mesh()))
    ours = of(lambda moe, x_BTD: moe(x_BTD)[0])(placed, x_BTD)
  for a, b in zip(jax.tree.leaves(jax.device_get(ours)), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_ternary_experts_too():
  model = jax.eval_shape(lambda: BitNet()(learner(spec.MoE(num_experts=4, hidden=F)), None).model)
  found = dict(select(model, FakeQuantized))
  assert len(found) == 7 and all(weight.weights.format == Ternary() for weight in found.values())
