"""The one trainer: a step of twenty lines, and the loop around it that logs, evaluates, saves and stops cleanly."""
import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from efficient_lm.axes import BATCH
from efficient_lm.errors import CheckpointError, ConfigError, NonFinite, Preempted, WriteError
from efficient_lm.parallel.processes import Agreement, fetched
from efficient_lm.parallel.sharding import place, placed, wait_on_cpu
from efficient_lm.system import interruption
from efficient_lm.training import replay
from efficient_lm.training.health import Health, advised
from efficient_lm.training.learner import TrainState, assemble, finished, initial_state, starting_state
from efficient_lm.training.losses import Totals, outputs_of
from efficient_lm.training.transforms import GuardState, spikes_in

logger = logging.getLogger(__name__)
MAX_REFUSED = 10   # steps in a row that may be refused as non-finite before a run gives up


def gradients(objective: Callable, params, batch, num_microbatches: int, reports: Callable | None = None):
  """Gradient and metrics of `objective(params, batch) -> (loss, metrics)` over a global batch, at the memory of one
  microbatch: the same for any number of microbatches, up to the order of sums, however unequal they are.

  Losses divide by the totals of the global batch (see `losses`), so those of microbatches add up. A balancing loss may need
  the load of the global batch before any microbatch is differentiated. Where one does, `reports(params, batch)`, what the
  layers of a microbatch report, is computed for all microbatches first, which takes one more forward pass.
  """
  grad, totals = jax.grad(objective, has_aux=True), Totals.of(batch)
  if num_microbatches == 1: return grad(params, batch)
  split = lambda a: a.reshape(a.shape[0] // num_microbatches, num_microbatches, *a.shape[1:]).swapaxes(0, 1)
  microbatches = jax.tree.map(split, batch)
  first = jax.tree.map(lambda a: a[0], microbatches)

  def added(function):
    start = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(function, first))
    add = lambda total, microbatch: (jax.tree.map(jnp.add, total, function(microbatch)), None)
    return jax.lax.scan(add, start, microbatches)[0]

  if reports is not None and any(one is not None and one.reads_load for one in jax.eval_shape(reports, params, first)):
    totals = dataclasses.replace(totals, reports=added(lambda microbatch: reports(params, microbatch)))
  return added(lambda microbatch: grad(params, microbatch | {'totals': totals}))


def train_step(state: TrainState, loss, batch, *, optimizer: optax.GradientTransformationExtraArgs, accumulate: int = 1):
  """One update: (state, metrics). Only parameters (`nnx.Param`) move; everything else in the model is carried along."""
  graph, params, rest = nnx.split(state.model, nnx.Param, ...)
  outputs = lambda params, batch: outputs_of(nnx.merge(graph, params, rest), batch)

  def objective(params, batch):
    found = outputs(params, batch)
    value, metrics = loss(found, batch)
    return value, {'loss': value, **metrics, 'layers': found.aux}

  grads, metrics = gradients(objective, params, batch, accumulate, lambda *arguments: outputs(*arguments).aux)
  updates, opt_state = optimizer.update(grads, state.opt_state, params, loss=metrics['loss'])
  model = nnx.merge(graph, optax.apply_updates(params, updates), rest)
  guard = opt_state if isinstance(opt_state, GuardState) else None
  if guard:
    norm = jnp.where(guard.in_a_row, jnp.nan, guard.grad_norm)
    metrics |= {'grad_norm': norm, 'skipped': guard.skipped, 'skipped_in_a_row': guard.in_a_row, **spikes_in(guard.inner)}
  return state.replace(step=state.step + 1, model=model, opt_state=opt_state), metrics


def compiled_step(learner, accumulate: int = 1):
  """`train_step` jitted for this learner; the state is donated, the loss (which may hold a teacher) is not."""
  step = functools.partial(train_step, optimizer=learner.optimizer, accumulate=accumulate)
  return jax.jit(step, donate_argnums=0)


def scalars(metrics) -> dict[str, Any]:
  """A step's metrics as plain numbers: those of layers as their mean, the load as a list of lists, layers x experts. Those
  without a room of their own in the log are of mixtures."""
  metrics = fetched(metrics)
  layers = [report.metrics() for report in metrics.pop('layers') if report is not None]
  flat = {name: value.item() for name, value in metrics.items()}
  for name in dict.fromkeys(name for found in layers for name in found):
    of_layer = np.atleast_2d if name.endswith('_E') else np.atleast_1d
    values = np.concatenate([of_layer(np.asarray(found[name])) for found in layers if name in found])
    if name.endswith('_E'): flat['load'] = np.round(values.astype(np.float64), 4).tolist()
    else: flat[name if '/' in name else f'moe/{name}'] = float(values.max() if name == 'max_violation' else values.mean())
  return flat


