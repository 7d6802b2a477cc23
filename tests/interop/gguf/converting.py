"""Checkpoints in the words of Hugging Face written as GGUF, as conversion/*.py of llama.cpp does it, for tests."""
import re

import numpy as np

from tests.interop.gguf.models import TOKENIZER

NAMES = [   # of llama.cpp's gguf-py/gguf/tensor_mapping.py
  ('model.embed_tokens', 'token_embd'), ('model.norm', 'output_norm'), ('lm_head', 'output'), ('model.layers.', 'blk.'),
  ('transformer.wte', 'token_embd'), ('transformer.wpe', 'position_embd'), ('transformer.ln_f', 'output_norm'),
  ('transformer.h.', 'blk.'), ('attn.c_attn', 'attn_qkv'), ('.attn.c_proj', '.attn_output'), ('mlp.c_fc', 'ffn_up'),
  ('mlp.c_proj', 'ffn_down'), ('ln_1', 'attn_norm'), ('ln_2', 'ffn_norm'), ('block_sparse_moe.gate', 'ffn_gate_inp'),
  ('mlp.gate.', 'ffn_gate_inp.'), ('mlp.shared_expert_gate', 'ffn_gate_inp_shexp'),
  ('mlp.shared_expert.gate_proj', 'ffn_gate_shexp'), ('mlp.shared_expert.up_proj', 'ffn_up_shexp'),
  ('mlp.shared_expert.down_proj', 'ffn_down_shexp'),
  ('self_attn.q_norm', 'attn_q_norm'), ('self_attn.k_norm', 'attn_k_norm'),
  ('self_attn.q_proj', 'attn_q'), ('self_attn.k_proj', 'attn_k'), ('self_attn.v_proj', 'attn_v'),
  ('self_attn.o_proj', 'attn_output'), ('mlp.gate_proj', 'ffn_gate'), ('mlp.up_proj', 'ffn_up'),
  ('mlp.down_proj', 'ffn_down'), ('input_layernorm', 'attn_norm'), ('pre_feedforward_layernorm', 'ffn_norm'),
  ('post_feedforward_layernorm', 'post_ffw_norm')]
EXPERT = re.compile(r'(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)')
STEMS = {'gate_proj': 'ffn_gate', 'up_proj': 'ffn_up', 'down_proj': 'ffn_down', 'w1': 'ffn_gate', 'w3': 'ffn_up',
         'w2': 'ffn_down'}


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
  """Rows i and i + H / 2 of a head next to each other."""
  return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def convert(config: dict, tensors: dict) -> tuple[dict, dict]:
  """(metadata, tensors) of the file. config: as config.json has it; tensors: float arrays by their names there."""
  kind = config['model_type']
  architecture = {'mixtral': 'llama', 'mistral': 'llama', 'qwen2_moe': 'qwen2moe', 'qwen3_moe': 'qwen3moe',
                  'gemma3_text': 'gemma3'}.get(kind, kind)
  made, experts = {}, {}
  for name, array in tensors.items():
    array = np.asarray(array, np.float32)
    if found := EXPERT.search(name):
      layer = re.search(r'layers\.(\d+)\.', name)[1]
      experts.setdefault(f'blk.{layer}.{STEMS[found[2]]}_exps.weight', {})[int(found[1])] = array
      continue
    if architecture == 'llama' and (side := re.search('[qk]_proj', name)):
      array = neighbours(array, config['num_attention_heads' if side[0] == 'q_proj' else 'num_key_value_heads'])
    if name.endswith('shared_expert_gate.weight'): array = array[0]
    if kind.startswith('gemma') and 'norm' in name: array = array + 1
    if kind == 'gpt2' and name.endswith('weight') and ('.attn.' in name or '.mlp.' in name): array = array.T
    last = 'post_attention_norm' if kind in ('olmo2', 'gemma2', 'gemma3_text') else 'ffn_norm'
    for old, new in [*NAMES, ('post_attention_layernorm', last)]: name = name.replace(old, new)
    made[name] = np.ascontiguousarray(array)
  made |= {name: np.stack([found[e] for e in sorted(found)]) for name, found in experts.items()}
  if config.get('rope_parameters', {}).get('rope_type') == 'llama3': made['rope_freqs.weight'] = divisors(config)
  return {'general.architecture': architecture, **TOKENIZER, **_metadata(config, architecture)}, made


def divisors(config: dict) -> np.ndarray:
  """Of Llama 3.1's frequencies, one by one, as its reference code has them."""
  rope, half, found = config['rope_parameters'], config['head_dim'] // 2, []
  length = rope['original_max_position_embeddings']
  longest, shortest = length / rope['low_freq_factor'], length / rope['high_freq_factor']
  for i in range(half):
    wave = 2 * np.pi * rope['rope_theta'] ** (i / half)
    smooth = (length / wave - rope['low_freq_factor']) / (rope['high_freq_factor'] - rope['low_freq_factor'])
    if wave < shortest: found.append(1.0)
    elif wave > longest: found.append(rope['factor'])
    else: found.append(1 / ((1 - smooth) / rope['factor'] + smooth))
  return np.array(found, np.float32)


def _metadata(config: dict, architecture: str) -> dict:
  if architecture == 'gpt2':
    return {f'gpt2.{key}': config[name] for key, name in {
      'context_length': 'n_positions', 'embedding_length': 'n_embd', 'block_count': 'n_layer',
      'feed_forward_length': 'n_inner', 'attention.head_count': 'n_head',
      'attention.layer_norm_epsilon': 'layer_norm_epsilon'}.items()}
  names = {'context_length': 'max_position_embeddings', 'embedding_length': 'hidden_size',
           'block_count': 'num_hidden_layers', 'feed_forward_length': 'intermediate_size',
           'attention.head_count': 'num_attention_heads',
           'attention.head_count_kv': 'num_key_value_heads', 'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
           'attention.key_length': 'head_dim', 'attention.value_length': 'head_dim', 'expert_count': 'num_experts',
           'expert_used_count': 'num_experts_per_tok', 'expert_feed_forward_length': 'moe_intermediate_size',
           'expert_shared_feed_forward_length': 'shared_expert_intermediate_size',
           'attn_logit_softcapping': 'attn_logit_softcapping', 'final_logit_softcapping': 'final_logit_softcapping'}
  made = {key: config[name] for key, name in names.items() if config.get(name) is not None}
  if architecture.startswith('gemma'): made['attention.sliding_window'] = config['sliding_window']
  if 'num_local_experts' in config: made['expert_count'] = config['num_local_experts']
  rope = config['rope_parameters']
  if 'full_attention' in rope:
    made['rope.freq_base_swa'], rope = float(rope['sliding_attention']['rope_theta']), rope['full_attention']
  made['rope.freq_base'] = float(rope['rope_theta'])
  if rope['rope_type'] in ('linear', 'yarn'):
    made |= {'rope.scaling.type': rope['rope_type'], 'rope.scaling.factor': float(rope['factor'])}
  if rope['rope_type'] == 'yarn':
    made |= {'rope.scaling.original_context_length': rope['original_max_position_embeddings'],
             'rope.scaling.yarn_beta_fast': float(rope['beta_fast']),
             'rope.scaling.yarn_beta_slow': float(rope['beta_slow'])}
  return {f'{architecture}.{key}': value for key, value in made.items()}
