"""What is saved comes back bit for bit, on any mesh; what does not fit is refused by name."""
import dataclasses
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from efficient_lm.errors import CheckpointError, ConfigError, NonFinite
from efficient_lm.runs.checkpoint import Checkpoints, lock
from efficient_lm.runs.record import commit_record
from efficient_lm.weights.weight import Dense, Frozen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  step: Any
  model: Any
  opt_state: Any


class Model(nnx.Module):
  def __init__(self, key, dim=16):
    self.weight = Dense(jax.random.normal(key, (dim, dim)), 'DF', 'D')
    self.layers = nnx.List([Dense(jax.random.normal(key, (dim, 4)).astype(jnp.bfloat16), 'DF', 'D')])
    self.mask = Frozen(jnp.arange(dim) % 2 == 0)
    self.codes = Frozen(jnp.arange(-8, 8, dtype=jnp.int8))


def state(seed=0, dim=16):
  model = Model(jax.random.key(seed), dim)
  return State(jnp.int32(seed), model, jax.tree.map(lambda a: a.astype(jnp.float32) * 2, nnx.state(model, nnx.Param)))


def abstract(tree, sharding=None):
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def same(a, b) -> bool:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
  return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@pytest.fixture
def checkpoints(tmp_path):
  opened = Checkpoints(tmp_path / 'checkpoints')
  yield opened
  opened.close()


def test_restore_is_the_inverse_of_save(checkpoints):
  checkpoints.save(3, state(3))
  restored = checkpoints.restore(abstract(state()))
  assert same(restored, state(3)) and isinstance(restored.model.weight, Dense)
  assert checkpoints.latest() == 3


def test_a_save_is_not_touched_by_what_happens_to_the_state_after_it(checkpoints):
  saved = state(1)
  expected = jax.tree.map(np.array, saved)
  checkpoints.save(1, saved)
  step = jax.jit(lambda tree: jax.tree.map(lambda a: ~a if a.dtype == bool else a + 1, tree), donate_argnums=0)
  for _ in range(3): saved = step(saved)
  assert same(checkpoints.restore(abstract(saved)), expected)


def test_the_model_is_restored_without_the_optimizer(checkpoints):
  checkpoints.save(2, state(2))
  assert same(checkpoints.restore_model(abstract(state().model)), state(2).model)


def test_no_checkpoint_is_none_for_latest_and_an_error_for_restore(checkpoints):
  assert checkpoints.latest() is None and checkpoints.steps() == []
  with pytest.raises(CheckpointError, match='no checkpoint'): checkpoints.restore(abstract(state()))
  assert not checkpoints.folder.exists()   # looking makes nothing


def test_the_newest_two_steps_stay(checkpoints):
  for step in (1, 2, 3): checkpoints.save(step, state(step))
  checkpoints.wait()
  assert checkpoints.steps() == [2, 3]
  assert same(checkpoints.restore(abstract(state()), 2), state(2))
  with pytest.raises(CheckpointError, match='no step 1'): checkpoints.restore(abstract(state()), 1)


def test_an_old_step_is_deleted_only_after_the_new_one_is_committed(tmp_path, monkeypatch):
  checkpoints, deleted = Checkpoints(tmp_path, keep=1), []
  def delete(path, **options):
    if path.name.isdecimal(): deleted.append((int(path.name), checkpoints.steps()))
    remove(path, **options)
  remove = shutil.rmtree
  monkeypatch.setattr('efficient_lm.system.workdir.shutil.rmtree', delete)
  for step in (1, 2, 3): checkpoints.save(step, state(step))
  checkpoints.close()
  assert deleted == [(1, [1, 2]), (2, [2, 3])] and checkpoints.steps() == [3]


def test_saving_the_same_state_again_writes_nothing(checkpoints):
  checkpoints.save(1, state(1), wait=True)
  before = (checkpoints.folder / '1').stat().st_ino
  checkpoints.save(1, state(1), wait=True)
  assert (checkpoints.folder / '1').stat().st_ino == before
  checkpoints.save(1, state(7), wait=True)
  assert same(checkpoints.restore(abstract(state())), state(7))


