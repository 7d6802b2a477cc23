"""A step that is computed twice: the same on one device and on eight, and nothing changes; a flipped bit is noticed."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config.mesh import Mesh
from efficient_lm.errors import DeviceFault
from efficient_lm.parallel.sharding import single_device_mesh
from efficient_lm.training import trainer
from efficient_lm.training.learner import TrainState, assemble, initial_state
from efficient_lm.training.optimizers import AdamW
from efficient_lm.training.replay import twice
from efficient_lm.training.train import Training
from tests.training.tiny import B, Memory, T, batch_of, model_of

MESHES = {'one device': single_device_mesh, 'data 8': Mesh(data=8).build,
          'all axes': Mesh(data=1, fsdp=2, expert=2, tensor=2).build}


@functools.cache
def fitted(kind, mesh_name, replay_every):
  """Bits of the state after four steps, what was logged of them, and how many steps were computed."""
  computed, logged, compiled = [], [], trainer.compiled_step
  mesh, memory = MESHES[mesh_name](), Memory()
  # A step takes what it is given; and what is made under a mesh lies on that.
  learner = assemble(jax.tree.map(jnp.copy, model_of(kind)), AdamW().build(4), (), jax.random.key(0))
  with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
    def counting(*arguments):
      step_function = compiled(*arguments)
      return lambda state, *more: computed.append(int(state.step)) or step_function(state, *more)
    patch.setattr(trainer, 'compiled_step', counting)
    callbacks = trainer.Callbacks(lambda step, numbers: logged.append(numbers), None, memory.save, lambda *_: None)
    training = Training(steps=4, batch_size=B, sequence_length=T, log_every=1, replay_every=replay_every)
    batch_at = lambda step: trainer.place(batch_of(step), mesh)
    state = trainer.fit(initial_state(learner, mesh), learner, batch_at, training, callbacks)
  for numbers in logged: numbers.pop('steps_per_second')
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)], logged, computed


@pytest.mark.parametrize('kind, mesh_name', [('dense', 'one device'), ('dense', 'data 8'), ('experts', 'all axes')])
def test_a_step_computed_twice_is_the_same_and_changes_nothing(kind, mesh_name):
  if mesh_name != 'one device' and jax.device_count() != 8: pytest.skip('needs eight devices: run the tests on CPU')
  plain, checked = fitted(kind, mesh_name, 0), fitted(kind, mesh_name, 2)
  assert plain[2] == [0, 1, 2, 3] and checked[2] == [0, 1, 1, 2, 3, 3]
  assert checked[:2] == plain[:2]


def simple(flip: int | None):
  """A step of a state of two arrays, donated, that in the computation of number `flip` gets one bit of one wrong."""
  calls = []
  @functools.partial(jax.jit, donate_argnums=0)
  def computed(state, batch):
    model = {'fixed': state.model['fixed'], 'w': state.model['w'] + batch}
    return TrainState(state.step + 1, model, None), {'loss': batch.sum()}
  def step_function(state, loss, batch):
    state, metrics = computed(state, batch)
    calls.append(None)
    if len(calls) - 1 != flip: return state, metrics
    wrong = np.array(state.model['w'])
    wrong.view(np.uint32)[2] ^= 1
    return state.replace(model=state.model | {'w': jnp.asarray(wrong)}), metrics
  return step_function


def start():
  return TrainState(jnp.int32(6), {'fixed': jnp.ones(2), 'w': jnp.arange(4.0)}, None)


@pytest.mark.parametrize('flip', [0, 1])
def test_a_bit_that_flips_in_one_of_two_computations_is_noticed_and_the_state_before_saved(flip):
  memory = Memory()
  with pytest.raises(DeviceFault, match='step 7, computed twice, gave another state/model/w the second') as error:
    twice(simple(flip), memory.save, start(), None, jnp.ones(4))
  assert '\n' not in str(error.value) and memory.steps() == [6]
  kept = memory.kept[6]
  assert int(kept.step) == 6 and kept.model['w'].tolist() == [0, 1, 2, 3]


def test_without_a_flip_the_second_result_is_returned_and_nothing_saved():
  state, metrics = twice(simple(None), None, start(), None, jnp.ones(4))
  assert int(state.step) == 7 and state.model['w'].tolist() == [1, 2, 3, 4] and float(metrics['loss']) == 4


def test_a_training_ends_there():
  """Of the loop, in its fourth step."""
  calls = simple(5)   # steps 1, 2, 2, 3, 4, 4: the last computation
  memory = Memory()
  callbacks = trainer.Callbacks(lambda *_: None, None, memory.save, lambda *_: None)
  training = Training(steps=9, batch_size=8, sequence_length=8, log_every=100, replay_every=2)
  def counted(state, *more):
    state, metrics = calls(state, *more)
    return state, metrics | {'layers': []}
  with pytest.MonkeyPatch.context() as patch, pytest.raises(DeviceFault, match='step 4, computed twice'):
    patch.setattr(trainer, 'compiled_step', lambda *_: counted)
    learner = type('Learner', (), {'loss': None})
    trainer.fit(start().replace(step=jnp.int32(0)), learner, lambda step: jnp.ones(4), training, callbacks)
  assert memory.steps() == [3] and memory.kept[3].model['w'].tolist() == [3, 4, 5, 6]
