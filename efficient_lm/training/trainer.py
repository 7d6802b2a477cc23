"""The one trainer: a step of twenty lines, and the loop around it that logs, evaluates, saves and stops cleanly."""
import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from efficient_lm import axes
from efficient_lm.errors import NonFinite, Preempted
from efficient_lm.training.learner import TrainState
from efficient_lm.training.losses import outputs_of
from efficient_lm.training.optimizers import GuardState

MAX_REFUSED = 10   # steps in a row that may be refused as non-finite before a run gives up


def gradients(objective: Callable, params, batch, num_microbatches: int):
  """Gradient and metrics of `objective(params, batch) -> (loss, metrics)`, averaged over microbatches of the batch.

  Every row of a packed batch weighs nearly the same, so this is the gradient of the whole batch to within that 'nearly'
  (exactly, when all targets count), at the memory of one microbatch.
  """
  grad = jax.grad(objective, has_aux=True)
  if num_microbatches == 1: return grad(params, batch)
  split = lambda a: a.reshape(a.shape[0] // num_microbatches, num_microbatches, *a.shape[1:]).swapaxes(0, 1)
  zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(grad, params, jax.tree.map(lambda a: split(a)[0], batch)))
  add = lambda total, microbatch: (jax.tree.map(jnp.add, total, grad(params, microbatch)), None)
  total, _ = jax.lax.scan(add, zeros, jax.tree.map(split, batch))
  return jax.tree.map(lambda a: a / num_microbatches, total)


def train_step(state: TrainState, loss, batch, *, optimizer: optax.GradientTransformationExtraArgs, accumulate: int = 1):
  """One update: (state, metrics). Only parameters (`nnx.Param`) move; everything else in the model is carried along."""
  graph, params, rest = nnx.split(state.model, nnx.Param, ...)

  def objective(params, batch):
    outputs = outputs_of(nnx.merge(graph, params, rest), batch)
    value, metrics = loss(outputs, batch)
    return value, {'loss': value, **metrics, 'layers': [stack.get('metrics', {}) for stack in outputs.aux]}

  grads, metrics = gradients(objective, params, batch, accumulate)
  updates, opt_state = optimizer.update(grads, state.opt_state, params, loss=metrics['loss'])
  model = nnx.merge(graph, optax.apply_updates(params, updates), rest)
  guard = opt_state if isinstance(opt_state, GuardState) else None
  if guard:
    norm = jnp.where(guard.in_a_row, jnp.nan, guard.grad_norm)
    metrics |= {'grad_norm': norm, 'skipped': guard.skipped, 'skipped_in_a_row': guard.in_a_row}
  return state.replace(step=state.step + 1, model=model, opt_state=opt_state), metrics


def compiled_step(learner, accumulate: int = 1):
  """`train_step` jitted for this learner; the state is donated, the loss (which may hold a teacher) is not."""
  step = functools.partial(train_step, optimizer=learner.optimizer, accumulate=accumulate)
  return jax.jit(step, donate_argnums=0)


def place(batch: dict[str, np.ndarray], mesh) -> dict[str, jax.Array]:
  """Puts this process's rows of a batch on the mesh, split over its batch axes."""
  sharding = NamedSharding(mesh, PartitionSpec(axes.BATCH))
  return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


@jax.jit
def evaluation_sums(model, batch):
  """Nats, counted targets and bytes of text of one batch."""
  outputs = outputs_of(model, batch)
  nll_BT, _ = outputs.head.nll(outputs.hidden_BTD, batch['targets_BT'])
  return jnp.sum(nll_BT * batch['weights_BT']), jnp.sum(batch['weights_BT']), jnp.sum(batch['bytes_BT'])


