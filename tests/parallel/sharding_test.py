"""Letters decide where an array lies on a mesh."""
import hashlib
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from efficient_lm import axes
from efficient_lm.data.packing import Rows, Stream
from efficient_lm.data.pipeline import Batches
from efficient_lm.parallel import sharding

letters = st.lists(st.sampled_from('DRVNKFEH'), unique=True, max_size=4).map(''.join)


def fake_mesh(**sizes):
  """All that `weight_spec` looks at."""
  return types.SimpleNamespace(shape={name: sizes.get(name, 1) for name in axes.MESH})


@given(letters, st.data(), st.integers(0, 2))
def test_weight_spec_splits_only_what_divides_and_uses_each_mesh_axis_once(name, data, num_stacked):
  mesh = fake_mesh(**{axis: data.draw(st.integers(1, 4)) for axis in axes.MESH})
  shape = (4,) * num_stacked + tuple(data.draw(st.integers(1, 12)) for _ in name)
  spec = sharding.weight_spec(name, shape, mesh)
  used = [axis for axis in spec if axis]
  assert len(spec) == len(shape) and len(used) == len(set(used))
  assert all(axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(spec, shape, strict=True))
  assert set(spec[:num_stacked]) <= {None}, 'a stack of layers is never split'
  assert all(axis in (None, axes.WEIGHT.get(letter)) for axis, letter in zip(spec[num_stacked:], name, strict=True))
  if len(name) < 2: assert not used, 'vectors are replicated'


@pytest.mark.parametrize('name, shape, expected', [
  ('DF', (8, 12), P('fsdp', 'tensor')),
  ('DF', (3, 8, 12), P(None, 'fsdp', 'tensor')),
  ('DNH', (8, 4, 6), P('fsdp', 'tensor', None)),
  ('DKH', (8, 1, 6), P('fsdp', None, None)),         # one kv head cannot be shared out
  ('EDF', (4, 8, 12), P('expert', 'fsdp', 'tensor')),
  ('DE', (8, 4), P('fsdp', None)),                   # routers: every device routes to all experts
  ('VD', (10, 8), P('tensor', 'fsdp')),
  ('D', (8,), P(None)),
])
def test_weight_spec_of_the_weights_there_are(name, shape, expected):
  assert sharding.weight_spec(name, shape, fake_mesh(fsdp=2, expert=2, tensor=2)) == expected


def test_shardings_follow_each_variables_axes_and_replicate_the_rest(mesh):
  tree = {'matrix': nnx.Param(jnp.zeros((8, 12)), axes='DF'), 'scale': nnx.Param(jnp.zeros(8), axes='D'),
          'unnamed': nnx.Param(jnp.zeros((8, 8))), 'count': jnp.zeros((8, 8))}
  with mesh(1, 4, 1, 2): found = sharding.shardings(tree, jax.sharding.get_mesh())
  specs = {name: jax.tree.leaves(node)[0].spec for name, node in found.items()}
  assert specs['matrix'] == P('fsdp', 'tensor')
  assert all(specs[name] in (P(), P(None), P(None, None)) for name in ('scale', 'unnamed', 'count'))


def test_constrain_without_a_mesh_is_the_identity():
  x = jnp.ones((8, 4))
  assert sharding.constrain(x, 'BD') is x


def test_constrain_moves_data_and_changes_no_value(mesh):
  x = jnp.arange(64.0).reshape(8, 8)
  with mesh(2, 2, 1, 2):
    y = jax.jit(lambda x: sharding.constrain(x, 'BF'))(x)
  np.testing.assert_array_equal(x, y)
  assert y.sharding.shard_shape(y.shape) == (2, 4)


@pytest.mark.parametrize(('rows', 'shard'), [(16, (4, 4)), (6, (6, 8))])
def test_by_shard_gives_each_device_its_own_part_or_leaves_the_cutting_to_the_compiler(mesh, rows, shard):
  seen = []
  def double(x_BF):
    seen.append(x_BF.shape)
    return {'twice': 2 * x_BF}
  x = jnp.arange(rows * 8.0).reshape(rows, 8)
  with mesh(2, 2, 1, 2): y = jax.jit(sharding.by_shard(double, ('BF',), {'twice': 'BF'}))(x)['twice']
  np.testing.assert_array_equal(y, 2 * x)
  assert seen == [shard]
  assert sharding.by_shard(double, ('BF',), {'twice': 'BF'})(x)['twice'].shape == seen[1] == x.shape   # no mesh


def test_wait_on_cpu_waits_on_virtual_devices_and_changes_nothing():
  tree = {'a': jax.jit(lambda x: x + 1)(jnp.arange(3.0))}
  assert sharding.wait_on_cpu(tree) is tree
  assert all(leaf.is_ready() for leaf in jax.tree.leaves(tree)) or jax.device_count() == 1


