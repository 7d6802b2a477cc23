"""Models that are written are read back: floats bit for bit, and matrices in few bits as the numbers that they were."""
import dataclasses

import ml_dtypes
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.formats import MXFP4, Group, Int, Ternary
from efficient_lm.interop import families
from efficient_lm.interop.gguf import names, reader
from efficient_lm.interop.gguf.source import Gguf
from efficient_lm.interop.gguf.writer import GgufFile
from efficient_lm.interop.written import Stored, Written
from tests.interop.gguf.checkpoints import drawn, for_engines

EVERY = ['llama', 'smollm', 'llama3', 'llama_linear', 'qwen2', 'qwen3', 'qwen2_moe', 'qwen3_moe', 'olmoe', 'olmo2',
         'mixtral', 'gemma2', 'gemma3_text', 'gpt2']
HALF = dict(scale_dtype='float16')


def written(name: str, format=None) -> Written:
  """A fixture; its projections in `format`, if one is given."""
  config, tensors = for_engines(name)
  if format is None: return Written(config, tensors)
  by_outputs = {key: w.T if name == 'gpt2' and 'wte' not in key and 'wpe' not in key else w for key, w in tensors.items()}
  fits = lambda key, w: w.ndim == 2 and w.shape[1] % 32 == 0 and 'wpe' not in key
  return Written(config, {key: drawn(by_outputs[key].shape, format) if fits(key, by_outputs[key]) else w
                          for key, w in tensors.items()})


def read(path):
  return names.checkpoint(reader.read(path))


@pytest.mark.parametrize('name', EVERY)
def test_what_is_written_comes_back(tmp_path, name):
  model, path = written(name), tmp_path / 'model.gguf'
  assert GgufFile().save(model, None, path) == ()
  found = read(path)
  assert families.spec_of(found.config) == dataclasses.replace(families.spec_of(model.config), dtype='float32')
  assert set(found.tensors) == set(model.tensors)
  for key, array in model.tensors.items():
    # 1 + w is what files hold and models compute with; w comes back but for the rounding of that sum.
    plus = np.float32(1 if name.startswith('gemma') and 'norm' in key else 0)
    np.testing.assert_array_equal(found.tensors[key].read() + plus, array + plus)


@pytest.mark.parametrize('name, format, kind', [
  ('smollm', Int(**HALF), 'Q8_0'), ('qwen2', Int(bits=4, scales=Group(size=32), **HALF), 'Q4_0'),
  ('gpt2', Int(bits=4, scales=Group(size=32), **HALF), 'Q4_0'), ('gemma3_text', MXFP4(), 'MXFP4')])
def test_few_bits_come_back_number_for_number(tmp_path, name, format, kind):
  model, path = written(name, format), tmp_path / 'model.gguf'
  stored = {key for key, one in model.tensors.items() if isinstance(one, Stored)}
  assert GgufFile().save(model, None, path) == ()
  found, file = read(path), reader.read(path)
  assert sum(entry.kind == kind for entry in file.tensors.values()) == len(stored) > 6
  for key in stored:
    wanted = model.tensors[key].dequantized()
    np.testing.assert_array_equal(found.tensors[key].read(), wanted.T if name == 'gpt2' and 'wte' not in key else wanted)


def test_experts_in_few_bits_are_joined(tmp_path):
  config, tensors = for_engines('mixtral')   # widths of 32 and 16
  format, path = Int(bits=4, scales=Group(size=32), **HALF), tmp_path / 'model.gguf'
  made = {key: drawn(w.shape, format, seed=len(key)) if '.w1.' in key else w for key, w in tensors.items()}
  GgufFile().save(Written(config, made), None, path)
  entry = reader.read(path).tensors['blk.1.ffn_gate_exps.weight']
  assert entry.kind == 'Q4_0' and entry.shape == (4, 16, 32)
  found = read(path)
  for key, one in made.items():
    if isinstance(one, Stored): np.testing.assert_array_equal(found.tensors[key].read(), one.dequantized())
  first = 'model.layers.0.block_sparse_moe.experts.0.w1.weight'
  with pytest.raises(ConfigError, match=r'blk.0.ffn_gate_exps.weight = .*must be in one format'):
    GgufFile().save(Written(config, {**made, first: tensors[first]}), None, path)


