"""The one trainer: the same on every mesh, the same every time, and stopping without losing a step."""
import dataclasses
import functools
import math
import os
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.config.mesh import Mesh
from efficient_lm.errors import NonFinite, Preempted
from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.models.moe.layer import MoE
from efficient_lm.training import trainer as train
from efficient_lm.training.learner import assemble, initial_state
from efficient_lm.training.losses import NextToken, outputs_of
from efficient_lm.training.optimizers import AdamW, WarmupStableDecay
from efficient_lm.tree import path_name, select

B, T, V, D, E = 8, 8, 32, 16, 4
STEPS = 20
BALANCE = (routing.LoadBalance(), routing.LossFreeBias(), routing.RouterZ())
MLPS = {'dense': spec.SwiGLU(hidden=16), 'experts': spec.MoE(num_experts=E, hidden=16, balance=BALANCE)}
MESHES = {'data 8': (8, 1, 1, 1), 'fsdp 8': (1, 8, 1, 1), 'fsdp 4, tensor 2': (1, 4, 1, 2),
          'fsdp 2, expert 2, tensor 2': (1, 2, 2, 2)}


@pytest.fixture(scope='module', autouse=True)
def _quick_compilation():
  """Compiling is nearly all that these tests spend their time on; what they state holds of any program."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def batch_of(seed=0):
  """Random rows, each beginning with a token of its own, so that every target can be known."""
  tokens = np.random.default_rng(seed).integers(0, V, (B, T + 1)).astype(np.int32)
  tokens[:, 0] = np.arange(B)
  ones = np.ones((B, T), np.int32)
  return {'inputs_BT': tokens[:, :-1], 'targets_BT': tokens[:, 1:], 'weights_BT': ones.astype(np.float32),
          'bytes_BT': 2 * ones, 'segments_BT': ones, 'positions_BT': np.tile(np.arange(T, dtype=np.int32), (B, 1))}


@functools.cache
def learner_of(kind):
  """A learner whose model's numbers are drawn by numpy; norm scales one, biases zero, as they start."""
  stack = spec.Stack(num_layers=1, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=2, head_dim=8), mlp=MLPS[kind])
  described = spec.Transformer(vocab_size=V, dim=D, stacks=(stack,))
  rng = np.random.default_rng(0)
  def number(path, leaf):
    if 'scale' in path_name(path): return jnp.ones(leaf.shape)
    return jnp.asarray(rng.normal(size=leaf.shape) * (0 if 'load_bias' in path_name(path) else 0.25), leaf.dtype)
  abstract = jax.eval_shape(lambda: described.build(rngs=nnx.Rngs(0)))
  optimizer = AdamW(schedule=WarmupStableDecay(peak=1e-2, warmup=2, decay=0)).build(1000)
  return assemble(jax.tree_util.tree_map_with_path(number, abstract), optimizer, (), jax.random.key(0))


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


@functools.cache
def spread(kind, sizes):
  """The same run over eight devices."""
  mesh = Mesh(**dict(zip(('data', 'fsdp', 'expert', 'tensor'), sizes, strict=True))).build()
  learner = learner_of(kind)   # made outside the mesh: it serves the runs on one device too
  with jax.set_mesh(mesh):
    return steps(kind, initial_state(learner, mesh), STEPS, lambda batch: train.place(batch, mesh))


eight_devices = pytest.mark.skipif('jax.device_count() != 8', reason='needs eight devices: run the tests on CPU')
each_mesh = pytest.mark.parametrize('sizes', MESHES.values(), ids=MESHES)
each_kind = pytest.mark.parametrize('kind', MLPS)


@eight_devices
@each_mesh
@each_kind
def test_every_mesh_trains_as_one_device_does(kind, sizes):
  """Float32 sums in another order, 2**-24 apiece, grow over twenty steps; a promise of the project is 1e-4."""
  np.testing.assert_allclose(spread(kind, sizes)[1], alone(kind)[1], rtol=1e-4)
  assert alone(kind)[1][-1] < alone(kind)[1][0] - 0.1, 'and it does train'


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


def test_accumulated_gradients_are_those_of_the_whole_batch():
  graph, params = nnx.split(learner_of('dense').model)
  def objective(params, batch):
    return NextToken()(outputs_of(nnx.merge(graph, params), batch), batch)
  run = jax.jit(functools.partial(train.gradients, objective), static_argnums=2)
  (whole, metrics), (parts, part_metrics) = (run(params, batch_of(), k) for k in (1, 4))
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    # Means of at most 64 float32 terms, in another order, beside the largest of them.
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())
  for name in metrics: np.testing.assert_allclose(part_metrics[name], metrics[name], rtol=1e-5)


