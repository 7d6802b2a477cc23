"""A checkpoint that was converted to GGUF comes back: the same description, the same tensors bit for bit."""
import dataclasses

import numpy as np
import pytest

from efficient_lm.errors import IncompatibleError
from efficient_lm.interop import families
from efficient_lm.interop.gguf import names, reader
from tests.interop.gguf import writing
from tests.interop.gguf.checkpoints import stored
from tests.interop.gguf.converting import convert
from tests.interop.gguf.models import LLAMA, N, small


def opened(tmp_path, metadata: dict, tensors: dict):
  path = tmp_path / 'model.gguf'
  path.write_bytes(writing.file(metadata, tensors))
  return names.checkpoint(reader.read(path))


@pytest.mark.parametrize('name', ['llama', 'smollm', 'llama3', 'llama_linear', 'qwen2', 'qwen3', 'qwen2_moe', 'qwen3_moe',
                                  'olmoe', 'olmo2', 'mixtral', 'gemma2', 'gemma3_text', 'gpt2'])
def test_what_was_converted_comes_back(tmp_path, name):
  config, tensors = stored(name)
  found = opened(tmp_path, *convert(config, tensors))
  wanted = dataclasses.replace(families.spec_of(config), dtype='float32')
  assert families.spec_of(found.config) == wanted
  assert set(found.tensors) == set(tensors)
  for key, array in tensors.items():
    tensor = found.tensors[key]
    read = tensor.read()
    assert tensor.shape == read.shape and tensor.dtype == read.dtype
    if name.startswith('gemma') and 'norm' in key:
      # 1 + w is what is stored and what is computed with; w comes back but for the rounding of that sum.
      np.testing.assert_array_equal(read + np.float32(1), array + np.float32(1))
    else: np.testing.assert_array_equal(read, array)


def test_rows_of_quantized_queries_are_ordered_as_their_numbers_are(tmp_path):
  """Llama's rows move whole, so that a block keeps its numbers."""
  metadata, tensors = small(LLAMA)
  raw = np.random.default_rng(0).integers(0, 64, (16, 34)).astype(np.uint8)
  wide = {**metadata, 'llama.embedding_length': 32}
  for key, array in tensors.items():
    if key.endswith(('attn_output.weight', 'ffn_down.weight')): tensors[key] = np.tile(array, (2, 1))
    elif array.ndim == 2: tensors[key] = np.tile(array, 2)
    else: tensors[key] = np.tile(array, 2)
  tensors['blk.0.attn_q.weight'] = ('Q8_0', (16, 32), raw.tobytes())
  found = opened(tmp_path, wide, tensors).tensors['model.layers.0.self_attn.q_proj.weight'].read()
  numbers = reader.read(tmp_path / 'model.gguf').numbers('blk.0.attn_q.weight')
  # Heads of 4 rows: 0 and 1 are rotated together there, 0 and 2 here.
  np.testing.assert_array_equal(found, numbers[[4 * n + i for n in range(N) for i in (0, 2, 1, 3)]])


@pytest.mark.parametrize('name', ['token_embd.weight', 'blk.0.attn_q.weight', 'blk.0.ffn_up.weight'])
def test_a_tensor_that_sizes_are_read_from_is_missed(tmp_path, name):
  metadata, tensors = small(LLAMA)
  del tensors[name]
  with pytest.raises(IncompatibleError, match=name): opened(tmp_path, metadata, tensors)


@pytest.mark.parametrize('name', [
  'blk.0.attn_sinks.weight', 'mm.0.weight', 'blk.1.ffn_up.scale', 'blk.01.attn_q.bias', 'output'])
def test_a_tensor_without_a_place_is_refused(tmp_path, name):
  metadata, tensors = small(LLAMA)
  with pytest.raises(IncompatibleError, match=r'no place for the tensor|layers, not block_count'):
    opened(tmp_path, metadata, {**tensors, name: np.zeros(4, np.float32)})


def test_a_head_of_its_own_is_used_though_the_model_may_be_tied(tmp_path):
  """It may be quantized otherwise than the embedding."""
  metadata, tensors = small(LLAMA)
  assert opened(tmp_path, metadata, tensors).config['tie_word_embeddings']
  tensors['output.weight'] = tensors['token_embd.weight']
  found = opened(tmp_path, metadata, tensors)
  assert not found.config['tie_word_embeddings'] and 'lm_head.weight' in found.tensors
