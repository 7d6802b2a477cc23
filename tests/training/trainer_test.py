"""The one trainer: the same on every mesh, the same every time, and stopping without losing a step."""
import contextlib
import dataclasses
import functools
import os
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_lm import interruption
from efficient_lm.config.mesh import Mesh
from efficient_lm.errors import CheckpointError, ConfigError, NonFinite, Preempted, WriteError
from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.models.moe.layer import MoE
from efficient_lm.models.transformer import unrolled
from efficient_lm.parallel.sharding import mesh_in_force, shardings, single_device_mesh
from efficient_lm.techniques.distillation.distill import Distill
from efficient_lm.training import trainer as train
from efficient_lm.training.health import Health, advised
from efficient_lm.training.learner import assemble, initial_state
from efficient_lm.training.losses import Distilled, NextToken, outputs_of
from efficient_lm.training.optimizers import AdamW, WarmupCosine, WarmupStableDecay
from efficient_lm.training.train import Train, Training
from efficient_lm.tree import path_name, select

B, T, V, D, E = 8, 8, 32, 16, 4
STEPS = 20
BALANCE = (routing.LoadBalance(), routing.LossFreeBias(), routing.RouterZ())
MLPS = {
  'dense': spec.SwiGLU(hidden=16), 'experts': spec.MoE(num_experts=E, hidden=16, balance=BALANCE),
  # Terms that weigh as much as the task.
  'balanced': spec.MoE(num_experts=E, hidden=16, capacity=0.75, balance=(
    routing.LoadBalance(weight=1.0), routing.LossFreeBias(), routing.RouterZ(weight=0.3))),
  'without load': spec.MoE(num_experts=E, hidden=16, balance=BALANCE[1:]),
}
MESHES = {'data 8': (8, 1, 1, 1), 'fsdp 8': (1, 8, 1, 1), 'fsdp 4, tensor 2': (1, 4, 1, 2),
          'fsdp 2, expert 2, tensor 2': (1, 2, 2, 2)}


def batch_of(seed=0):
  """Random rows, each beginning with a token of its own, so that every target can be known."""
  tokens = np.random.default_rng(seed).integers(0, V, (B, T + 1)).astype(np.int32)
  tokens[:, 0] = np.arange(B)
  ones = np.ones((B, T), np.int32)
  return {'inputs_BT': tokens[:, :-1], 'targets_BT': tokens[:, 1:], 'weights_BT': ones.astype(np.float32),
          'bytes_BT': 2 * ones, 'segments_BT': ones, 'positions_BT': np.tile(np.arange(T, dtype=np.int32), (B, 1))}


@functools.cache
def model_of(kind, seed=0, num_layers=1):
  """A model with numbers drawn by numpy; norm scales one, biases zero, as they start."""
  stack = spec.Stack(num_layers=num_layers, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=2, head_dim=8),
                     mlp=MLPS[kind])
  described = spec.Transformer(vocab_size=V, dim=D, stacks=(stack,))
  rng = np.random.default_rng(seed)
  def number(path, leaf):
    if 'scale' in path_name(path): return jnp.ones(leaf.shape)
    return jnp.asarray(rng.normal(size=leaf.shape) * (0 if 'load_bias' in path_name(path) else 0.25), leaf.dtype)
  return jax.tree_util.tree_map_with_path(number, jax.eval_shape(lambda: described.build(rngs=nnx.Rngs(0))))


class OnTheMesh:
  """A teacher that is loaded onto the mesh of the run, as an earlier run is."""

  def load(self, mesh=None):
    made = model_of('dense', 7)
    return made if mesh is None else jax.device_put(made, shardings(made, mesh))


def assembled(kind):
  """A learner, made under the mesh of its run. Kinds are those of MLPS, perhaps taught by a dense model."""
  optimizer = AdamW(schedule=WarmupStableDecay(peak=1e-2, warmup=2, decay=0)).build(1000)
  return assemble(model_of(kind.removeprefix('taught ')), optimizer, lessons(kind), jax.random.key(0))


