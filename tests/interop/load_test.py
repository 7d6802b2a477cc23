"""Filling a model: dtypes, shards on a mesh, and what is said of tensors that do not fit."""
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from efficient_lm.config.mesh import Mesh
from efficient_lm.errors import CheckpointError
from efficient_lm.interop import families, folder, load
from efficient_lm.interop.checkpoint import Checkpoint, Tensor
from efficient_lm.tree import path_name

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'


def checkpoint(name: str, change=None) -> tuple:
  """The description of a fixture, and its checkpoint with `change` made to its arrays in memory."""
  found = folder.read(str(FIXTURES / name))
  if change is not None:
    arrays = {name: tensor.read() for name, tensor in found.tensors.items()}
    change(arrays)
    found = Checkpoint(found.config, {name: Tensor.of(array) for name, array in arrays.items()}, found.where)
  return families.spec_of(found.config), found


def leaves(tree) -> dict:
  return {path_name(path).removesuffix('/value'): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_arrays_stay_in_the_dtype_that_they_are_stored_in_and_are_what_abstract_says():
  for name, stored in (('llama', np.float32), ('smollm', ml_dtypes.bfloat16), ('opt', np.float16)):
    model = leaves(load.load(*checkpoint(name)))
    assert {leaf.dtype for leaf in model.values()} == {np.dtype(stored)}
    shapes = leaves(load.abstract(*checkpoint(name)))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in shapes.items()} == {
      path: (leaf.shape, leaf.dtype) for path, leaf in model.items()}
  wide = leaves(load.load(*checkpoint('smollm'), dtype='float32'))
  narrow = leaves(load.load(*checkpoint('smollm')))
  for path, leaf in wide.items(): np.testing.assert_array_equal(leaf, narrow[path].astype(jnp.float32))


def test_one_plus_a_norm_is_kept_in_float32():
  spec, found = checkpoint('gemma2')
  model = leaves(load.load(spec, found))
  stored = found.tensors['model.norm.weight'].read()
  assert {path for path in model if model[path].dtype == np.float32} == {path for path in model if path.endswith('/scale')}
  np.testing.assert_array_equal(model['norm/scale'], np.float32(1) + stored.astype(np.float32))


def test_layers_of_two_dtypes_meet_in_float32():
  def change(arrays):
    name = 'model.layers.1.mlp.up_proj.weight'
    arrays[name] = arrays[name].astype(np.float32)
  model = leaves(load.load(*checkpoint('smollm', change)))
  assert model['stacks/0/blocks/mlp/up/array'].dtype == np.float32
  assert model['stacks/0/blocks/mlp/gate/array'].dtype == ml_dtypes.bfloat16


MIXTURES = 'mixtral', 'olmoe', 'qwen2_moe', 'qwen3_moe', 'deepseek_v3'
FAMILIES = 'smollm', *MIXTURES, *sorted(
  {path.parent.name for path in FIXTURES.glob('*/config.json')} - {'smollm', *MIXTURES, 'deepseek_v3_fp8'})


@pytest.mark.thinned
@pytest.mark.parametrize('name', FAMILIES)
def test_a_model_on_eight_devices_is_the_same_and_computes_what_transformers_computes(name, monkeypatch):
  """Each shard is made by itself: no part of an array is read more often than there are different shards of it."""
  if jax.device_count() != 8: pytest.skip('needs eight devices: run the tests on CPU')
  spec, found = checkpoint(name)
  read, largest = load.Source.read, []
  monkeypatch.setattr(load.Source, 'read', lambda *args: largest.append((args[1], out := read(*args))) or out)
  sizes = dict(expert=4, fsdp=2) if name in MIXTURES else dict(fsdp=4, tensor=2)
  spec, mesh = dataclasses.replace(spec, dtype='float32'), Mesh(**sizes).build()
  over = load.load(spec, found, mesh)
  whole = leaves(load.load(spec, found))
  split = [path for path, leaf in leaves(over).items() if not leaf.is_fully_replicated]
  assert len(split) > len(whole) / 2
  for path, leaf in leaves(over).items(): np.testing.assert_array_equal(leaf, whole[path])
  assert sum(out.nbytes for _, out in largest) == 2 * sum(leaf.nbytes for leaf in whole.values())   # of both models
  expected = np.load(FIXTURES / name / 'expected.npz')
  tokens_BT = np.repeat(expected['tokens_BT'], 8, 0)
  with jax.set_mesh(mesh): got = jax.jit(lambda model, tokens_BT: model(tokens_BT).logits_BTV)(over, tokens_BT)
  distance = np.linalg.norm(got[3] - expected['whole_BTV'][0]) / np.linalg.norm(expected['whole_BTV'])
  assert distance < 1e-5   # as in families_test


