"""LoRA changes nothing at first, trains adapters alone, keeps zeros and bits, and is merged exactly."""
import jax
import numpy as np
import pytest

from efficient_lm.errors import ConfigError, IncompatibleError
from efficient_lm.formats import Group, Int
from efficient_lm.techniques import (
  BitNet,
  Convert,
  Distill,
  Lora,
  LowPrecisionTraining,
  Merge,
  Prune,
  PruneOnce,
  QuantAware,
  Quantize,
  Rule,
  SkipSpikes,
)
from efficient_lm.training import learner
from efficient_lm.training import trainer as train
from efficient_lm.training.optimizers import AdamW, WarmupCosine
from efficient_lm.tree import num_bytes, select
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.invariants import Zeros
from efficient_lm.weights.low_rank import Held, LowRank
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.weight import Weight
from tests.composition_test import Teacher
from tests.training.tiny import batch_of, model_of

LORA = Lora(rank=2)
OPTIMIZER = AdamW(schedule=WarmupCosine(peak=0.05, warmup=1), weight_decay=0.1)
INT4 = (Rule(weights=Int(bits=4, scales=Group(size=8))),)


def logits(model):
  return np.asarray(jax.jit(lambda model, ids: model(ids).logits_BTV)(model, batch_of()['inputs_BT']))


def trained(model, *techniques, steps=4):
  """What some steps leave of a model, and the cross-entropy of each."""
  made = learner.assemble(model, OPTIMIZER.build(steps), techniques, jax.random.key(0))
  state, step, losses = learner.initial_state(made), train.compiled_step(made), []
  for _ in range(steps):
    state, metrics = step(state, made.loss, batch_of())
    losses.append(train.scalars(metrics)['cross_entropy'])
  return learner.finished(state.model, state.opt_state, techniques), losses, state


def stored(model):
  """Every array but those of adapters, by path."""
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(model)
          if not any(name in jax.tree_util.keystr(path) for name in ('.down', '.up'))}


@pytest.mark.thinned
@pytest.mark.parametrize('kind', ['dense', 'experts'])
def test_only_adapters_are_trained_and_the_first_step_computes_what_the_model_did(kind):
  model = model_of(kind, num_layers=2)
  left, losses, state = trained(model, LORA)
  _, plain, _ = trained(model)
  assert losses[0] == pytest.approx(plain[0], rel=1e-6) and losses[-1] < losses[0]   # sums of two products
  before, after = stored(model), stored(left)
  for path, array in before.items():
    if 'load_bias' in path: continue   # which balances experts by its own rule
    np.testing.assert_array_equal(after[path.replace('.array', '.inner.array') if path not in after else path], array, path)
  assert not dict(select(left, Held)) and len(dict(select(left, LowRank))) == 7
  assert num_bytes(state.opt_state) < num_bytes(model) / 2


def test_merged_it_computes_the_same_with_the_structure_that_it_had():
  model = model_of('dense')
  left, _, _ = trained(model, LORA)
  merged, _ = Merge()(left, None)
  assert jax.tree.structure(merged) == jax.tree.structure(model)
  np.testing.assert_allclose(logits(merged), logits(left), rtol=0, atol=2e-5 * np.abs(logits(left)).max())
  with pytest.raises(IncompatibleError, match='nothing to add'): Merge()(merged, None)


@pytest.mark.parametrize('then', [(), (Merge(),)], ids=['kept', 'merged'])
def test_zeros_of_a_mask_stay_exact(then):
  model, _ = PruneOnce(sparsity=0.5)(model_of('dense'), None)
  keep = {path: weight.keep.get_value() for path, weight in select(model, Masked)}
  left, losses, _ = trained(model, LORA)
  for stage in then: left, _ = stage(left, None)
  assert losses[-1] < losses[0]
  for path, weight in select(left, Masked):
    assert all(one.held_by(weight) for one in weight.invariants() if isinstance(one, Zeros))
    assert not np.any(np.asarray(weight.materialize())[~np.asarray(keep[path])])
  assert len(dict(select(left, Masked))) == len(keep) == 7


def test_beside_four_bits_it_trains_and_the_bits_stay():
  model = Quantize(rules=INT4).to_nearest(model_of('dense'))
  before = {path: np.asarray(weight.encoded.values) for path, weight in select(model, Quantized)}
  left, losses, _ = trained(model, LORA)
  after = {path.removesuffix('/inner'): np.asarray(weight.encoded.values) for path, weight in select(left, Quantized)}
  assert losses[-1] < losses[0] and before.keys() == after.keys()
  for path, codes in before.items(): np.testing.assert_array_equal(after[path], codes)
  merged, _ = Merge()(left, None)
  assert not dict(select(merged, Quantized)), 'floats: the run asks for GivingUp'


OTHERS = {'quant': QuantAware(rules=INT4), 'bitnet': BitNet(), 'lowprec': LowPrecisionTraining(), 'distill': Distill(
  teacher=Teacher()), 'spikes': SkipSpikes()}


@pytest.mark.thinned
@pytest.mark.parametrize('first', [True, False], ids=['lora first', 'lora last'])
@pytest.mark.parametrize('other', [name for name in OTHERS if name != 'distill'])
def test_it_composes_in_both_orders(other, first):
  techniques = (LORA, OTHERS[other]) if first else (OTHERS[other], LORA)
  left, losses, _ = trained(model_of('dense'), *techniques)
  assert np.isfinite(losses).all() and losses[-1] < losses[0] and len(dict(select(left, LowRank))) == 7
  if other == 'quant':
    assert len(dict(select(left, FakeQuantized))) == 7
    converted, _ = Convert()(left, None)
    np.testing.assert_allclose(logits(converted), logits(left), rtol=0, atol=1e-4 * np.abs(logits(left)).max())


@pytest.mark.parametrize('techniques, said', [
  ((LORA, Prune(sparsity=0.5, start=0, end=2)), 'frozen'), ((Prune(sparsity=0.5, start=0, end=2), LORA), 'same training'),
  ((LORA, LORA), 'has an adapter'), ((Lora(rank=16),), 'must be below both'), ((Lora(where='nothing'),), 'nothing'),
  ((Lora(rank=2, where='embed'),), 'is looked up')])
def test_what_it_cannot_do_is_one_line(techniques, said):
  with pytest.raises(ConfigError, match=said) as error: trained(model_of('dense'), *techniques)
  assert '\n' not in str(error.value)


def test_beside_an_adapter_that_was_kept_no_weight_is_pruned_while_training():
  left, _, _ = trained(model_of('dense'), LORA, steps=1)
  with pytest.raises(ConfigError, match='Merge'): trained(left, Prune(sparsity=0.5, start=0, end=2))


@pytest.mark.parametrize('settings', [{'rank': 0}, {'alpha': 0.0}, {'where': '('}])
def test_settings_that_make_no_sense_are_refused(settings):
  assert [field for field, _, _ in Lora(**settings).check()] == list(settings)


def test_an_adapted_model_decodes_as_it_computes():
  from efficient_lm.models import decode
  left, _, _ = trained(model_of('dense', num_layers=2), LORA)
  ids = batch_of()['inputs_BT'][:2]
  ready = decode.ready(left)
  assert not [weight for _, weight in select(ready, Weight) if isinstance(weight, LowRank)], 'one matrix each'
  np.testing.assert_allclose(logits(ready)[:2], np.asarray(left(ids).logits_BTV), rtol=0, atol=1e-4)