def lessons(kind):
  return (Distill(teacher=OnTheMesh(), weight=0.5, temperature=2.0),) if kind.startswith('taught ') else ()


@functools.cache
def learner_of(kind):
  return assembled(kind)


@functools.cache
def step_of(kind):
  return train.compiled_step(learner_of(kind))


def steps(kind, state, count, place=lambda batch: batch, batches=3):
  """The state after `count` steps over a few batches in turn, and the loss of each."""
  losses = []
  for i in range(count):
    state, metrics = step_of(kind)(state, learner_of(kind).loss, place(batch_of(i % batches)))
    # Waited for: with several steps in flight eight virtual devices can starve one another of their few threads.
    losses.append(float(metrics['loss']))
  return state, np.array(losses)


@functools.cache
def alone(kind):
  """A run on one device."""
  return steps(kind, initial_state(learner_of(kind)), STEPS)


def mesh_of(sizes):
  return Mesh(**dict(zip(('data', 'fsdp', 'expert', 'tensor'), sizes, strict=True))).build()


@functools.cache
def spread(kind, sizes):
  """The same run over eight devices."""
  learner = learner_of(kind)   # made outside the mesh: it serves the runs on one device too
  mesh = mesh_of(sizes)
  with jax.set_mesh(mesh):
    return steps(kind, initial_state(learner, mesh), STEPS, lambda batch: train.place(batch, mesh))


eight_devices = pytest.mark.skipif('jax.device_count() != 8', reason='needs eight devices: run the tests on CPU')
each_mesh = pytest.mark.parametrize('sizes', MESHES.values(), ids=MESHES)
each_kind = pytest.mark.parametrize('kind', ['dense', 'experts'])
TAUGHT = {}   # what the run on one device gave


@eight_devices
@each_mesh
@each_kind
def test_every_mesh_trains_as_one_device_does(kind, sizes):
  """Float32 sums in another order, 2**-24 apiece, grow over twenty steps; a promise of the project is 1e-4."""
  np.testing.assert_allclose(spread(kind, sizes)[1], alone(kind)[1], rtol=1e-4)
  assert alone(kind)[1][-1] < alone(kind)[1][0] - 0.1, 'and it does train'


@eight_devices
@each_mesh
@each_kind
def test_a_student_is_taught_on_every_mesh_as_on_one_device(kind, sizes):
  """By a teacher on the mesh of the run. Three steps, which are compared closer than twenty."""
  kind = f'taught {kind}'
  def losses(learner, place=lambda batch: batch):
    state, step, rows = initial_state(learner, mesh_in_force()), train.compiled_step(learner), []
    for i in range(3):
      state, metrics = step(state, learner.loss, place(batch_of(i)))
      rows.append({name: float(metrics[name]) for name in ('loss', 'cross_entropy', 'teacher_kl')})
    return rows
  if kind not in TAUGHT: TAUGHT[kind] = losses(learner_of(kind))
  mesh = mesh_of(sizes)
  with jax.set_mesh(mesh):
    learner = assembled(kind)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(learner.loss.teacher))
    together = losses(learner, lambda batch: train.place(batch, mesh))
  for row, wanted in zip(together, TAUGHT[kind], strict=True):
    assert wanted['teacher_kl'] > 0.01
    for name in row: assert row[name] == pytest.approx(wanted[name], rel=2e-5), name


@eight_devices
@each_mesh
def test_balancing_biases_move_alike_on_every_mesh(sizes):
  """By exactly the same steps: loads are whole numbers, and a step is the sign of one."""
  bias = lambda state: np.concatenate([moe.load_bias.get_value() for _, moe in select(state.model, MoE)])
  np.testing.assert_array_equal(bias(spread('experts', sizes)[0]), bias(alone('experts')[0]))
  assert np.any(bias(alone('experts')[0]))


@eight_devices
@pytest.mark.parametrize('sizes', list(MESHES.values())[1:], ids=list(MESHES)[1:])
@each_kind
def test_no_large_array_of_the_state_is_on_every_device(kind, sizes):
  leaves = jax.tree_util.tree_leaves_with_path(spread(kind, sizes)[0])
  largest = max(leaf.size for _, leaf in leaves)
  whole = [path_name(path) for path, leaf in leaves if leaf.sharding.is_fully_replicated and leaf.size >= largest / 8]
  assert whole == []
  assert sum('/mu/' in path_name(path) for path, _ in leaves) > 5, 'moments are among what was looked at'


