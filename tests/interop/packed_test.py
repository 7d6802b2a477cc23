"""A model that keeps what a file stores computes what it computes dequantized, in the memory of the file."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import fields
from efficient_lm.formats import MXFP4, Affine, Group, Int
from efficient_lm.interop.gguf import reader
from efficient_lm.interop.gguf.source import Gguf
from efficient_lm.interop.gguf.writer import GgufFile
from efficient_lm.interop.written import Stored, Written
from efficient_lm.parallel import sharding
from efficient_lm.tree import select
from efficient_lm.weights.quantized import Quantized
from tests.interop.gguf.checkpoints import drawn, for_engines

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
HALF = dict(scales=Group(size=32), scale_dtype='float16')


def written(path, name: str, format) -> str:
  """A fixture, every matrix whose inputs are a multiple of 32 in `format`."""
  config, tensors = for_engines(name)
  fits = lambda key, w: w.ndim == 2 and w.shape[1] % 32 == 0 and 'router' not in key and '.gate.weight' not in key
  tensors = {key: drawn(w.shape, format, seed=i) if fits(key, w) else w for i, (key, w) in enumerate(tensors.items())}
  GgufFile().save(Written(config, tensors), None, path / 'model.gguf')
  assert any(isinstance(one, Stored) for one in tensors.values())
  return str(path)


def kinds(tree):
  return [(jax.tree_util.keystr(path), leaf.shape, leaf.dtype) for path, leaf in jax.tree.leaves_with_path(tree)]


@pytest.mark.parametrize('name, format',
                         [('qwen2', Int(bits=4, **HALF)), ('smollm', Affine()), ('mixtral', MXFP4())], ids=str)
def test_weights_are_those_of_the_file_bit_for_bit(tmp_path, name, format):
  """Rows of queries and keys are moved, experts stand in one array, biases are beside; what is no matrix is as it was."""
  source = Gguf(path=written(tmp_path, name, format), packed=True)
  kept, floats = source.load(), dataclasses.replace(source, packed=False).load()
  assert kinds(kept) == kinds(source.abstract()) and jax.tree.structure(kept) == jax.tree.structure(source.abstract())
  weights = dict(select(kept, Quantized))
  assert {'embed', 'stacks/0/blocks/attention/output'} <= set(weights)
  dense = dict(select(floats, type(floats.embed)))
  for path, weight in weights.items(): np.testing.assert_array_equal(weight.materialize(), dense[path].materialize())
  stored = sum(entry.num_bytes for entry in reader.read(tmp_path / 'model.gguf').tensors.values())
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(kept)) == stored
  if name == 'mixtral': return   # what follows takes long to compile
  a, b = (jit(lambda model: model(jnp.arange(8)[None]).logits_BTV)(model) for model in (kept, floats))
  assert jnp.linalg.norm(a - b) < 1e-5 * jnp.linalg.norm(b)   # the same numbers, summed in another order


def assert_same_blocks(a, b):
  a, b = reader.read(a), reader.read(b)
  assert set(a.tensors) == set(b.tensors)
  for name in a.tensors:
    assert a.tensors[name].kind == b.tensors[name].kind
    np.testing.assert_array_equal(a.bytes_of(name), b.bytes_of(name), name)


@pytest.mark.parametrize('format', [Int(**HALF), Int(bits=4, **HALF), Affine(), MXFP4()], ids=str)
def test_what_was_read_as_stored_leaves_as_it_came_byte_for_byte(tmp_path, format):
  written(tmp_path, 'smollm', format)
  (tmp_path / 'again').mkdir()
  GgufFile().write(Gguf(path=str(tmp_path / 'model.gguf'), packed=True).load(), None, str(tmp_path / 'again'), 64)
  assert_same_blocks(tmp_path / 'model.gguf', tmp_path / 'again' / 'model.gguf')


def test_a_real_model_leaves_as_it_came_byte_for_byte(tmp_path, smollm2):
  source = Gguf(path=smollm2, packed=True)
  GgufFile().write(source.load(), source.tokenizer(), str(tmp_path), 64)
  assert_same_blocks(source.file.path, tmp_path / 'model.gguf')


def test_it_lies_on_a_mesh_as_other_quantized_weights_do(tmp_path):
  if jax.device_count() < 4: pytest.skip('needs 4 devices')
  source = Gguf(path=written(tmp_path, 'smollm', Int(bits=4, **HALF)), packed=True)
  types = (jax.sharding.AxisType.Auto,) * 4
  mesh = jax.make_mesh((1, 2, 1, 2), sharding.MESH, devices=jax.devices()[:4], axis_types=types)
  cut, whole = source.load(mesh), source.load()
  for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(whole), strict=True): np.testing.assert_array_equal(a, b)
  assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(cut))


def test_a_source_that_keeps_blocks_has_a_key_of_its_own_and_the_others_have_the_ones_they_had(tmp_path):
  source = Gguf(path=written(tmp_path, 'smollm', Int(**HALF)))
  kept = dataclasses.replace(source, packed=True)
  assert kept.key() != source.key() and kept.label == f'{source.label}, as stored'
  assert 'packed' not in fields.to_json(source) and fields.from_json(fields.to_json(kept)) == kept
