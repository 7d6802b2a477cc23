"""A converted model holds the numbers that were trained, in few bits."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.compression.rules import Rule
from efficient_lm.formats import Float8, Group, Int, MidRise
from efficient_lm.models import spec
from efficient_lm.techniques.quantization.bitnet import BitNet
from efficient_lm.techniques.quantization.convert import Convert
from efficient_lm.techniques.quantization.low_precision_training import LowPrecisionTraining
from efficient_lm.techniques.quantization.qat import QuantAware, StretchedLevels
from efficient_lm.training.learner import Learner
from efficient_lm.tree import num_bytes, select
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Dense, Weight

TOKENS = np.random.default_rng(1).integers(0, 24, (2, 6)).astype(np.int32)
INT4 = QuantAware(rules=(Rule(weights=Int(bits=4, scales=Group(size=8)), activations=Int()),))
STRETCHED = QuantAware(rules=(Rule(weights=MidRise(bits=2), activations=Int()),), method=StretchedLevels())


def trained(*techniques):
  stack = spec.Stack(num_layers=2, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8),
                     mlp=spec.MoE(num_experts=4, hidden=16))
  model = jax.jit(lambda: spec.Transformer(vocab_size=24, dim=16, stacks=(stack,)).build(rngs=nnx.Rngs(0)))()
  learner = Learner(model, None, None)
  for technique in techniques: learner = technique(learner, jax.random.key(0))
  return learner.model


@pytest.mark.thinned
@pytest.mark.parametrize('techniques', [
  (INT4,), (STRETCHED,), (INT4, LowPrecisionTraining()), (LowPrecisionTraining(), INT4),
], ids=['int4', 'stretched', 'int4, low precision', 'low precision, int4'])
def test_a_converted_model_holds_the_same_numbers_and_computes_the_same(techniques):
  model = trained(*techniques)
  stored, notes = Convert()(model, None)
  found = jax.jit(lambda model: {path: weight.materialize() for path, weight in select(model, Weight)})
  for path, numbers in found(model).items(): np.testing.assert_array_equal(found(stored)[path], numbers, err_msg=path)
  if len(techniques) == 1:   # products of low-precision training round once more, those of the stored model do not
    logits = jax.jit(lambda model: model(TOKENS).logits_BTV)
    # Sums of at most 24 products of order one, in another order, through two layers that round tokens: a number on the
    # border of two integers may fall to the other side, a step of 1/127.
    np.testing.assert_allclose(logits(stored), logits(model), atol=0.02)
  assert len(dict(select(stored, Quantized))) == 7 and not dict(select(stored, FakeQuantized))
  assert num_bytes(stored) < 0.5 * num_bytes(model) and len(notes) == 1


def test_three_levels_by_the_mean_are_the_same_up_to_the_order_of_its_sum():
  """A scale that is a mean of up to 256 magnitudes: their float32 sum in another order."""
  model = trained(BitNet())
  stored, _ = Convert()(model, None)
  numbers = jax.jit(lambda model: {path: weight.materialize() for path, weight in select(model, Weight)})
  for path, wanted in numbers(model).items():
    np.testing.assert_allclose(numbers(stored)[path], wanted, rtol=256 * 2 ** -24, err_msg=path)


def test_its_shapes_are_known_beforehand():
  model = trained(INT4)
  shapes = jax.eval_shape(Convert().abstract, model)
  wanted, _ = Convert()(model, None)
  assert jax.tree.structure(shapes) == jax.tree.structure(wanted)
  assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes)] == [
    (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(wanted)]


def test_a_model_without_fake_quantized_weights_is_an_error():
  with pytest.raises(ValueError, match='nothing to store'): Convert().abstract(trained())


@pytest.mark.parametrize('format', [Int(), Float8()], ids=['int8', 'float8'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_stored_product_is_within_the_stated_bound_of_the_trained_one(dtype, format):
  """Eight bits for weights and tokens. In float32 K sums of 2^-24; in bfloat16, whose unit is 2^-8, each of both operands is
  rounded by training, and the result by both."""
  rng, K = np.random.default_rng(0), 256
  weight = Dense(jnp.asarray(rng.normal(size=(K, 48)), jnp.float32), 'DF', 'D')
  trained = FakeQuantized(weight, Rounding(format), Rounding(format))
  x_BTD = jnp.asarray(rng.normal(size=(4, 8, K)), jnp.float32).astype(dtype)
  y, stored = (np.asarray(jax.jit(lambda one: one.contract('BTD,DF->BTF', x_BTD))(one), np.float32)
               for one in (trained, trained.converted()))
  tokens = np.asarray(trained.prepare_input(x_BTD, 'BTD'), np.float32)
  magnitudes = np.abs(tokens) @ np.abs(np.asarray(trained.materialize()))
  bound = K * 2. ** -24 * magnitudes if dtype == 'float32' else 2. ** -7 * (magnitudes + np.abs(y))
  assert np.all(np.abs(y - stored) <= bound)
  # Roundings have either sign, so that a result is off by less than its own unit in the mean.
  error = np.sqrt(np.mean((y - stored) ** 2) / np.mean(y ** 2))
  assert error <= (1e-6 if dtype == 'float32' else 2. ** -8) and (dtype == 'float32' or error > 2. ** -12)