def test_the_same_start_gives_the_same_losses_bit_for_bit():
  again, losses = steps('experts', initial_state(learner_of('experts')), STEPS)
  np.testing.assert_array_equal(losses, alone('experts')[1])
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(alone('experts')[0]), strict=True):
    np.testing.assert_array_equal(a, b)


def test_one_batch_can_be_learnt_by_heart():
  _, losses = steps('dense', initial_state(learner_of('dense')), 300, batches=1)
  assert losses[0] > 3 and losses[-1] < 0.05


def test_a_batch_with_nothing_finite_to_learn_is_refused_and_counted():
  state, _ = steps('dense', initial_state(learner_of('dense')), 2)
  before = jax.device_get((state.model, state.opt_state.inner))
  bad = batch_of() | {'weights_BT': np.full((B, T), np.nan, np.float32)}
  state, metrics = step_of('dense')(state, learner_of('dense').loss, bad)
  for a, b in zip(jax.tree.leaves((state.model, state.opt_state.inner)), jax.tree.leaves(before), strict=True):
    np.testing.assert_array_equal(a, b)
  assert int(metrics['skipped']) == int(metrics['skipped_in_a_row']) == 1 and int(state.step) == 3
  assert np.isnan(metrics['grad_norm']) and np.isfinite(state.opt_state.grad_norm)
  _, metrics = step_of('dense')(state, learner_of('dense').loss, batch_of())
  assert int(metrics['skipped']) == 1 and int(metrics['skipped_in_a_row']) == 0 and np.isfinite(metrics['grad_norm'])


def uneven_batch():
  """Rows of unlike lengths, of one or two documents, in which an unlike share of the targets counts; one is all padding."""
  batch, lengths_B = batch_of(5), np.array([8, 3, 8, 1, 5, 8, 0, 2])
  real_BT = np.arange(T) < lengths_B[:, None]
  batch['segments_BT'] = np.where(real_BT, 1 + (np.arange(T) >= 5), 0).astype(np.int32)
  counts_BT = np.random.default_rng(5).random((B, T)) < np.linspace(0.1, 1, B)[:, None]
  batch['weights_BT'] = (real_BT & counts_BT).astype(np.float32)
  batch['bytes_BT'] = np.random.default_rng(6).integers(0, 5, (B, T)).astype(np.int32) * real_BT
  return batch


def one_step(learner, accumulate=1, mesh=None):
  """The metrics of a step on the uneven batch, and by how much it moved the parameters."""
  with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
    batch = uneven_batch() if mesh is None else train.place(uneven_batch(), mesh)
    state, metrics = train.compiled_step(learner, accumulate)(initial_state(learner, mesh), learner.loss, batch)
    jax.block_until_ready(state)
  moved = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), state.model, learner.model)
  return train.scalars(metrics), moved


def descending(model, *techniques):
  """A learner whose updates are its gradients."""
  return assemble(model, optax.sgd(1.0), techniques, jax.random.key(0))


@functools.cache
def plain_learner(kind):
  return descending(model_of(kind.removeprefix('taught ')), *lessons(kind))


@functools.cache
def undivided(kind):
  return one_step(plain_learner(kind))


def assert_same_step(found, wanted):
  """Sums of float32 in another order: at most 64 terms of a gradient, a few times 2**-24 of the largest of them, and what
  a parameter of order one loses of its update."""
  (metrics, moved), (wanted_metrics, wanted_moved) = found, wanted
  assert metrics.keys() == wanted_metrics.keys()
  for name in metrics: np.testing.assert_allclose(metrics[name], wanted_metrics[name], rtol=2e-5, atol=1e-6, err_msg=name)
  leaves = jax.tree_util.tree_leaves_with_path(moved)
  for (path, a), b in zip(leaves, jax.tree.leaves(wanted_moved), strict=True):
    if 'load_bias' in path_name(path): np.testing.assert_array_equal(a, b, err_msg=path_name(path))
    else: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max() + 1e-7, err_msg=path_name(path))


