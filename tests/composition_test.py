"""Every ordered pair of techniques composes: it learns, and what each of the two promises holds afterwards."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm import learner, optim, train
from efficient_lm.models import spec
from efficient_lm.models.moe import MoE
from efficient_lm.techniques.distill import Distill
from efficient_lm.techniques.prune import Prune
from efficient_lm.techniques.quant_aware import QuantAware
from efficient_lm.techniques.upcycle import Upcycle
from efficient_lm.tree import select
from efficient_lm.weights import FakeQuantized

ATTENTION = spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=4)
MODEL = spec.Transformer(vocab_size=12, dim=8, stacks=(spec.Stack(num_layers=1, attention=ATTENTION,
                                                                  mlp=spec.SwiGLU(hidden=8)),))


class Teacher:
  """A freshly drawn model of the same shape."""

  def load(self): return learner.new_model(MODEL, jax.random.key(7))


TECHNIQUES = {'quant': QuantAware(bits=4, activation_bits=8), 'prune': Prune(sparsity=0.5, start=0, end=2, every=1),
              'distill': Distill(teacher=Teacher()), 'upcycle': Upcycle(num_experts=2)}


def batch():
  tokens = np.random.default_rng(0).integers(0, 12, (2, 9)).astype(np.int32)
  ones = np.ones((2, 8), np.int32)
  return {'inputs_BT': tokens[:, :-1], 'targets_BT': tokens[:, 1:], 'weights_BT': ones.astype(np.float32),
          'bytes_BT': ones, 'segments_BT': ones, 'positions_BT': np.tile(np.arange(8, dtype=np.int32), (2, 1))}


def after_steps(techniques, steps: int = 2):
  """The learner, its state after some steps and the metrics of each."""
  model = learner.new_model(MODEL, jax.random.key(0))
  made = learner.assemble(model, optim.AdamW(schedule=optim.WarmupCosine(warmup=1)).build(4), techniques, jax.random.key(1))
  state, step, all_metrics = learner.initial_state(made), train.compiled_step(made), []
  for _ in range(steps):
    state, metrics = step(state, made.loss, batch())
    all_metrics.append(train.scalars(metrics))
  return made, state, all_metrics


@pytest.fixture(scope='module')
def plain():
  return after_steps(())


def params(state):
  return jax.tree.leaves(nnx.state(state.model, nnx.Param))


@pytest.mark.parametrize('names', [*itertools.permutations(TECHNIQUES, 2), tuple(TECHNIQUES), tuple(reversed(TECHNIQUES))],
                         ids='-'.join)
def test_techniques_compose_in_every_order(names):
  _, state, metrics = after_steps([TECHNIQUES[name] for name in names])
  assert all(np.isfinite(row['loss']) for row in metrics)
  if 'quant' in names: assert dict(select(state.model, FakeQuantized))
  if 'upcycle' in names: assert dict(select(state.model, MoE))
  if 'distill' in names: assert metrics[0]['teacher_kl'] > 0
  if 'prune' in names: assert sum(bool(jnp.mean(leaf == 0) >= 0.5) for leaf in params(state)) == 7   # matrices of a layer


@pytest.mark.parametrize('neutral', [
  QuantAware(bits=16), Prune(sparsity=0.0, start=0, end=1), Distill(teacher=Teacher(), weight=0.0),
], ids=lambda technique: type(technique).__name__)
def test_a_neutral_setting_changes_nothing_bit_for_bit(plain, neutral):
  _, state, metrics = after_steps([neutral])
  for got, wanted in zip(params(state), params(plain[1]), strict=True): np.testing.assert_array_equal(got, wanted)
  assert [row['loss'] for row in metrics] == [row['loss'] for row in plain[2]]


def test_one_expert_computes_what_the_dense_model_did(plain):
  from efficient_lm.models.routing import SoftmaxTopK
  dense = learner.new_model(MODEL, jax.random.key(0))
  made = Upcycle(num_experts=1, router=SoftmaxTopK(top_k=1))(learner.Learner(dense, None, None), jax.random.key(2))
  tokens = batch()['inputs_BT']
  run = jax.jit(lambda model: model(tokens).logits_BTV)
  np.testing.assert_allclose(run(made.model), run(dense), rtol=0, atol=1e-5)   # the same sums through another kernel


def test_a_selector_that_matches_nothing_names_what_there_is():
  with pytest.raises(ValueError, match='stacks/0/blocks'):
    QuantAware(bits=4, where='blcoks')(learner.Learner(learner.new_model(MODEL, jax.random.key(0)), None, None), None)
