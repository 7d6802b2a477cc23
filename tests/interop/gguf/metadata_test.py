"""What a file cannot say of a model is refused in a line with field, value and fix; what it can, writer_test reads back."""
import pytest

from efficient_lm.errors import ConfigError, IncompatibleError
from efficient_lm.interop import folder
from efficient_lm.interop.gguf.writer import GgufFile
from efficient_lm.interop.written import Written
from tests.interop.gguf.checkpoints import FIXTURES, for_engines

ROPE = {'rope_type': 'llama3', 'rope_theta': 100.0, 'factor': 4.0, 'low_freq_factor': 1.0, 'high_freq_factor': 3.0,
        'original_max_position_embeddings': 12}
YARN = {'rope_type': 'yarn', 'rope_theta': 30.0, 'factor': 4.0, 'beta_fast': 2.0, 'beta_slow': 0.25,
        'original_max_position_embeddings': 16}


@pytest.mark.parametrize('name, change, words', [
  ('qwen3_moe', {'norm_topk_prob': False}, ['norm_topk_prob = False', "'qwen3moe' with True"]),
  ('olmoe', {'norm_topk_prob': True}, ['norm_topk_prob = True', "'olmoe' with False"]),
  ('qwen2_moe', {'norm_topk_prob': True}, ['norm_topk_prob = True', "'qwen2moe' with False"]),
  ('olmoe', {'num_key_value_heads': 2}, ['num_key_value_heads = 2', 'as many as heads only, 4']),
  ('mistral', {}, ['sliding_window = 6', "'llama' with None"]), ('qwen2_window', {}, ['sliding_window = 5']),
  ('gemma2', {'query_pre_attn_scalar': 24}, ['query_pre_attn_scalar']),
  ('opt', {}, ["model_type = 'opt'", 'llama, mistral']),
  ('deepseek_v3', {}, ["model_type = 'deepseek_v3'"]), ('llama', {'hidden_act': 'gelu'}, ["'gelu'", 'engines compute']),
  ('qwen3', {'rope_parameters': YARN}, ['rope_parameters = (2.0, 0.25)', 'beta_fast 32']),
  ('qwen3', {'rope_parameters': YARN | {'beta_fast': 32.0, 'beta_slow': 1.0, 'truncate': False}}, ['truncate = False']),
  ('llama3', {'rope_parameters': ROPE}, ['is not the scaling of Llama 3.1'])], ids=str)
def test_what_engines_do_not_compute_is_refused_before_a_byte_is_written(tmp_path, name, change, words):
  config, tensors = for_engines(name)
  with pytest.raises((ConfigError, IncompatibleError)) as refused:
    GgufFile().save(Written({**config, **change}, tensors), None, tmp_path / 'model.gguf')
  line = str(refused.value)
  assert all(word in line for word in words), line
  assert line.isprintable() and len(line) < 400 and not list(tmp_path.iterdir())
  assert refused.type.exit_code == 2


def test_a_field_of_a_target_is_checked():
  wrong = GgufFile(floats='int8', ternary='TQ3', others='drop')
  assert [problem[0] for problem in wrong.check()] == ['floats', 'ternary', 'others']
  assert not list(GgufFile().check())


def test_a_mixture_with_dense_layers_is_refused(tmp_path):
  """Engines load experts in every layer of it."""
  found = folder.read(str(FIXTURES / 'qwen3_moe'))
  tensors = {name: tensor.read() for name, tensor in found.tensors.items()}
  with pytest.raises(ConfigError, match=r'mlp_only_layers = \[0\]: llama.cpp loads experts in every layer'):
    GgufFile().save(Written(found.config, tensors), None, tmp_path / 'model.gguf')
  assert not list(tmp_path.iterdir())