@pytest.mark.parametrize('kind, accumulate', [
  ('dense', 2), ('dense', 4), ('balanced', 4), ('without load', 4), ('taught balanced', 2)])
def test_a_step_is_the_same_in_however_many_parts_it_is_taken(kind, accumulate):
  """Loss, gradients, metrics, moves of load biases: also where parts hold unlike numbers of tokens and of targets."""
  assert_same_step(one_step(plain_learner(kind), accumulate), undivided(kind))


@eight_devices
@pytest.mark.parametrize('kind', ['dense', 'taught balanced'])
def test_a_step_in_parts_on_a_mesh_is_the_step_on_one_device(kind):
  assert_same_step(one_step(plain_learner(kind), 2, mesh_of((1, 2, 2, 2))), undivided(kind))


def test_a_model_taken_apart_trains_and_teaches_as_its_stack_does():
  """Student and teacher, both of experts."""
  found = []
  for arrange in (lambda model: model, unrolled):
    loss = Distilled(NextToken(), arrange(model_of('experts', 3)), 0.5)
    learner = descending(arrange(model_of('experts', 0, 2)))
    found.append(one_step(dataclasses.replace(learner, loss=loss)))
  (metrics, moved), (apart_metrics, apart_moved) = found
  assert_same_step((apart_metrics, apart_moved), (metrics, unrolled(moved)))
  assert np.shape(apart_metrics['load']) == (2, E)


def products(jaxpr) -> int:
  """Matrix products in a jaxpr, those of its inner ones included."""
  inner = [value for equation in jaxpr.eqns for value in jax.tree.leaves(
    list(equation.params.values()), is_leaf=lambda value: hasattr(value, 'eqns'))]
  return (sum(equation.primitive.name in ('dot_general', 'ragged_dot_general', 'ragged_dot') for equation in jaxpr.eqns)
          + sum(products(getattr(value, 'jaxpr', value)) for value in inner if hasattr(value, 'eqns')))


@pytest.mark.parametrize('kind, passes', [('dense', 0), ('without load', 0), ('balanced', 1)])
def test_a_step_in_parts_takes_one_more_forward_pass_where_a_loss_reads_the_load_and_none_elsewhere(kind, passes):
  learner = plain_learner(kind)
  state = jax.eval_shape(lambda: initial_state(learner))
  def count(accumulate):
    step = functools.partial(train.train_step, optimizer=learner.optimizer, accumulate=accumulate)
    return products(jax.make_jaxpr(step)(state, learner.loss, batch_of()).jaxpr)
  forward = products(jax.make_jaxpr(lambda model, batch: outputs_of(model, batch).aux)(learner.model, batch_of()).jaxpr)
  assert forward >= 6 and count(2) - count(1) == passes * forward


def test_metrics_become_plain_numbers():
  _, metrics = jax.eval_shape(step_of('experts'), initial_state(learner_of('experts')), NextToken(), batch_of())
  numbers = train.scalars(jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), metrics))
  assert numbers['load'] == [[1.0] * E] and numbers['moe/max_violation'] == 0 and numbers['moe/router_entropy'] == 0.5
  assert all(isinstance(value, (int, float, list)) for value in numbers.values())
  assert {'loss', 'cross_entropy', 'bits_per_byte', 'grad_norm', 'skipped', 'load_balance', 'router_z'} <= set(numbers)