# ---------------------------------------------------------------- batches of several processes

def devices_of(sizes, owners):
  """A mesh of these sizes whose devices belong to the processes `owners`, in their order. All that `place` looks at."""
  devices = np.array([types.SimpleNamespace(process_index=int(owner)) for owner in owners], object).reshape(sizes)
  return types.SimpleNamespace(shape=dict(zip(axes.MESH, sizes)), axis_names=axes.MESH, devices=devices)


def rows_on_devices(mesh, process, batch_of, monkeypatch):
  """{place of a device in the mesh: its rows} as process `process` places its part, batch_of(part, parts), of a batch."""
  def make(shape, _, rows):
    found = {}
    for at, device in np.ndenumerate(mesh.devices):
      if device.process_index != process: continue
      shards = math.prod(mesh.shape[name] for name in axes.BATCH)
      shard = np.ravel_multi_index(at[:3], [mesh.shape[name] for name in axes.BATCH])
      size = shape[0] // shards
      found[at] = rows((slice(int(shard * size), int(shard * size + size)) if shards > 1 else slice(None),
                        *[slice(None)] * (len(shape) - 1)))
    return found
  monkeypatch.setattr(sharding, 'NamedSharding', lambda *words: None)
  monkeypatch.setattr(jax, 'process_index', lambda: process)
  monkeypatch.setattr(jax, 'make_array_from_callback', make)
  return sharding.place({'rows': batch_of(*sharding.part_here(mesh))}, mesh)['rows']


@pytest.mark.parametrize('sizes', [(8, 1, 1, 1), (1, 4, 1, 2), (2, 1, 2, 2), (1, 1, 1, 8), (2, 2, 2, 1), (1, 2, 1, 4)])
@settings(max_examples=12, deadline=None)
@given(num_processes=st.sampled_from([1, 2, 4, 8]), order=st.permutations(range(8)), wound=st.booleans(),
       seed=st.integers(0, 99), step=st.integers(0, 99))
def test_global_batches_are_those_of_one_process_however_devices_are_owned(sizes, num_processes, order, wound, seed, step):
  """Every device has the rows that it has in a run of one process, whatever the mesh, and in whatever order the devices of
  the processes lie in it; so the hash of the global batch is the same."""
  owners = np.arange(8) // (8 // num_processes)
  mesh = devices_of(sizes, owners[list(order)] if wound else owners)
  tokens = np.arange(4 * 40 + 1)
  rows = Rows(Stream(tokens, np.array([0]), np.ones(len(tokens), np.int32)), 4)
  batch_of = lambda part, parts: Batches(rows, batch_size=16, seed=seed, process_index=part,
                                         process_count=parts)[step]['inputs_BT']
  whole = batch_of(0, 1)
  with pytest.MonkeyPatch.context() as patch:
    found = {}
    for process in range(num_processes): found |= rows_on_devices(mesh, process, batch_of, patch)
  assert len(found) == 8
  shards = math.prod(sizes[:3])
  together = [next(found[at] for at in found if np.ravel_multi_index(at[:3], sizes[:3]) == shard) for shard in range(shards)]
  assert hashlib.sha256(np.concatenate(together)).digest() == hashlib.sha256(whole).digest()
  for at, rows_here in found.items():   # copies along 'tensor' are alike
    np.testing.assert_array_equal(rows_here, together[np.ravel_multi_index(at[:3], sizes[:3])])


@pytest.mark.parametrize(('sizes', 'parts'), [
  ((8, 1, 1, 1), [(0, 2), (1, 2)]), ((1, 1, 1, 8), [(0, 1), (0, 1)]), ((1, 4, 1, 2), [(0, 2), (1, 2)]),
  ((1, 2, 1, 4), [(0, 2), (1, 2)])])
def test_a_process_reads_no_more_than_its_devices_need(sizes, parts):
  mesh = devices_of(sizes, np.arange(8) // 4)
  assert [sharding.part_here(mesh, process) for process in range(2)] == parts
  apart = devices_of((8, 1, 1, 1), np.arange(8) % 2)   # every other device: no part of a batch
  assert [sharding.part_here(apart, process) for process in range(2)] == [(0, 1), (0, 1)]


def test_place_puts_a_batch_on_eight_devices_as_it_is(mesh):
  batch = {'rows': np.arange(32).reshape(16, 2)}
  for sizes in ((8, 1, 1, 1), (2, 1, 2, 2), (1, 1, 1, 8)):
    with mesh(*sizes): placed = sharding.place(batch, jax.sharding.get_mesh())['rows']
    np.testing.assert_array_equal(placed, batch['rows'])
    assert placed.sharding.spec == P(axes.BATCH)
