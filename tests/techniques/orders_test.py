"""Techniques and stages in every order: each pair composes, or is refused in one line; none drops what another has made."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Group, Int
from efficient_lm.models import spec
from efficient_lm.techniques import (
  Awq,
  BitNet,
  Convert,
  Gptq,
  LearnedSteps,
  LowPrecisionTraining,
  Prune,
  PruneOnce,
  QuantAware,
  Quantize,
  Rotate,
  RoundToNearest,
  Rule,
  SmoothQuant,
  SparseGpt,
  Unroll,
  Upcycle,
)
from efficient_lm.training import learner, losses
from efficient_lm.training.optimizers import AdamW
from efficient_lm.tree import rewrite, select
from efficient_lm.weights.fake_quantized import FakeQuantized, Normalized
from efficient_lm.weights.low_precision import LowPrecision
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.weight import Weight

pytestmark = pytest.mark.usefixtures('quick_compilation')

V, D, B, T = 12, 8, 2, 8
INT4 = (Rule(weights=Int(bits=4, scales=Group(size=4))),)
QAT = {'qat': QuantAware(rules=INT4), 'lsq': QuantAware(rules=INT4, method=LearnedSteps()), 'bitnet': BitNet()}
TRAINING = QAT | {'low precision': LowPrecisionTraining(), 'prune': Prune(sparsity=0.5), 'upcycle': Upcycle(num_experts=2)}
QUANTIZE = {name: Quantize(rules=INT4, method=method, sequences=2, least_tokens=1)
            for name, method in (('rtn', RoundToNearest()), ('gptq', Gptq(block=8)), ('awq', Awq(grid=2, clips=2)))}
SPARSE_GPT = PruneOnce(sparsity=0.5, score=SparseGpt(block=8), sequences=2, least_tokens=1)
STAGES = QUANTIZE | {'prune once': PruneOnce(sparsity=0.5), 'sparse gpt': SPARSE_GPT, 'rotate': Rotate(),
                     'smooth': SmoothQuant(sequences=2)}
# How training is composed before a stage: fake quantization by itself, and with low precision outside and inside of it.
QUANTIZED = [(name,) for name in QAT] + [pair for name in QAT for pair in ((name, 'low precision'), ('low precision', name))]


@functools.cache
def model():
  """Numbers drawn by numpy."""
  stack = spec.Stack(num_layers=2, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=4),
                     mlp=spec.SwiGLU(hidden=8))
  rng = np.random.default_rng(0)
  abstract = jax.eval_shape(lambda: spec.Transformer(vocab_size=V, dim=D, stacks=(stack,)).build(rngs=nnx.Rngs(0)))
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype), abstract)


def batch():
  tokens, ones = np.random.default_rng(0).integers(0, V, (B, T + 1)).astype(np.int32), np.ones((B, T), np.int32)
  return {'inputs_BT': tokens[:, :-1], 'targets_BT': tokens[:, 1:], 'segments_BT': ones,
          'positions_BT': np.tile(np.arange(T, dtype=np.int32), (B, 1))}


class Context:
  """What a stage is given."""
  key, mesh = jax.random.key(2), None

  def batches(self, count): return itertools.repeat(batch(), count)


def after(*names, start=None):
  """The model that a training with these techniques leaves, before its first step."""
  techniques = [TRAINING[name] for name in names]
  made = learner.assemble(start or model(), AdamW().build(10), techniques, jax.random.key(1), 10)
  return learner.finished(made.model, made.optimizer.init(nnx.state(made.model, nnx.Param)), techniques)


trained = functools.cache(after)


@functools.cache
def stored():
  return QUANTIZE['rtn'](model(), Context())[0]


@jax.jit
def logits_of(model):
  return losses.outputs_of(model, batch()).logits_BTV


def within(model, kind):
  """How many nodes of a kind there are, also inside of others of another kind."""
  return len([node for _, node in select(model, kind)])


def one_line(caught, *words):
  message = str(caught.value)
  assert '\n' not in message and all(word in message for word in words), message


@pytest.mark.thinned
@pytest.mark.parametrize('names', list(itertools.permutations(TRAINING, 2)), ids=' then '.join)
def test_two_techniques_of_training_compose_or_the_second_is_refused(names):
  """Two that quantize the same weights cannot both; all others are found in the model, however they are nested."""
  if set(names) <= set(QAT):
    with pytest.raises(ValueError) as caught: after(*names)
    one_line(caught, 'config.techniques[1]', 'stacks/0/blocks/attention/key is trained as float32, fake-quantized to')
    return
  made = trained(*names)
  assert within(made, FakeQuantized) == (7 if set(names) & set(QAT) else 0)
  assert within(made, Normalized) == (2 if 'bitnet' in names else 0)
  assert within(made, LowPrecision) == (7 if 'low precision' in names else 0)
  assert np.isfinite(logits_of(made)).all()


@pytest.mark.parametrize('name', QAT)
def test_the_same_quantization_twice_is_refused(name):
  with pytest.raises(ValueError) as caught: after(name, name)
  one_line(caught, 'config.techniques[1]', 'fake-quantized to', 'Convert()')


@pytest.mark.parametrize('name', TRAINING)
def test_no_training_technique_takes_a_stored_model(name):
  """Frozen codes cannot be trained: nothing is skipped without a word."""
  with pytest.raises(ValueError) as caught: after(name, start=stored())
  one_line(caught, 'config.techniques[0]', 'is stored as int4 per group of 4')


@pytest.mark.parametrize('name', STAGES)
def test_no_stage_that_changes_weights_takes_a_stored_model(name):
  with pytest.raises(IncompatibleError) as caught: STAGES[name](stored(), Context())
  one_line(caught, 'is stored as int4 per group of 4 already')


@pytest.mark.parametrize('names', QUANTIZED, ids=' then '.join)
@pytest.mark.parametrize('stage', STAGES)
def test_what_is_trained_fake_quantized_is_not_changed_by_a_stage_made_for_floats(names, stage):
  """Wherever low-precision training stands: rounding would be doubled, and BitNet's norm dropped."""
  for function in (lambda: STAGES[stage](trained(*names), Context()),
                   lambda: jax.eval_shape(STAGES[stage].abstract, trained(*names))):
    with pytest.raises(IncompatibleError) as caught: function()
    one_line(caught, 'is trained as float32, fake-quantized to', 'Convert()')