@dataclasses.dataclass
class Recorder:
  """Callbacks that write down what they were called for; the trainer's step is replaced by one that only counts."""
  monkeypatch: pytest.MonkeyPatch
  events: list = dataclasses.field(default_factory=list)

  def fit(self, first=0, refused=lambda step: 0, during=lambda step: None, signalled=None, health=None, **training):
    def step_function(state, loss, batch):
      step = state.step + 1
      self.events.append(('batch', batch))
      during(step)
      metrics = {'loss': np.float32(step), 'skipped_in_a_row': np.int32(refused(step)), 'layers': []}
      return types.SimpleNamespace(step=step, model='model'), metrics
    self.monkeypatch.setattr(train, 'compiled_step', lambda learner, accumulate: step_function)
    note = lambda name: lambda step, *more: self.events.append((name, step, more[-1] is True))
    def cut_off(step, model):
      os.kill(os.getpid(), signalled)
      interruption.check()
    evaluate = cut_off if signalled else note('evaluate')
    callbacks = train.Callbacks(note('log'), evaluate, note('save'), lambda step, numbers: None)
    settings = dict(steps=10, accumulate=1, log_every=4, eval_every=5, checkpoint_every=3) | training
    return train.fit(types.SimpleNamespace(step=first), types.SimpleNamespace(loss=None), lambda step: step,
                     types.SimpleNamespace(**settings), callbacks, health)

  def at(self, name):
    return [event[1] for event in self.events if event[0] == name]


@pytest.fixture
def recorder(monkeypatch):
  return Recorder(monkeypatch)


def test_the_loop_logs_evaluates_and_saves_when_it_should_and_logs_and_saves_its_end(recorder):
  """What comes out of the last step is measured by whoever asked for the training."""
  assert recorder.fit().step == 10
  assert recorder.at('batch') == list(range(10)), 'step i + 1 takes batch i'
  assert recorder.at('log') == [1, 4, 8, 10]
  assert recorder.at('evaluate') == [5] and recorder.at('save') == [3, 6, 9, 10]
  assert recorder.events[-1] == ('save', 10, True), 'the last one is waited for'


def test_a_resumed_loop_goes_on_with_the_next_batch(recorder):
  recorder.fit(first=7)
  assert recorder.at('batch') == [7, 8, 9]


def test_a_finished_run_does_nothing(recorder):
  recorder.fit(first=10)
  assert recorder.events == []


def test_steps_refused_in_a_row_end_the_run_with_its_state_saved(recorder):
  with pytest.raises(NonFinite, match='10 steps in a row'):
    recorder.fit(steps=99, log_every=1, refused=lambda step: max(0, step - 5))
  assert recorder.events[-1] == ('save', 15, True)


def test_fewer_steps_refused_do_not(recorder):
  assert recorder.fit(log_every=1, refused=lambda step: train.MAX_REFUSED - 1).step == 10


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_its_state_saved(recorder, number):
  before = signal.getsignal(number)
  with pytest.raises(Preempted, match=f'{number.name} at step 4: saved'):
    recorder.fit(during=lambda step: os.kill(os.getpid(), number) if step == 4 else None)
  assert recorder.events[-1] == ('save', 4, True) and recorder.at('batch') == [0, 1, 2, 3]
  assert signal.getsignal(number) is before


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_an_evaluation_ends_the_run_there_with_its_state_saved(recorder, number):
  """Nothing is lost, and the evaluation is made good when the run is taken up (below)."""
  with pytest.raises(Preempted, match=f'{number.name} at step 5: saved'): recorder.fit(signalled=number)
  assert recorder.events[-1] == ('save', 5, True) and recorder.at('evaluate') == []


def test_an_evaluation_that_was_cut_off_is_made_good_when_the_run_is_taken_up():
  _, first = straight()
  for before in (True, False):
    context = Context(Memory({4: first.checkpoints.kept[4]}))
    context.measured_before = before
    trained(context, shapes())
    assert context.evaluated == ([] if before else [4]), 'and no other is due'


def test_a_signal_at_the_last_step_is_heard_once_its_state_is_saved(recorder):
  """Whatever would follow can be done by the same command."""
  with pytest.raises(Preempted, match='SIGTERM: stopped'):
    recorder.fit(during=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 10 else None)
  assert recorder.events[-1] == ('save', 10, True)


def test_a_signal_in_the_first_step_has_nothing_to_save(recorder):
  """That is the one which compiles."""
  with pytest.raises(Preempted, match='SIGTERM: stopped'):
    recorder.fit(during=lambda step: os.kill(os.getpid(), signal.SIGTERM))
  assert recorder.at('save') == []