@pytest.mark.parametrize('floats, dtype', [('float16', np.float16), ('bfloat16', ml_dtypes.bfloat16)])
def test_floats_of_16_bits_are_the_nearest_and_vectors_stay(tmp_path, floats, dtype):
  model, path = written('qwen2_moe'), tmp_path / 'model.gguf'
  model.tensors['model.embed_tokens.weight'][0, 0] = 1 + 2. ** -12
  notes = GgufFile(floats=floats).save(model, None, path)
  assert len(notes) == 1 and floats in notes[0]
  found = read(path)
  for key, array in model.tensors.items():
    if array.ndim == 2 and 'gate.weight' not in key:
      assert found.tensors[key].dtype == dtype
      array = array.astype(dtype)
    np.testing.assert_array_equal(found.tensors[key].read(), array)
  model.tensors['model.embed_tokens.weight'][0, 0] = 1e6
  if floats == 'float16':
    with pytest.raises(ConfigError, match=r"floats = 'float16': token_embd.weight .*'bfloat16'"):
      GgufFile(floats=floats).save(model, None, path)


def test_what_moved_is_said_and_what_has_no_block_is_refused_or_written_as_floats(tmp_path):
  path = tmp_path / 'model.gguf'
  (note,) = GgufFile().save(written('smollm', Int()), None, path)
  assert 'Q8_0 are rounded to float16' in note and "scale_dtype='float16'" in note
  model = written('smollm', Int(**HALF))
  rounding = {key: dataclasses.replace(part, activations=Int()) if isinstance(part, Stored) else part
              for key, part in model.tensors.items()}
  assert GgufFile().save(Written(model.config, rounding), None, path) == (
    'The model rounds activations to int8 per channel: an engine rounds them to its own blocks of 8 bits instead.',)
  model = written('smollm', Int(bits=3))
  with pytest.raises(ConfigError, match=r"token_embd.weight = 'int3 per channel': GGUF has no block.*others='floats'"):
    GgufFile().save(model, None, tmp_path / 'other.gguf')
  assert not (tmp_path / 'other.gguf').exists()
  assert GgufFile(others='floats').save(model, None, path) == ()
  name = 'model.layers.0.mlp.up_proj.weight'
  np.testing.assert_array_equal(read(path).tensors[name].read(), model.tensors[name].dequantized())


def test_ternary_blocks_are_those_that_are_asked_for(tmp_path):
  """In a model of 256 inputs."""
  rng, D = np.random.default_rng(0), 256
  config = {'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'hidden_size': D, 'intermediate_size': D,
            'num_attention_heads': 4, 'num_key_value_heads': 4, 'num_hidden_layers': 1, 'vocab_size': 8,
            'tie_word_embeddings': True, 'max_position_embeddings': 64}
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  layer = {f'self_attn.{side}_proj': draw(D, D) for side in 'qkvo'} | {f'mlp.{one}_proj': draw(D, D) for one in (
    'gate', 'up', 'down')} | {'input_layernorm': draw(D), 'post_attention_layernorm': draw(D)}
  tensors = {'model.embed_tokens.weight': draw(8, D), 'model.norm.weight': draw(D)} | {
    f'model.layers.0.{name}.weight': drawn(w.shape, Ternary(**HALF)) if w.ndim == 2 else w for name, w in layer.items()}
  for kind in ('TQ1_0', 'TQ2_0'):
    GgufFile(ternary=kind).save(Written(config, tensors), None, tmp_path / kind)
    assert sum(entry.kind == kind for entry in reader.read(tmp_path / kind).tensors.values()) == 7
    found = read(tmp_path / kind)
    for name, one in tensors.items():
      np.testing.assert_array_equal(found.tensors[name].read(), one.dequantized() if isinstance(one, Stored) else one)


def test_a_file_with_a_tokenizer_is_a_source(tmp_path):
  from efficient_lm.data.tokenizers import ByteTokenizer
  config, tensors = for_engines('smollm')
  rows = np.resize(tensors['model.embed_tokens.weight'], (260, 32))
  model = Written({**config, 'vocab_size': 260}, {**tensors, 'model.embed_tokens.weight': rows})
  GgufFile().save(model, ByteTokenizer(), tmp_path / 'model.gguf')
  found = Gguf(path=str(tmp_path))
  assert found.tokenizer().encode('é').tolist() == [0xc3, 0xa9] and found.spec().vocab_size == 260
  np.testing.assert_array_equal(found.load().embed.materialize(), rows)
  GgufFile(tokenizer=False).save(model, ByteTokenizer(), tmp_path / 'model.gguf')
  assert reader.read(tmp_path / 'model.gguf').metadata['tokenizer.ggml.model'] == 'none'
