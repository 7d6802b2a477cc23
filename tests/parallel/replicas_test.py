"""Hashes of arrays: the same on any mesh, another for any change of one element, and copies that differ are noticed."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from efficient_lm.errors import DeviceFault
from efficient_lm.parallel.replicas import digest, digests

DTYPES = ['float32', 'bfloat16', 'float8_e4m3fn', 'int32', 'int8', 'int4', 'uint8', 'bool']
eight_devices = pytest.mark.skipif(jax.device_count() != 8, reason='needs eight devices: run the tests on CPU')


def mesh_of(*sizes):
  types = (jax.sharding.AxisType.Auto,) * len(sizes)
  return jax.make_mesh(sizes, ('a', 'b', 'c')[:len(sizes)], axis_types=types)


def numbers(shape, dtype):
  drawn = np.random.default_rng(0).integers(0, 2 if dtype == 'bool' else 7, shape)
  return jnp.asarray(drawn).astype(dtype)


SPECS = [PartitionSpec(), PartitionSpec('a'), PartitionSpec(None, 'b'), PartitionSpec('b', 'a'), PartitionSpec(('a', 'c')),
         PartitionSpec(('c', 'b'), 'a'), PartitionSpec(None, ('b', 'a', 'c')), PartitionSpec('c', None, 'b')]


@eight_devices
@pytest.mark.parametrize('spec', SPECS, ids=str)
@pytest.mark.parametrize('dtype', ['float32', 'int8'])
def test_a_digest_does_not_depend_on_how_an_array_is_cut(spec, dtype):
  array = numbers((8, 16, 2), dtype)
  split = jax.device_put(array, NamedSharding(mesh_of(2, 2, 2), spec))
  wanted = digest(np.asarray(array)).tolist()
  assert digest(split).tolist() == wanted and digests({'x': split, 'y': array}) == {'x': (*wanted,), 'y': (*wanted,)}


@eight_devices
def test_of_numbers_in_64_bits_and_of_single_ones():
  one = jax.device_put(jnp.float32(3), NamedSharding(mesh_of(8), PartitionSpec()))
  assert digests({'x': one})['x'] == (*digest(jnp.float32(3)).tolist(),)
  with jax.enable_x64(True):
    array = jnp.arange(16, dtype='int64') << 33
    split = jax.device_put(array, NamedSharding(mesh_of(8), PartitionSpec('a')))
    assert digests({'x': split})['x'] == (*digest(array).tolist(),) != digests({'x': array + 1})['x']


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_digest_sees_every_change_of_one_element(dtype):
  array = np.asarray(numbers((2, 4), dtype))
  seen = {digest(jnp.asarray(array)).tolist()[0]}
  for i in np.ndindex(array.shape):
    changed = array.copy()
    changed[i] = ~array[i] if dtype == 'bool' else array[i] + 1
    seen.add(digest(jnp.asarray(changed)).tolist()[0])
  assert len(seen) == 9
  other = (np.arange(8).reshape(2, 4) % (2 if dtype == 'bool' else 8)).astype(dtype)
  assert digest(other).tolist()[0] != digest(other.T.copy()).tolist()[0]   # the same numbers in other places


def test_a_number_that_is_not_finite_is_said_wherever_it_lies():
  split = jax.device_put(jnp.zeros(8).at[5].set(jnp.inf), NamedSharding(mesh_of(jax.device_count()), PartitionSpec('a')))
  assert [digests({'x': x})['x'][1] for x in (split, jnp.zeros(3), jnp.array([jnp.nan]))] == [False, True, False]


def corrupted(array, device: int, index, bit: int):
  """The array with one bit of one element of one device's piece flipped: of no other copy."""
  pieces = []
  for shard in array.addressable_shards:
    piece = np.array(shard.data)
    if shard.device.id == device: piece.view(np.uint32)[index] ^= np.uint32(1 << bit)
    pieces.append(jax.device_put(piece, shard.device))
  return jax.make_array_from_single_device_arrays(array.shape, array.sharding, pieces)


@eight_devices
@given(device=st.integers(0, 7), row=st.integers(0, 3), column=st.integers(0, 1), bit=st.integers(0, 31))
@settings(max_examples=30, deadline=None)
def test_one_flipped_bit_of_one_copy_is_noticed_and_its_device_named(device, row, column, bit):
  """Four copies of each of two parts. A NaN in some copy is a difference, too."""
  sharding = NamedSharding(mesh_of(4, 2), PartitionSpec(None, 'b'))
  whole = jax.device_put(np.arange(16, dtype=np.float32).reshape(4, 4), sharding)
  bad = corrupted(whole, device, (row, column), bit)
  with pytest.raises(DeviceFault) as error: digests({'good': whole, 'model/bad': bad, 'worse': bad})
  text = str(error.value)
  assert '\n' not in text and text.startswith('copies of model/bad on several devices are not equal')
  odd, others = re.findall(r': ((?:device \d+.*)) differs from (.*); take', text)[0]
  holders = {shard.device.id for shard in whole.addressable_shards if shard.index == next(
    one.index for one in whole.addressable_shards if one.device.id == device)}
  assert odd == f'device {device} (process 0)'
  assert {int(number) for number in re.findall(r'device (\d+)', others)} == holders - {device}


@eight_devices
def test_parts_that_no_other_device_holds_may_differ():
  split = jax.device_put(np.arange(8, dtype=np.float32), NamedSharding(mesh_of(8), PartitionSpec('a')))
  before, after = (digests({'x': array})['x'][0] for array in (split, corrupted(split, 3, 0, 7)))
  assert before != after
