"""Tiny checkpoints of every family as transformers writes them, and the logits that it computes from them.

  python tests/interop/make_fixtures.py [NAME …]

Run by hand, with torch and transformers installed (transformers 5.24 wrote what is committed). Every parameter is random,
norms and biases too: what is at its default could be left out unseen. Weights are rounded to the stored dtype first, and
the logits are those of float32. Texts are longer than sliding windows and than what scaled RoPE was trained on.
"""
import json
import os
import pathlib
import sys

os.environ['HF_HUB_OFFLINE'] = '1'
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).parent / 'fixtures'
LENGTH, PREFIX = 24, 11   # tokens of the text; of them, read at once before the rest is read one by one
ROUGH = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=32, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None)


def rope(kind: str = 'default', theta: float = 100.0, **more) -> dict:
  """As transformers 5 spells it. A small base: with heads of 8 numbers every pair turns a good part of a circle."""
  return {'rope_type': kind, 'rope_theta': theta, **more}


LLAMA3 = rope('llama3', factor=4.0, low_freq_factor=1.0, high_freq_factor=3.0, original_max_position_embeddings=12)
YARN = rope('yarn', 30.0, factor=4.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=0.25)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
CLASSES = {'GPT2': 'GPT2LMHeadModel'}   # that are not named after their family
# name -> family, its config, the dtype that is stored
CASES = {
  'llama': ('Llama', dict(rope_parameters=rope(), vocab_size=48, intermediate_size=16), 'float32'),
  'smollm': ('Llama', dict(rope_parameters=rope(theta=1e5), tie_word_embeddings=True, rms_norm_eps=1e-5), 'bfloat16'),
  'llama3': ('Llama', dict(rope_parameters=LLAMA3, head_dim=16, attention_bias=True, mlp_bias=True), 'bfloat16'),
  'llama_linear': ('Llama', dict(rope_parameters=rope('linear', factor=3.0)), 'float16'),
  'mistral': ('Mistral', dict(rope_parameters=rope(), sliding_window=6, head_dim=16), 'bfloat16'),
  'qwen2': ('Qwen2', dict(rope_parameters=rope(), tie_word_embeddings=True), 'bfloat16'),
  'qwen2_window': ('Qwen2', dict(rope_parameters=rope(), use_sliding_window=True, sliding_window=5, max_window_layers=1),
                   'bfloat16'),
  'qwen3': ('Qwen3', dict(rope_parameters=YARN, head_dim=16), 'bfloat16'),
  'mixtral': ('Mixtral', dict(rope_parameters=rope(), num_local_experts=4, num_experts_per_tok=2, intermediate_size=16),
              'bfloat16'),
  'olmoe': ('Olmoe', dict(rope_parameters=rope(), intermediate_size=16, **EXPERTS), 'bfloat16'),
  'qwen3_moe': ('Qwen3Moe', dict(rope_parameters=rope(), head_dim=16, moe_intermediate_size=12, norm_topk_prob=True,
                                 mlp_only_layers=[0], decoder_sparse_step=1, **EXPERTS), 'bfloat16'),
  'qwen2_moe': ('Qwen2Moe', dict(rope_parameters=rope(), moe_intermediate_size=12, shared_expert_intermediate_size=16,
                                 **EXPERTS), 'bfloat16'),
  'deepseek_v3': ('DeepseekV3', dict(
    rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=1.3), num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16,
    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
    topk_group=1, n_shared_experts=1, moe_intermediate_size=16, first_k_dense_replace=1, routed_scaling_factor=2.5,
    intermediate_size=24), 'bfloat16'),
  'olmo2': ('Olmo2', dict(rope_parameters=rope()), 'bfloat16'),
  'gemma2': ('Gemma2', dict(rope_parameters=rope(), num_hidden_layers=3, head_dim=8, query_pre_attn_scalar=24,
                            sliding_window=6, final_logit_softcapping=3.0, attn_logit_softcapping=2.0), 'bfloat16'),
  'gemma3_text': ('Gemma3', dict(
    rope_parameters={'sliding_attention': rope(theta=50.0), 'full_attention': rope('linear', theta=500.0, factor=8.0)},
    num_hidden_layers=5, head_dim=8, query_pre_attn_scalar=24, sliding_window=6, intermediate_size=16,
    layer_types=['sliding_attention', 'full_attention'] * 2 + ['sliding_attention']), 'bfloat16'),
  'gpt2': ('GPT2', dict(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, n_inner=48, bos_token_id=1,
                        eos_token_id=2), 'bfloat16'),
  'opt': ('OPT', dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, ffn_dim=48, max_position_embeddings=32,
                      num_attention_heads=4, word_embed_proj_dim=32, bos_token_id=2, eos_token_id=2, pad_token_id=1),
          'float16'),
}