def one_device():
  return Mesh().build(jax.devices()[:1])


def test_bits_per_byte_by_hand():
  model, batches = learner_of('dense').model, [batch_of(1), batch_of(2)]
  batches[1]['weights_BT'] = (np.arange(B * T).reshape(B, T) % 3 > 0).astype(np.float32)
  batches[1]['bytes_BT'] = np.random.default_rng(0).integers(0, 5, (B, T))
  found = train.evaluate(model, batches, one_device())
  nats, tokens = 0.0, 0
  for batch in batches:
    logits = np.asarray(jax.jit(lambda model, batch: outputs_of(model, batch).logits_BTV)(model, batch), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats -= (np.take_along_axis(log_p, batch['targets_BT'][..., None], -1)[..., 0] * batch['weights_BT']).sum()
    tokens += batch['weights_BT'].sum()
  num_bytes = sum(batch['bytes_BT'].sum() for batch in batches)
  assert (found['tokens'], found['bytes']) == (tokens, num_bytes)
  assert found['bits_per_byte'] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
  assert found['nats_per_token'] == pytest.approx(nats / tokens, rel=1e-5)
  assert found['perplexity'] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary():
  model = jax.tree.map(jnp.zeros_like, learner_of('dense').model)
  found = train.evaluate(model, [batch_of()], one_device())
  assert found['bits_per_byte'] * 2 == pytest.approx(math.log2(V), rel=1e-6)   # two bytes a token
  assert found['perplexity'] == pytest.approx(V, rel=1e-5)


def test_metrics_become_plain_numbers():
  _, metrics = jax.eval_shape(step_of('experts'), initial_state(learner_of('experts')), NextToken(), batch_of())
  numbers = train.scalars(jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), metrics))
  assert numbers['load'] == [[0.5] * E] and numbers['moe/max_violation'] == 0.5
  assert all(isinstance(value, (int, float, list)) for value in numbers.values())
  assert {'loss', 'cross_entropy', 'bits_per_byte', 'grad_norm', 'skipped', 'load_balance', 'router_z'} <= set(numbers)


@dataclasses.dataclass
class Recorder:
  """Callbacks that write down what they were called for; the trainer's step is replaced by one that only counts."""
  monkeypatch: pytest.MonkeyPatch
  events: list = dataclasses.field(default_factory=list)

  def fit(self, first=0, refused=lambda step: 0, during=lambda step: None, **training):
    def step_function(state, loss, batch):
      step = state.step + 1
      self.events.append(('batch', batch))
      during(step)
      metrics = {'loss': np.float32(step), 'skipped_in_a_row': np.int32(refused(step)), 'layers': []}
      return types.SimpleNamespace(step=step, model='model'), metrics
    self.monkeypatch.setattr(train, 'compiled_step', lambda learner, accumulate: step_function)
    note = lambda name: lambda step, *more: self.events.append((name, step, more[-1] is True))
    callbacks = train.Callbacks(note('log'), note('evaluate'), note('save'), lambda step, numbers: None)
    settings = dict(steps=10, accumulate=1, log_every=4, eval_every=5, checkpoint_every=3) | training
    return train.fit(types.SimpleNamespace(step=first), types.SimpleNamespace(loss=None), lambda step: step,
                     types.SimpleNamespace(**settings), callbacks)

  def at(self, name):
    return [event[1] for event in self.events if event[0] == name]


@pytest.fixture
def recorder(monkeypatch):
  return Recorder(monkeypatch)


def test_the_loop_logs_evaluates_and_saves_when_it_should_and_always_at_the_end(recorder):
  assert recorder.fit().step == 10
  assert recorder.at('batch') == list(range(10)), 'step i + 1 takes batch i'
  assert recorder.at('log') == [1, 4, 8, 10]
  assert recorder.at('evaluate') == [5, 10] and recorder.at('save') == [3, 6, 9, 10]
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


def test_a_signal_at_the_last_step_is_too_late_to_matter(recorder):
  assert recorder.fit(during=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 10 else None).step == 10


@pytest.fixture
def interruptible():
  """As at a terminal: a shell has programs that it starts in the background ignore SIGINT."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_at_once(recorder, interruptible):
  def twice(step):
    for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
  with pytest.raises(KeyboardInterrupt): recorder.fit(during=twice)
  assert recorder.at('save') == []