# ------------------------------------------------------------------ what does not fit

def refusal(name: str, change) -> str:
  with pytest.raises(CheckpointError) as caught: load.load(*checkpoint(name, change))
  assert '\n' not in str(caught.value) and str(FIXTURES / name) in str(caught.value)
  return str(caught.value)


def test_tensors_that_are_missing_are_named_five_at_most():
  def change(arrays):
    for name in [name for name in arrays if 'mlp' in name]: del arrays[name]
  line = refusal('llama', change)
  assert 'is without model.layers.0.mlp.gate_proj.weight' in line and line.endswith('and 1 more')
  assert 'too few' in refusal('llama', lambda arrays: [arrays.pop(name) for name in list(arrays)[1:]])


def test_tensors_without_a_place_are_named():
  line = refusal('llama', lambda arrays: arrays.update({'model.layers.0.self_attn.q_proj.bias': np.zeros(32, np.float32)}))
  assert 'has no place for: model.layers.0.self_attn.q_proj.bias' in line


def test_tensors_of_another_shape_are_named_with_both():
  def change(arrays): arrays['model.norm.weight'] = np.ones(33, np.float32)
  assert 'model.norm.weight is (33,) and should be (32,)' in refusal('llama', change)
  def transposed(arrays): arrays['lm_head.weight'] = arrays['lm_head.weight'].T
  assert 'lm_head.weight is (32, 48) and should be (48, 32)' in refusal('llama', transposed)


def test_numbers_of_other_kinds_are_refused():
  def change(arrays): arrays['model.norm.weight'] = np.ones(32, ml_dtypes.float8_e4m3fn)
  assert 'model.norm.weight is float8_e4m3fn' in refusal('llama', change)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding():
  copied = lambda arrays: arrays.update({'lm_head.weight': arrays['model.embed_tokens.weight'].copy()})
  other = lambda arrays: arrays.update({'lm_head.weight': arrays['model.embed_tokens.weight'][::-1]})
  assert 'own_head/array' not in leaves(load.load(*checkpoint('smollm', copied)))
  assert 'is not the embedding' in refusal('smollm', other)


def test_what_other_writers_add_or_leave_out_is_understood():
  """Masks and rotary tables as buffers, names without the prefix, and DeepSeek's layer for multi-token prediction."""
  def old(arrays):
    for name in list(arrays): arrays[name.removeprefix('transformer.')] = arrays.pop(name)
    arrays['h.0.attn.bias'] = np.tri(8)[None, None]
  plain, older = (leaves(load.load(*checkpoint('gpt2', change))) for change in (None, old))
  for path, leaf in plain.items(): np.testing.assert_array_equal(leaf, older[path])
  more = lambda name: lambda arrays: arrays.update({name: np.ones(4)})
  load.abstract(*checkpoint('llama', more('model.layers.0.self_attn.rotary_emb.inv_freq')))
  load.abstract(*checkpoint('deepseek_v3', more('model.layers.2.enorm.weight')))
  assert 'model.layers.3.enorm.weight' in refusal('deepseek_v3', more('model.layers.3.enorm.weight'))