def make(name: str):
  """Saves the checkpoint and the logits that are expected of it."""
  family, settings, dtype = CASES[name]
  config_class = getattr(transformers, {'Gemma3': 'Gemma3TextConfig'}.get(family, f'{family}Config'))
  config = config_class(**(settings if family in ('GPT2', 'OPT') else ROUGH | settings))
  config._attn_implementation = 'eager'
  model = getattr(transformers, CLASSES.get(family, f'{family}ForCausalLM'))(config).eval()
  randomize(model, sum(map(ord, name)))
  model.to(getattr(torch, dtype)).save_pretrained(HERE / name)
  (HERE / name / 'generation_config.json').unlink(missing_ok=True)
  loaded = type(model).from_pretrained(HERE / name, dtype=torch.float32, attn_implementation='eager').eval()
  np.savez_compressed(HERE / name / 'expected.npz', **expected(loaded, config.vocab_size))
  size = sum(file.stat().st_size for file in (HERE / name).iterdir())
  print(f'{name}: {size / 1024:.0f} KiB')


def make_fp8():
  """DeepSeek-V3's checkpoint in fp8, as the published one is: every matrix but embedding, head and routers in blocks."""
  source, target, block = HERE / 'deepseek_v3', HERE / 'deepseek_v3_fp8', (8, 4)
  target.mkdir(exist_ok=True)
  tensors = {}
  for name, tensor in load_file(source / 'model.safetensors').items():
    if tensor.ndim < 2 or 'embed' in name or 'lm_head' in name or 'mlp.gate.' in name: tensors[name] = tensor
    else:
      rows, columns = (size // part for size, part in zip(tensor.shape, block))
      blocks = tensor.float().reshape(rows, block[0], columns, block[1])
      scales = blocks.abs().amax((1, 3)) / 448
      tensors[name] = (blocks / scales[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
      tensors[name + '_scale_inv'] = scales
  save_file(tensors, target / 'model.safetensors', {'format': 'pt'})
  config = json.loads((source / 'config.json').read_text()) | {'dtype': 'float32', 'quantization_config': {
    'quant_method': 'fp8', 'fmt': 'e4m3', 'activation_scheme': 'dynamic', 'weight_block_size': block}}
  (target / 'config.json').write_text(json.dumps(config, indent=2))
  asked = transformers.FineGrainedFP8Config(weight_block_size=block, dequantize=True)
  model = transformers.DeepseekV3ForCausalLM.from_pretrained(
    target, dtype=torch.float32, quantization_config=asked, attn_implementation='eager').eval()
  np.savez_compressed(target / 'expected.npz', **expected(model, config['vocab_size']))


def randomize(model, seed: int):
  """Matrices with the deviation that keeps the size of what they multiply, scales around 1 (or 0, where 1 is added), biases
  around 0."""
  generator = torch.Generator().manual_seed(seed)
  def draw(tensor): return torch.randn(tensor.shape, generator=generator)
  named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if 'e_score_correction' in n)]
  for path, tensor in named:
    with torch.no_grad():
      if tensor.ndim >= 2: tensor.copy_(draw(tensor) * (0.5 if 'embed' in path else tensor.shape[-1] ** -0.5))
      elif 'weight' in path: tensor.copy_(draw(tensor) * 0.3 + (0 if 'gemma' in model.config.model_type else 1))
      else: tensor.copy_(draw(tensor) * 0.3)


@torch.no_grad()
def expected(model, vocab_size: int) -> dict[str, np.ndarray]:
  """tokens_BT; logits of all of them read at once, and of those after PREFIX read one by one through transformers' cache."""
  tokens = torch.randint(3, vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
  whole = model(tokens).logits
  state = model(tokens[:, :PREFIX], use_cache=True)
  steps, cache = [], getattr(state, 'cache', None) or state.past_key_values
  for t in range(PREFIX, LENGTH):
    state = model(tokens[:, t:t + 1], past_key_values=cache, use_cache=True)
    cache = getattr(state, 'cache', None) or state.past_key_values
    steps.append(state.logits)
  return {'tokens_BT': tokens.numpy(), 'whole_BTV': whole.numpy(), 'steps_BTV': torch.cat(steps, 1).numpy()}


if __name__ == '__main__':
  for chosen in sys.argv[1:] or [*CASES, 'deepseek_v3_fp8']: make_fp8() if chosen == 'deepseek_v3_fp8' else make(chosen)
