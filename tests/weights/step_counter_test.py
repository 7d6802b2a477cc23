"""A step counter counts the steps that training takes, whatever takes them, and touches nothing else."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

from efficient_lm.runs.checkpoint import Checkpoints
from efficient_lm.training.losses import weighted_mean
from efficient_lm.training.optimizers import AdamW, Muon, WarmupStableDecay
from efficient_lm.training.trainer import gradients
from efficient_lm.training.transforms import descend_rated, guarded
from efficient_lm.weights.step_counter import StepCounter, counting

LAYERS, D = 3, 4
CONSTANT = WarmupStableDecay(peak=1e-2, warmup=0, decay=0)
BATCH = jnp.asarray(np.random.default_rng(0).normal(size=(4, D)), jnp.float32)


class Layer(nnx.Module):
  """x + x @ w, with a step counter; stacked as models stack their layers."""

  def __init__(self):
    self.w = nnx.Param(jnp.full((LAYERS, D, D), 0.1), axes='DF', inputs='D')
    self.counter = StepCounter.new((LAYERS,))

  def __call__(self, x_BD):
    return x_BD + counting(x_BD, self.counter) @ self.w.get_value()


def batch_of(x_BD):
  """One token a row."""
  ones = jnp.ones((len(x_BD), 1), jnp.int32)
  return {'x_BD': x_BD, 'weights_BT': ones, 'bytes_BT': ones, 'segments_BT': ones}


def objective(params, batch):
  y_BD, _ = lax.scan(lambda x_BD, layer: (layer(x_BD), None), batch['x_BD'], params)
  loss = weighted_mean(jnp.mean(y_BD ** 2, -1, keepdims=True), batch)
  return loss, {'loss': loss}


@functools.cache
def stepper(kind=AdamW, microbatches=1):
  """Initial state and the step of a trainer: gradients, guard, update."""
  optimizer = guarded(descend_rated(kind(schedule=CONSTANT, weight_decay=0.5, clip=0.1).build(100)))
  def step(state, batch):
    params, opt_state = state
    grads, metrics = gradients(objective, params, batch, microbatches)
    updates, opt_state = optimizer.update(grads, opt_state, params, loss=metrics['loss'])
    return optax.apply_updates(params, updates), opt_state
  return (Layer(), optimizer.init(Layer())), jax.jit(step)


def steps(count, state=None, x_BD=BATCH, **options):
  initial, step = stepper(**options)
  state = initial if state is None else state
  for _ in range(count): state = step(state, batch_of(x_BD))
  return state


def reading(state):
  return state[0].counter.get_value().tolist()


@pytest.mark.parametrize('options', [{}, dict(kind=Muon), dict(microbatches=2), dict(microbatches=4)], ids=str)
def test_it_counts_steps_in_every_layer(options):
  """Clipping, weight decay, moments and learning rates are for the others."""
  assert reading(stepper(**options)[0]) == [0] * LAYERS
  assert reading(steps(5, **options)) == [5] * LAYERS


def test_a_refused_step_does_not_count():
  state = steps(2)
  state = steps(3, state, x_BD=BATCH.at[0, 0].set(jnp.nan))
  assert reading(state) == [2] * LAYERS and int(state[1].skipped) == 3
  assert reading(steps(1, state)) == [3] * LAYERS


def test_it_goes_on_after_a_resume(tmp_path):
  state = steps(3)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(3, state, wait=True)
  restored = checkpoints.restore(jax.eval_shape(lambda: stepper()[0]))
  checkpoints.close()
  assert reading(steps(2, restored)) == [5] * LAYERS


def test_it_changes_neither_value_nor_gradient():
  counter, x, g = StepCounter.new(), BATCH, BATCH[::-1]
  y, pull = jax.vjp(lambda x: counting(x, counter), x)
  np.testing.assert_array_equal(y, x)
  np.testing.assert_array_equal(pull(g)[0], g)


def test_it_counts_once_however_often_it_is_used_and_not_where_it_is_not():
  gradient = jax.grad(lambda counter: jnp.sum(counting(counting(BATCH, counter), counter)))(StepCounter.new())
  assert float(jnp.sign(gradient.get_value())) == -1
  assert float(jax.grad(lambda counter: jnp.sum(BATCH))(StepCounter.new()).get_value()) == 0


def test_it_counts_inside_a_checkpointed_layer():
  layer = lambda counter: jax.checkpoint(lambda x: jnp.sin(counting(x, counter)))
  gradient = jax.grad(lambda counter: jnp.sum(layer(counter)(BATCH)))(StepCounter.new())
  assert float(gradient.get_value()) == -1


@pytest.mark.skipif('jax.device_count() != 8', reason='needs eight devices: run the tests on CPU')
def test_it_counts_once_on_eight_devices(mesh):
  """Inside a map the sum of eight gradients of -1 is one step all the same."""
  batch = jnp.tile(BATCH, (2, 1))
  def loss(counter):
    spec = jax.sharding.PartitionSpec(('data', 'fsdp'))
    each = jax.shard_map(lambda counter, x: counting(x, counter), in_specs=(jax.sharding.PartitionSpec(), spec),
                         out_specs=spec, check_vma=False)
    return jnp.sum(each(counter, batch))
  counter, optimizer = StepCounter.new(), descend_rated(optax.sgd(0.1))
  with mesh(4, 2, 1, 1):
    gradient = jax.jit(jax.grad(loss))(counter)
    updates, _ = optimizer.update(gradient, optimizer.init(counter), counter)
  assert float(updates.get_value()) == 1
