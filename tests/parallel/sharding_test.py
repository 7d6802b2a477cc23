"""Letters decide where an array lies on a mesh."""
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from efficient_lm import axes
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
