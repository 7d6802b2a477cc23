"""GGUF files of small models, spelled out as converters write them."""
import numpy as np

V, D, F, N, K, H, L = 20, 16, 24, 4, 2, 4, 2

BYTES = [chr(b) if 33 <= b <= 126 or (b >= 161 and b != 173) else None for b in range(256)]
ALPHABET = [BYTES[b] if BYTES[b] else chr(256 + sum(one is None for one in BYTES[:b])) for b in range(256)]   # GPT-2's
TOKENIZER = {'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'gpt-2', 'tokenizer.ggml.eos_token_id': 1,
             'tokenizer.ggml.tokens': ['<|im_start|>', '<|im_end|>', *ALPHABET, 'he', 'll', 'hell'],
             'tokenizer.ggml.token_type': [('i32', kind) for kind in [3, 3] + [1] * 259],
             'tokenizer.ggml.merges': ['h e', 'l l', 'he ll']}
LLAMA = {'general.architecture': 'llama', 'llama.block_count': L, 'llama.embedding_length': D,
         'llama.feed_forward_length': F, 'llama.attention.head_count': N, 'llama.attention.head_count_kv': K,
         'llama.attention.key_length': H, 'llama.context_length': 64,
         'llama.attention.layer_norm_rms_epsilon': 1e-5, 'llama.rope.freq_base': 5e4, 'llama.rope.dimension_count': H}


def small(metadata: dict, seed: int = 0) -> tuple[dict, dict]:
  """Metadata with a tokenizer, and the tensors of a small Llama."""
  rng = np.random.default_rng(seed)
  shapes = {'token_embd.weight': (len(TOKENIZER['tokenizer.ggml.tokens']), D), 'output_norm.weight': (D,)}
  for i in range(L):
    layer = {'attn_norm': (D,), 'ffn_norm': (D,), 'attn_q': (N * H, D), 'attn_k': (K * H, D), 'attn_v': (K * H, D),
             'attn_output': (D, N * H), 'ffn_gate': (F, D), 'ffn_up': (F, D), 'ffn_down': (D, F)}
    shapes |= {f'blk.{i}.{name}.weight': shape for name, shape in layer.items()}
  return {**metadata, **TOKENIZER}, {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