def train(stage, model, context):
  """What the stage `training.train.Train` does: resumes from the newest checkpoint of its own, if there is one, and fits.

  Args:
    stage: with `training` and `techniques`.
    model: arrays on context.mesh, which are taken over; of a training that is resumed, shapes will do.
    context: key, mesh, corpus, tokens_seen, field; checkpoints, log, evaluate, has_evaluated, report, progress (see
      `runs.context`).

  Returns:
    The trained model and the techniques' notes.

  Raises:
    ConfigError: the batch does not divide over the mesh, or a technique does not suit the model.
    NonFinite, Preempted: see `fit`.
    WriteError: the state could not be saved twice in a row, or at the end.
  """
  training, techniques = stage.training, stage.techniques
  _check_batch(training, context)
  learner = assemble(model, training.optimizer.build(training.steps), techniques, context.key, training.steps,
                     f'{context.field}.techniques')
  if context.checkpoints.steps(): state = _restored(learner, training.steps, techniques, context)
  else: state = initial_state(learner, context.mesh, donate=True)
  learner = learner.replace(model=None)   # the state has it; no second one is kept alive
  context.report(training, learner.notes, state)
  first = int(state.step)
  batches = context.corpus.batches(batch_size=training.batch_size, sequence_length=training.sequence_length)
  stream = batches.iterate(-(-context.tokens_seen // training.tokens_per_step) + first)
  schedule = training.optimizer.schedule.build(training.steps)

  def log(step, numbers):
    numbers['tokens_per_second'] = training.tokens_per_step * numbers['steps_per_second']
    # Refused steps do not move the schedule. A step that is refused itself has the rate that the next one will take.
    refused_before = numbers['skipped'] - (numbers['skipped_in_a_row'] > 0) + numbers.get('spikes', 0)
    numbers['learning_rate'] = float(schedule(step - 1 - refused_before))
    context.log(step, numbers)

  checkpoints = context.checkpoints
  health = Health(math.log(state.model.embed.shape[0]), checkpoints.sane_loss())
  with context.progress(first, training.steps) as advance, advised(checkpoints.folder, checkpoints.sane_step):
    # A signal in the midst of an evaluation has the state saved without it.
    if 0 < first < training.steps and first % training.eval_every == 0 and not context.has_evaluated(first):
      context.evaluate(first, state.model)
    callbacks = Callbacks(log, context.evaluate, Saver(checkpoints, health), advance)
    state = fit(state, learner, lambda step: place(next(stream), context.mesh), training, callbacks, health)
  finish = jax.jit(functools.partial(finished, techniques=techniques), donate_argnums=0)
  return finish(state.model, state.opt_state), learner.notes


def _restored(learner, last: int, techniques, context) -> TrainState:
  """The newest state that the training has saved. Of one that was saved after the `last` step only the model is read, unless
  a technique's `finish` asks for the optimizer's state: a later version of an optimizer may keep another one."""
  shapes = placed(jax.eval_shape(lambda model: starting_state(learner.replace(model=model)), learner.model), context.mesh)
  if last in context.checkpoints.steps()[-1:] and not any(hasattr(technique, 'finish') for technique in techniques):
    # If that step is damaged, what follows finds an earlier one, or says what is wrong.
    with contextlib.suppress(CheckpointError):
      return TrainState(jnp.int32(last), context.checkpoints.restore_model(shapes.model, last), None)
  return context.checkpoints.restore(shapes)


def _check_batch(training, context):
  shards = math.prod(context.mesh.shape[name] for name in BATCH)
  if training.batch_size % (shards * training.accumulate):
    name = 'train' if context.field == 'config' else 'training'
    raise ConfigError(f'{context.field}.{name}.batch_size', training.batch_size, f'must be a multiple of '
                      f'{shards * training.accumulate}: the mesh\'s data * fsdp * expert, times accumulate')


class Saver:
  """Saves a training's states, and notes the last that is sane: one whose losses are, and the first that follows it. A save
  that fails is said, and training goes on to the next one; if that fails as well, or nothing comes after it, it raises
  WriteError."""

  def __init__(self, checkpoints, health: Health):
    self.checkpoints, self.health = checkpoints, health
    self.failed, self.under_way, self.candidate = False, False, None

  def __call__(self, step: int, state, wait: bool):
    known = None if self.candidate is None else self.health.is_borne_out()
    sane, spared = self.candidate if known else None, self.candidate if known is None else None
    loss = self.health.sane_loss()
    with self._tolerated(False):
      self.checkpoints.wait()   # for the one before
      self.failed &= not self.under_way
    self.under_way = False
    with self._tolerated(wait):
      self.checkpoints.save(step, state, wait, sane=sane, spared=spared and spared[0])
      self.under_way = True
    self.candidate = (step, loss) if spared is None and loss is not None else spared

  @contextlib.contextmanager
  def _tolerated(self, last: bool):
    try: yield
    except WriteError as error:
      if last or self.failed: raise
      self.failed = True
      logger.warning('%s; training goes on until the next save', error)


@dataclasses.dataclass(frozen=True)
class Callbacks:
  """What the loop calls: log(step, numbers) each logged step, evaluate(step, model) -> None at evaluations,
  save(step, state, wait) at checkpoints, progress(step, numbers or None) after every step."""
  log: Callable
  evaluate: Callable
  save: Callable
  progress: Callable


def fit(state: TrainState, learner, batch_at: Callable[[int], Any], training, callbacks: Callbacks,
        health: Health | None = None) -> TrainState:
  """Steps from `state.step` to `training.steps`. What comes out of the last step is saved, and measured by the caller.

  Args:
    batch_at: step -> batch on the mesh; a pure function, so that a resumed run sees what it would have seen.
    training: steps, accumulate, log_every, eval_every, checkpoint_every, replay_every.

  Raises:
    DeviceFault: a step that is computed twice differs, see `replay`, or copies of an array do, see `parallel.replicas`.
    NonFinite: after MAX_REFUSED refused steps in a row, with the state saved, or after too many absurd losses.
    Preempted: on a signal (see `interruption`), once the state has been saved; of several processes on that of any, in all
      at one step.
  """
  once, health = compiled_step(learner, training.accumulate), health or Health()
  twice = functools.partial(replay.twice, once, callbacks.save)
  first, last_logged, clock = int(state.step), int(state.step), time.perf_counter()
  agreed, was_cut = Agreement(), False
  with interruption.noticed(), contextlib.ExitStack() as ours:
    for step in range(first + 1, training.steps + 1):
      step_function = twice if training.replay_every and step % training.replay_every == 0 else once
      state, metrics = wait_on_cpu(step_function(state, learner.loss, batch_at(step - 1)))
      if step == first + 1: ours.enter_context(interruption.holding())   # from here on a stop would lose a step
      final, numbers = step == training.steps, None
      if step % training.log_every == 0 or final or step == 1:   # the same rows, however often it was interrupted
        numbers = scalars(metrics)
        now = time.perf_counter()
        numbers['steps_per_second'] = (step - last_logged) / (now - clock)
        callbacks.log(step, numbers)
        health.see(numbers)
      callbacks.progress(step, numbers)
      if step % training.eval_every == 0 and not final:
        try: callbacks.evaluate(step, state.model)
        except Preempted: was_cut = True   # of several processes in all
      stopped = _diverged(step, numbers or {}, health)
      if step % training.checkpoint_every == 0 or final: callbacks.save(step, state, final)
      if numbers: last_logged, clock = step, time.perf_counter()
      if stopped:
        callbacks.save(step, state, True)
        raise NonFinite(stopped)
      if (was_cut or agreed(interruption.received() is not None)) and not final:
        callbacks.save(step, state, True)
        what = interruption.received() or 'another process was interrupted'
        interrupted = Preempted(f'{what} at step {step}: saved; the same command resumes')
        interrupted.in_all = True
        raise interrupted
  return state


def _diverged(step: int, numbers: dict[str, Any], health: Health) -> str | None:
  """Why a training has to stop, if it has."""
  if (in_a_row := numbers.get('skipped_in_a_row', 0)) >= MAX_REFUSED:
    return f'step {step}: {in_a_row} steps in a row had a loss or gradient that is not finite'
  if health.is_lost(): return f'step {step}: the loss has been far above that of a uniform guess for too long'
  return None