@pytest.mark.skipif(jax.device_count() < 8, reason='needs 8 devices (tests/conftest.py asks for virtual ones)')
def test_a_state_moves_from_eight_devices_to_four_to_one(checkpoints):
  def on(num_devices):
    mesh = jax.make_mesh((num_devices,), ('fsdp',), devices=jax.devices()[:num_devices])
    def placed(leaf):
      spec = PartitionSpec('fsdp') if leaf.ndim and leaf.shape[0] % num_devices == 0 else PartitionSpec()
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
    return jax.tree.map(placed, abstract(state()))
  moved = jax.tree.map(lambda leaf, to: jax.device_put(leaf, to.sharding), state(5), on(8))
  for step, num_devices in enumerate((4, 1, 8)):
    checkpoints.save(step, moved)
    moved = checkpoints.restore(on(num_devices))
    assert moved.model.weight.materialize().sharding.num_devices == num_devices
    assert same(moved, state(5))


def test_another_dtype_is_refused_not_cast(checkpoints):
  checkpoints.save(1, state(1))
  wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), abstract(state()))
  with pytest.raises(CheckpointError, match=r'model/codes/value is int8\(16,\) there, float32\(16,\) here'):
    checkpoints.restore(wanted)


def test_a_refusal_names_the_first_five_differing_paths_in_one_line(checkpoints):
  checkpoints.save(1, {f'a{i}': jnp.zeros(3) for i in range(9)})
  wanted = {f'b{i}': jax.ShapeDtypeStruct((3,), 'float32') for i in range(2)}
  with pytest.raises(CheckpointError) as refusal: checkpoints.restore(wanted)
  text = str(refusal.value)
  assert [f'a{i} is float32(3,) there, absent here' in text for i in range(9)] == [True] * 5 + [False] * 4
  assert text.endswith('and 6 more') and '\n' not in text


def test_another_shape_is_refused(checkpoints):
  checkpoints.save(1, state(1))
  with pytest.raises(CheckpointError, match=r'weight/array/value is float32\(16, 16\) there, float32\(32, 32\) here'):
    checkpoints.restore_model(abstract(state(dim=32).model))


def test_a_non_finite_state_is_refused_and_the_last_finite_one_stays(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(1, state(1))
  for value in (jnp.nan, jnp.inf):
    poisoned = state(2)
    poisoned.model.weight.array.set_value(poisoned.model.weight.materialize().at[3, 3].set(value))
    with pytest.raises(NonFinite, match='model/weight/array/value'): checkpoints.save(2, poisoned)
  assert checkpoints.steps() == [1] and same(checkpoints.restore(abstract(state())), state(1))
  checkpoints.close()


def test_a_second_holder_of_a_workdir_is_told_who_has_it(tmp_path):
  with lock(tmp_path):
    with pytest.raises(ConfigError, match=r'workdir = .*process') as refusal:
      with lock(tmp_path): pass
    assert '\n' not in str(refusal.value)
  with lock(tmp_path): pass   # free again, and the file left behind holds nothing


@pytest.mark.parametrize('error', [
  RuntimeError('a bug'), MemoryError(), NotImplementedError('not for this backend'),
  ValueError('Received incompatible devices for jitted computation'), ValueError('RESOURCE_EXHAUSTED: Out of memory')],
  ids=lambda error: str(error)[:20])
def test_what_is_no_fault_of_the_files_is_never_called_corruption(checkpoints, monkeypatch, error):
  """A user who is told of corruption moves good files away."""
  checkpoints.save(1, state(1), wait=True)
  def fails(*arguments, **words): raise error
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints._orbax, 'restore', fails)
    with pytest.raises(type(error)): checkpoints.restore(abstract(state()))
  checkpoints.save(2, state(2), wait=True)
  assert checkpoints.steps() == [1, 2] and not list(checkpoints.folder.glob('*.corrupt'))
  assert same(checkpoints.restore(abstract(state()), 1), state(1))


def test_a_record_is_committed_with_the_arrays_also_where_those_have_not_changed(checkpoints):
  checkpoints.save(1, state(1), wait=True, record={'name': 'first'})
  assert commit_record(checkpoints.folder) == {'name': 'first'}
  checkpoints.save(1, state(1), wait=True, record={'name': 'second'})
  assert commit_record(checkpoints.folder) == {'name': 'second'} and same(checkpoints.restore(abstract(state())), state(1))


def test_a_leaf_that_had_another_name_in_earlier_versions_is_found(checkpoints):
  checkpoints.save(1, {'model': {'clock': jnp.int32(3), 'weight': jnp.ones(2)}}, wait=True)
  found = checkpoints.restore(abstract({'model': {'counter': jnp.int32(0), 'weight': jnp.ones(2)}}))
  assert int(found['model']['counter']) == 3
