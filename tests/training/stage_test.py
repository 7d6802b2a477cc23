"""Training as a stage: resumed, damaged, done, or given another stage's model, it leaves the same."""
import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.parallel.sharding import single_device_mesh
from efficient_lm.training import trainer as train
from efficient_lm.training.optimizers import AdamW, WarmupCosine
from efficient_lm.training.train import Train, Training
from tests.training.parameters import assert_same_bits
from tests.training.tiny import B, Memory, T, batch_of, model_of


class Context:
  """What a run gives to a stage. Text of which batch 1 is damaged where that is asked for."""

  def __init__(self, checkpoints=None, tokens_seen=0, damaged=False, field='config'):
    self.key, self.mesh, self.field, self.tokens_seen = jax.random.key(0), single_device_mesh(), field, tokens_seen
    self.checkpoints, self.damaged = checkpoints or Memory(), damaged
    self.corpus, self.logged, self.taken, self.reported, self.evaluated = self, {}, [], None, []
    self.measured_before = True

  def batches(self, batch_size, sequence_length):
    assert (batch_size, sequence_length) == (B, T)
    return self

  def iterate(self, first):
    for i in range(first, 99):
      self.taken.append(i)
      yield batch_of(i) | ({'weights_BT': np.full((B, T), np.nan, np.float32)} if self.damaged and i == 1 else {})

  def log(self, step, numbers): self.logged[step] = numbers

  def evaluate(self, step, model): self.evaluated.append(step)

  def has_evaluated(self, step): return self.measured_before

  def report(self, training, notes, state): self.reported = notes, int(state.step)

  def progress(self, first, last): return contextlib.nullcontext(lambda step, numbers: None)


SCHEDULE = WarmupCosine(peak=1e-2, warmup=3)
TRAINING = Training(steps=6, batch_size=B, sequence_length=T, log_every=1, eval_every=4, checkpoint_every=1,
                    optimizer=AdamW(schedule=SCHEDULE))


@dataclasses.dataclass
class Halved:
  """A technique that halves what training leaves, by what it reads in the optimizer's state."""
  touches = 'optimizer'

  def __call__(self, learner, key): return learner.replace(notes=('halved',))

  def finish(self, model, opt_state):
    return jax.tree.map(lambda leaf: leaf / (2 + 0 * opt_state.skipped.astype(leaf.dtype)), model)


def trained(context, model=None, techniques=(), training=TRAINING):
  copy = jax.tree.map(jnp.copy, model_of('dense')) if model is None else model
  return train.train(Train(training=training, techniques=techniques), copy, context)[0]


def shapes():
  return jax.eval_shape(lambda: model_of('dense'))


@functools.cache
def straight():
  """A stage in one go, its second batch damaged; what it was given."""
  context = Context(damaged=True, tokens_seen=0)
  return trained(context), context


def test_the_stage_fits_and_says_what_it_does():
  model, context = straight()
  assert context.reported == ((), 0) and sorted(context.logged) == [1, 2, 3, 4, 5, 6] and context.evaluated == [4]
  assert context.taken == list(range(6)) and context.checkpoints.steps() == [1, 2, 3, 4, 5, 6]
  assert context.logged[6]['cross_entropy'] < context.logged[1]['cross_entropy']
  assert_same_bits(model, context.checkpoints.kept[6].model)


def test_the_logged_rate_is_the_one_that_the_step_has_taken_also_after_refused_steps():
  _, context = straight()
  schedule = SCHEDULE.build(TRAINING.steps)
  counts = lambda state: {int(node.count) for node in jax.tree.leaves(
    state.opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
    if isinstance(node, optax.ScaleByScheduleState)}
  taken = {step: counts(state) for step, state in context.checkpoints.kept.items()}
  assert taken == {1: {1}, 2: {1}, 3: {2}, 4: {3}, 5: {4}, 6: {5}}, 'the second step was refused'
  for step in (1, 3, 4, 5, 6):
    assert context.logged[step]['learning_rate'] == float(schedule(taken[step].pop() - 1)), step
  assert context.logged[2]['learning_rate'] == context.logged[3]['learning_rate'], 'it is what the next one takes'


def test_a_stage_that_is_resumed_goes_on_bit_for_bit():
  """From shapes: the arrays are those that it has saved."""
  model, first = straight()
  context = Context(Memory({3: first.checkpoints.kept[3]}), damaged=True)
  assert_same_bits(trained(context, shapes()), model)
  assert context.reported == ((), 3) and context.taken == [3, 4, 5] and sorted(context.logged) == [4, 5, 6]
  for step in (4, 5, 6): assert context.logged[step]['loss'] == first.logged[step]['loss']


def test_an_evaluation_that_was_cut_off_is_made_good_when_the_run_is_taken_up():
  _, first = straight()
  for before in (True, False):
    context = Context(Memory({4: first.checkpoints.kept[4]}))
    context.measured_before = before
    trained(context, shapes())
    assert context.evaluated == ([] if before else [4]), 'and no other is due'


def test_text_goes_on_where_the_stages_before_have_stopped():
  """In whole steps, rounded up."""
  _, first = straight()
  context = Context(Memory({6: first.checkpoints.kept[6]}), tokens_seen=5 * B * T + 1)
  trained(context, shapes(), training=dataclasses.replace(TRAINING, steps=7))
  assert context.taken == [12]


def test_of_a_stage_that_is_done_only_the_model_is_read():
  """So it can be read when the state of its optimizer is one of another version."""
  model, first = straight()
  last = first.checkpoints.kept[6]
  context = Context(Memory({5: first.checkpoints.kept[5], 6: dataclasses.replace(last, opt_state=('of another version',))}))
  assert_same_bits(trained(context, shapes()), model)
  assert context.reported == ((), 6) and context.taken == []


def test_a_technique_that_reads_the_state_at_the_end_has_all_of_it_read():
  model, first = straight()
  last = first.checkpoints.kept[6]
  halves = trained(Context(Memory({6: last})), shapes(), (Halved(),))
  assert_same_bits(halves, jax.tree.map(lambda leaf: leaf / 2, model))
  with pytest.raises(CheckpointError, match='another state'):
    trained(Context(Memory({6: dataclasses.replace(last, opt_state=())})), shapes(), (Halved(),))


def test_a_last_step_that_is_damaged_is_taken_again_from_the_one_before():
  class Damaged(Memory):
    def restore_model(self, abstract, step): raise CheckpointError(f'{step} is corrupt')
    def restore(self, abstract): return self._as(abstract, self.kept[5])
  model, first = straight()
  context = Context(Damaged(first.checkpoints.kept))
  assert_same_bits(trained(context, shapes()), model)
  assert context.reported == ((), 5) and context.taken == [5]


def test_the_model_that_a_stage_is_given_is_taken_over():
  given = jax.tree.map(jnp.copy, model_of('dense'))
  trained(Context(), given, training=dataclasses.replace(TRAINING, steps=0))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))


@pytest.mark.parametrize('field, name', [
  ('config', 'config.train.batch_size'), ('config.stages[1]', 'config.stages[1].training.batch_size')])
def test_a_batch_that_does_not_divide_over_the_mesh_is_refused_by_its_field(field, name):
  context = Context(field=field)
  context.mesh = types.SimpleNamespace(shape=dict(data=2, fsdp=1, expert=3, tensor=1))
  with pytest.raises(ConfigError) as refusal: trained(context)
  assert str(refusal.value) == f"{name} = 8: must be a multiple of 6: the mesh's data * fsdp * expert, times accumulate"
