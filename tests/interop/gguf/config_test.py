"""Metadata is understood or refused in one line: what it means beside the tensors, names_test states."""
import numpy as np
import pytest

from efficient_lm.errors import IncompatibleError
from efficient_lm.interop.gguf import config, reader
from tests.interop.gguf import writing
from tests.interop.gguf.models import LLAMA, D, F, H, K, L, N, small


def opened(tmp_path, metadata: dict, tensors: dict) -> dict:
  path = tmp_path / 'model.gguf'
  path.write_bytes(writing.file(metadata, tensors))
  return config.config_of(reader.read(path))


def test_sizes_and_numbers_are_those_of_the_file(tmp_path):
  """float32 numbers are the decimal ones that were meant."""
  found = opened(tmp_path, *small(LLAMA))
  wanted = dict(model_type='llama', hidden_size=D, intermediate_size=F, num_attention_heads=N, num_key_value_heads=K,
                head_dim=H, num_hidden_layers=L, vocab_size=261, rms_norm_eps=1e-5, rope_theta=5e4, rope_scaling=None,
                tie_word_embeddings=True, attention_bias=False, max_position_embeddings=64)
  assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize('architecture, normalised', [('qwen3moe', True), ('olmoe', False)])
def test_whether_gates_are_normalised_is_the_architectures(tmp_path, architecture, normalised):
  """And a file that says otherwise is refused."""
  metadata, tensors = small(LLAMA)
  for i in range(L):
    for name, shape in {'gate': (4, F, D), 'up': (4, F, D), 'down': (4, D, F)}.items():
      del tensors[f'blk.{i}.ffn_{name}.weight']
      tensors[f'blk.{i}.ffn_{name}_exps.weight'] = np.zeros(shape, np.float32)
    tensors[f'blk.{i}.ffn_gate_inp.weight'] = np.zeros((4, D), np.float32)
  metadata |= {'llama.expert_count': 4, 'llama.expert_used_count': 2, 'llama.expert_feed_forward_length': F}
  metadata = {key.replace('llama.', f'{architecture}.'): value for key, value in metadata.items()}
  metadata['general.architecture'] = architecture
  assert opened(tmp_path, metadata, tensors)['norm_topk_prob'] is normalised
  opened(tmp_path, {**metadata, f'{architecture}.expert_weights_norm': normalised}, tensors)
  with pytest.raises(IncompatibleError, match='5 experts in a tensor, its metadata says 4'):
    opened(tmp_path, metadata, {**tensors, 'blk.0.ffn_up_exps.weight': np.zeros((5, F, D), np.float32)})
  for key, value in {'expert_weights_norm': not normalised, 'expert_gating_func': 2, 'expert_weights_scale': 2.5}.items():
    with pytest.raises(IncompatibleError, match=key): opened(tmp_path, {**metadata, f'{architecture}.{key}': value}, tensors)


@pytest.mark.parametrize('change, words', [
  ({'general.architecture': 'bloom'}, 'bloom'), ({'general.architecture': 7}, 'general.architecture'),
  ({'general.type': 'adapter'}, 'adapter'), ({'split.count': ('u16', 3)}, 'join the parts'),
  ({'llama.block_count': 3}, 'has 2 layers, not block_count = 3'), ({'llama.block_count': 2 ** 31}, 'block_count'),
  ({'llama.block_count': -1.0}, 'block_count'), ({'llama.attention.head_count': 2 ** 30}, 'attn_q'),
  ({'llama.attention.head_count': [4, 2]}, 'must be one int'), ({'llama.embedding_length': 32}, 'shape'),
  ({'llama.feed_forward_length': 25}, 'ffn_up'), ({'llama.attention.head_count_kv': 4}, 'attn_k'),
  ({'llama.rope.dimension_count': 2}, 'rope.dimension_count'), ({'llama.attention.value_length': 8}, 'value_length'),
  ({'llama.rope.scaling.type': 'longrope'}, 'linear and yarn'), ({'llama.attention.causal': False}, 'causal'),
  ({'llama.attention.layer_norm_rms_epsilon': float('nan')}, 'epsilon'), ({'llama.logit_scale': 0.5}, 'logit_scale'),
  ({'llama.attention.sliding_window': 5}, 'sliding_window'), ({'llama.vocab_size': 7}, 'vocab_size'),
  ({'llama.expert_count': 4}, 'ffn_gate_inp'), ({'llama.rope.scaling.yarn_log_multiplier': 0.1}, 'yarn_log_multiplier')],
  ids=str)
def test_metadata_that_is_not_understood_is_refused_in_a_line(tmp_path, change, words):
  metadata, tensors = small(LLAMA)
  with pytest.raises(IncompatibleError) as refused: opened(tmp_path, {**metadata, **change}, tensors)
  line = str(refused.value)
  assert line.startswith(str(tmp_path)) and words in line and line.isprintable() and len(line) < 400


@pytest.mark.parametrize('key', sorted(set(LLAMA) - {'llama.rope.freq_base', 'llama.rope.dimension_count',
                                                    'llama.attention.head_count_kv', 'llama.attention.key_length'}))
def test_a_key_that_is_needed_is_missed(tmp_path, key):
  metadata, tensors = small(LLAMA)
  del metadata[key]
  with pytest.raises(IncompatibleError, match=key.split('.')[-1]): opened(tmp_path, metadata, tensors)


def test_frequencies_that_no_published_model_has_are_refused(tmp_path):
  metadata, tensors = small(LLAMA)
  with pytest.raises(IncompatibleError, match=r'rope_freqs\.weight is not the scaling of Llama 3.1'):
    opened(tmp_path, metadata, {**tensors, 'rope_freqs.weight': np.array([1, 1.5], np.float32)})


def test_one_number_for_each_layer_is_one_number_where_all_agree(tmp_path):
  metadata, tensors = small(LLAMA)
  found = opened(tmp_path, {**metadata, 'llama.attention.head_count_kv': [K, K]}, tensors)
  assert found['num_key_value_heads'] == K