@pytest.fixture
def interruptible():
  """As at a terminal: a shell has programs that it starts in the background ignore SIGINT."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_at_once(recorder, interruptible):
  def twice(step):
    for _ in range(2 * (step == 3)): os.kill(os.getpid(), signal.SIGINT)
  with pytest.raises(KeyboardInterrupt): recorder.fit(during=twice)
  assert recorder.at('save') == []


def failing(*outcomes):
  """A Saver of checkpoints each of whose saves fails or succeeds so."""
  left = list(outcomes)
  class Disk(Memory):
    def save(self, step, state, wait, sane_loss=None):
      if left.pop(0): raise WriteError('disk full')
  return train.Saver(Disk(), Health())


def test_one_save_that_fails_is_said_and_the_next_one_is_tried(caplog):
  saver = failing(True, False, True)
  for step in (1, 2): saver(step, None, False)
  assert [record.getMessage() for record in caplog.records] == ['disk full; training goes on until the next save']


def test_a_second_save_that_fails_ends_the_training_and_so_does_one_that_nothing_follows():
  saver = failing(True, True)
  saver(1, None, False)
  with pytest.raises(WriteError): saver(2, None, False)
  with pytest.raises(WriteError): failing(True)(1, None, True)


def test_a_save_that_succeeds_in_between_makes_good(caplog):
  saver = failing(True, False, True, False, True, True)
  for step in range(5): saver(step, None, False)
  assert len(caplog.records) == 3, 'of saves 0, 2 and 4'
  with pytest.raises(WriteError): saver(5, None, False)


def test_a_save_that_fails_in_the_background_is_noticed_at_the_next_one(caplog):
  class Slow(Memory):
    failing = True
    def wait(self):
      if self.kept and self.failing: raise WriteError('disk full')
  checkpoints = Slow()
  saver = train.Saver(checkpoints, Health())
  saver(1, {}, False), saver(2, {}, False)
  assert checkpoints.steps() == [1, 2] and len(caplog.records) == 1, 'the next one is tried'
  with pytest.raises(WriteError): saver(3, {}, False)
  checkpoints.failing = False


def test_a_diverged_training_says_from_where_it_may_be_taken_up(recorder):
  for kept, said in (({}, 'no state was saved'), ({3: 1.5}, 'sane, step 3, is kept in memory')):
    checkpoints = Memory()
    checkpoints.sane = kept
    with pytest.raises(NonFinite, match=f'10 steps in a row .*{said}') as error, advised('memory', checkpoints.sane_step):
      recorder.fit(steps=99, log_every=1, refused=lambda step: step)
    assert '\n' not in str(error.value)


def test_absurd_losses_end_a_training(recorder):
  """Of the recorder, each is the number of its step."""
  with pytest.raises(NonFinite, match='step 21: the loss has been far above that of a uniform guess'):
    recorder.fit(steps=99, log_every=1, health=Health(uniform=3.0))


class Memory:
  """Checkpoints that are kept in memory, and refuse a state of another structure."""

  def __init__(self, kept=()): self.kept, self.folder, self.sane = dict(kept), 'memory', {}

  def steps(self): return sorted(self.kept)

  def save(self, step, state, wait, sane_loss=None):
    self.kept[step] = jax.tree.map(np.array, state)
    if sane_loss is not None: self.sane = {step: sane_loss}

  def sane_step(self): return next(iter(self.sane), None)

  def sane_loss(self): return next(iter(self.sane.values()), float('inf'))

  def wait(self): pass

  def restore(self, abstract):
    return self._as(abstract, self.kept[max(self.kept)])

  def restore_model(self, abstract, step):
    return self._as(abstract, self.kept[step].model)

  def _as(self, abstract, state):
    if jax.tree.structure(abstract) != jax.tree.structure(state): raise CheckpointError('holds another state')
    return jax.tree.map(lambda like, leaf: jax.device_put(leaf, like.sharding), abstract, state)


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


def assert_same_bits(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True): np.testing.assert_array_equal(x, y)


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