@pytest.mark.parametrize('names', QUANTIZED, ids=' then '.join)
def test_what_is_trained_fake_quantized_is_stored_with_its_norms(names):
  """The same numbers, and products that differ by the order of sums where training multiplied floats."""
  made = trained(*names)
  converted, _ = Convert()(made, Context())
  assert within(converted, Quantized) == 7 and not within(converted, (FakeQuantized, LowPrecision))
  assert within(converted, Normalized) == within(made, Normalized) == (2 if 'bitnet' in names else 0)
  # Products of eight bits are for training; what has been trained is the model without them.
  wanted = logits_of(rewrite(made, LowPrecision, lambda _, weight: weight.inner) if 'low precision' in names else made)
  # Eight products of order one a sum, two layers; a token's number on the border of two integers may fall to the other.
  np.testing.assert_allclose(logits_of(converted), wanted, atol=1e-3 if 'bitnet' in names else 1e-5)


@pytest.mark.parametrize('stage', STAGES)
def test_a_converted_model_keeps_its_norms_because_it_is_refused(stage):
  converted, _ = Convert()(trained('bitnet'), Context())
  with pytest.raises(IncompatibleError) as caught: STAGES[stage](converted, Context())
  one_line(caught, 'is stored as')


@pytest.mark.thinned
@pytest.mark.parametrize('stage', [*STAGES, 'unroll'])
@pytest.mark.parametrize('name', ['low precision', 'prune', 'upcycle'])
def test_a_float_model_is_taken_by_every_stage(name, stage):
  """How gradients were computed is of no use after training: what is stored are the floats."""
  made = trained(name)
  changed, notes = (STAGES | {'unroll': Unroll()})[stage](made, Context())
  assert notes and np.isfinite(logits_of(changed)).all()
  if stage in QUANTIZE:
    assert within(changed, Quantized) == 7 and not within(changed, LowPrecision)
    # Low precision is one of training: calibrated and stored as if it had not been there.
    plain = QUANTIZE[stage](model(), Context())[0] if name == 'low precision' else changed
    np.testing.assert_array_equal(logits_of(changed), logits_of(plain))
  if stage in ('rotate', 'smooth'):
    plain = rewrite(made, LowPrecision, lambda _, weight: weight.inner) if name == 'low precision' else made
    found = rewrite(changed, LowPrecision, lambda _, weight: weight.inner) if within(changed, LowPrecision) else changed
    # Float32 sums in another order.
    np.testing.assert_allclose(logits_of(found), logits_of(plain), atol=1e-4)


def test_weights_outside_the_rules_are_stored_after_conversion():
  converted, _ = Convert()(trained('bitnet'), Context())
  whole, _ = Quantize(rules=(Rule(where='embed|own_head', weights=Int()),))(converted, Context())
  assert len(dict(select(whole, Weight))) == 9 == within(whole, Quantized)
  assert within(whole, Normalized) == 2