def evaluate(model, batches: Iterable[dict[str, np.ndarray]], mesh, sums_of: Callable = evaluation_sums) -> dict[str, float]:
  """Bits per byte (comparable across tokenizers), nats and perplexity per token over all `batches`.

  sums_of: (model, batch) -> what `evaluation_sums` does, however else the model is to read a batch.
  """
  sums = [axes.settle(sums_of(model, place(batch, mesh))) for batch in batches]
  nats, tokens, num_bytes = np.sum(np.array(jax.device_get(sums), np.float64), 0)
  per_token = nats / tokens
  return {'bits_per_byte': nats / num_bytes / math.log(2), 'nats_per_token': per_token,
          'perplexity': math.exp(min(per_token, 700.0)), 'tokens': int(tokens), 'bytes': int(num_bytes)}


def scalars(metrics) -> dict[str, Any]:
  """A step's metrics as plain numbers: those of layers as their mean, the load as a list of lists, layers x experts."""
  metrics = jax.device_get(metrics)
  stacks = [stack for stack in metrics.pop('layers') if stack]
  flat = {name: value.item() for name, value in metrics.items()}
  for name in stacks[0] if stacks else ():
    values = np.concatenate([np.atleast_1d(stack[name]) for stack in stacks if name in stack])
    if name.endswith('_E'): flat['load'] = np.round(values.astype(np.float64), 4).tolist()
    else: flat[f'moe/{name}'] = float(values.max() if name == 'max_violation' else values.mean())
  return flat


class Interrupts:
  """Turns the first SIGTERM or SIGINT into a flag that the loop reads between steps; a second one ends at once."""

  def __enter__(self):
    self.received = None
    self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
    return self

  def _note(self, number, frame):
    self.received = number
    for caught, handler in self.previous.items(): signal.signal(caught, handler)

  def __exit__(self, *error):
    for number, handler in self.previous.items(): signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class Callbacks:
  """What the loop calls: log(step, numbers) each logged step, evaluate(step, model) -> None at evaluations,
  save(step, state, wait) at checkpoints, progress(step, numbers or None) after every step."""
  log: Callable
  evaluate: Callable
  save: Callable
  progress: Callable


def fit(state: TrainState, learner, batch_at: Callable[[int], Any], training, callbacks: Callbacks) -> TrainState:
  """Steps from `state.step` to `training.steps`.

  Args:
    batch_at: step -> batch on the mesh; a pure function, so that a resumed run sees what it would have seen.
    training: steps, accumulate, log_every, eval_every, checkpoint_every.

  Raises:
    NonFinite: after MAX_REFUSED refused steps in a row; the last good state has been saved.
    Preempted: on SIGTERM or SIGINT, once the state has been saved.
  """
  step_function = compiled_step(learner, training.accumulate)
  first, last_logged, clock = int(state.step), int(state.step), time.perf_counter()
  with Interrupts() as interrupts:
    for step in range(first + 1, training.steps + 1):
      state, metrics = axes.settle(step_function(state, learner.loss, batch_at(step - 1)))
      final, numbers = step == training.steps, None
      if step % training.log_every == 0 or final or step == first + 1:
        numbers = scalars(metrics)
        now = time.perf_counter()
        numbers['steps_per_second'] = (step - last_logged) / (now - clock)
        callbacks.log(step, numbers)
      callbacks.progress(step, numbers)
      if step % training.eval_every == 0 or final: callbacks.evaluate(step, state.model)
      if step % training.checkpoint_every == 0 or final: callbacks.save(step, state, final)
      if numbers: last_logged, clock = step, time.perf_counter()
      if numbers and numbers.get('skipped_in_a_row', 0) >= MAX_REFUSED:
        callbacks.save(step, state, True)
        raise NonFinite(f'step {step}: {numbers["skipped_in_a_row"]} steps in a row had a loss or gradient that is not '
                        f'finite; the last good state is saved, lower the learning rate or look at the data')
      if interrupts.received and not final:
        callbacks.save(step, state, True)
        raise Preempted(f'{signal.Signals(interrupts.received).name} at step {step}: saved; the same command resumes')
  return state
