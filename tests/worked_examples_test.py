"""Small inputs whose right answer can be said, where several rooms meet."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.compression import masks
from efficient_lm.compression.solver import gptq
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Group, Int
from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.techniques import BitNet, LowPrecisionTraining, Prune, QuantAware, Quantize, Rotate, Rule, Upcycle
from efficient_lm.training import losses
from efficient_lm.training.learner import Learner
from efficient_lm.training.optimizers import AdamW
from efficient_lm.weights.masked import Masked
from tests.compressing import Context

CONTEXT = Context()
EVERYTHING = (Rule(weights=Int()),)


def built(mlp):
  attention = spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8)
  stack = spec.Stack(num_layers=1, attention=attention, mlp=mlp)
  return spec.Transformer(vocab_size=16, dim=16, stacks=(stack,)).build(rngs=nnx.Rngs(0))


@pytest.fixture
def dense(): return built(spec.SwiGLU(hidden=32))


@pytest.fixture
def batch():
  tokens, ones = jnp.arange(32).reshape(2, 16) % 16, jnp.ones((2, 16))
  return {'inputs_BT': tokens, 'targets_BT': tokens, 'weights_BT': ones, 'bytes_BT': ones,
          'segments_BT': ones.astype(int), 'positions_BT': jnp.tile(jnp.arange(16), (2, 1))}


def learner_of(model, *techniques):
  learner = Learner(model, losses.NextToken(), AdamW().build(9), steps=9)
  for technique in techniques: learner = technique(learner, jax.random.key(0))
  return learner


def masked_paths(learner) -> set[str]:
  """Of the weights that the learner's pruning leaves masked."""
  finished = masks.masked(learner.model, learner.optimizer.init(nnx.state(learner.model, nnx.Param)))
  found = jax.tree_util.tree_leaves_with_path(finished, is_leaf=lambda node: isinstance(node, Masked))
  return {jax.tree_util.keystr(path, simple=True, separator='/') for path, node in found if isinstance(node, Masked)}


def test_a_teacher_at_weight_1_leaves_the_balancing_terms_whole(dense, batch):
  """loss = (1 - w) CE + w T^2 KL + balance."""
  balance = (routing.LoadBalance(weight=1.),)
  mixture = built(spec.MoE(num_experts=4, hidden=16, router=routing.SoftmaxTopK(top_k=2), balance=balance))
  taught = losses.Distilled(losses.NextToken(), dense, temperature=1., weight=1.)
  loss, metrics = taught(losses.outputs_of(mixture, batch), batch)
  # One float32 sum of numbers below 10.
  np.testing.assert_allclose(loss - metrics['teacher_kl'], metrics['load_balance'], atol=1e-5)
  assert metrics['load_balance'] >= 1


def test_half_of_a_matrix_is_zero_after_gptq_as_before():
  random = np.random.default_rng(0)
  w_OI = random.normal(size=(32, 64)).astype('f')
  w_OI[np.abs(w_OI) < np.median(np.abs(w_OI))] = 0
  x_MI = (random.normal(size=(256, 64)) @ random.normal(size=(64, 64))).astype('f')
  format = Int(bits=4, scales=Group(size=32))
  made_OI = np.asarray(format.decode(gptq(w_OI, x_MI.T @ x_MI, format, keep_OI=w_OI != 0)))
  assert np.mean(w_OI == 0) == 0.5 and np.all(made_OI[w_OI == 0] == 0) and np.any(made_OI)


@pytest.mark.parametrize('technique', [
  Prune(sparsity=0.5, start=0, end=1), QuantAware(rules=EVERYTHING), BitNet(), LowPrecisionTraining()],
  ids=lambda technique: type(technique).__name__)
def test_what_is_stored_in_few_bits_is_not_trained(dense, technique):
  stored, _ = Quantize(rules=EVERYTHING)(dense, CONTEXT)
  with pytest.raises(IncompatibleError) as refused: learner_of(stored, technique)
  assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize('where, named', [
  (r'mlp/(gate|up|down)$', {'mlp/gate', 'mlp/up', 'mlp/down'}),
  (r'attention$|/up$', {'mlp/up'}),
])
def test_masks_are_on_what_the_pattern_names(dense, where, named):
  """A prefix of a path, `attention`, is no weight."""
  learner = learner_of(dense, Prune(sparsity=0.5, start=0, end=1, where=where))
  assert masked_paths(learner) == {f'stacks/0/blocks/{name}' for name in named}


def test_a_mask_follows_its_weight_into_the_experts(dense):
  pruned = Prune(sparsity=0.5, start=0, end=1, where=r'mlp/(gate|up|down)$')
  learner = learner_of(dense, pruned, Upcycle(num_experts=2))
  held = masked_paths(learner)
  assert {path.rpartition('/')[2] for path in held} == {'gate', 'up', 'down'} and len(held) == 3


def test_what_normalizes_its_input_is_not_quantized_twice(dense):
  """BitNet's weights, inside those of low-precision training, own a norm that a second format would drop."""
  wrapped = learner_of(dense, BitNet(), LowPrecisionTraining()).model
  with pytest.raises(IncompatibleError): Quantize(rules=EVERYTHING)(wrapped, CONTEXT)


def test_an_embedding_in_four_bits_stays_so_or_is_not_rotated(dense):
  stored, _ = Quantize(rules=(Rule(where='embed$', weights=Int(bits=4)),))(dense, CONTEXT)
  with pytest.raises(IncompatibleError): Rotate()(stored, CONTEXT)


@pytest.mark.parametrize('logit', [0., -45., -90., -1e4])
def test_equal_logits_share_equally_however_low(logit):
  gates = lambda logits_BTE: routing.SigmoidTopK(top_k=2)(logits_BTE).gate_BTA
  equal_BTE = jnp.full((1, 1, 4), logit)
  np.testing.assert_array_equal(gates(equal_BTE), jnp.full((1, 1, 2), 0.5))
  slope_E = jax.grad(lambda logits_BTE: gates(logits_BTE)[..., 0].sum())(equal_BTE)[0, 0]
  # The sigmoid's own factor 1 - p: one half at logit 0, one where p is nothing.
  expected = 0.25 * (1 - jax.nn.sigmoid(logit))
  np.testing.assert_allclose(slope_E, [expected, -expected, 0, 0], rtol=1e-6)
