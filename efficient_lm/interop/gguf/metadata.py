"""What a model's description is in the metadata of a GGUF file: the inverse of `config`.

Engines have much of an architecture in their code, where no key reaches it. So what has been written is read back and
compared with the description that it was written of: a difference is refused in one line, before a number is written.
"""
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from efficient_lm.errors import ConfigError
from efficient_lm.interop import families
from efficient_lm.interop.gguf.config import config_of
from efficient_lm.interop.gguf.reader import Entry, File
from efficient_lm.models import spec

OF_FAMILY = {'llama': 'llama', 'mistral': 'llama', 'mixtral': 'llama', 'qwen2': 'qwen2', 'qwen3': 'qwen3',
             'qwen3_moe': 'qwen3moe', 'qwen2_moe': 'qwen2moe', 'olmoe': 'olmoe', 'olmo2': 'olmo2', 'gemma2': 'gemma2',
             'gemma3_text': 'gemma3', 'gpt2': 'gpt2'}
FREQUENCIES = 'rope_freqs.weight'
# Fields of a description in the words of a config.json, where these say more.
WORDS = {'normalize': 'norm_topk_prob', 'window': 'sliding_window', 'scale': 'query_pre_attn_scalar',
         'scaling': 'rope_parameters', 'theta': 'rope_theta', 'activation': 'hidden_act'}


def architecture_of(config: Mapping[str, Any]) -> str:
  """Raises ConfigError for a family that no architecture read here is."""
  kind = config.get('model_type')
  if kind in OF_FAMILY: return OF_FAMILY[kind]
  raise ConfigError('model_type', kind, f'cannot be written as GGUF: {", ".join(OF_FAMILY)} can')


def metadata(config: Mapping[str, Any]) -> dict[str, Any]:
  """All keys but those of the tokenizer. Raises ConfigError for a config that is not understood."""
  model, architecture = families.spec_of(config), architecture_of(config)
  _check_engine(architecture, model)
  made = _gpt2(model) if architecture == 'gpt2' else _rotary(model, config)
  made |= {'vocab_size': model.vocab_size, 'embedding_length': model.dim, 'block_count': len(model.layers)}
  return {'general.architecture': architecture, 'general.type': 'model',
          **{f'{architecture}.{key}': value for key, value in made.items()}}


def frequencies(config: Mapping[str, Any]) -> np.ndarray | None:
  """What Llama 3.1 divides its frequencies by, (H / 2,) float32: the tensor FREQUENCIES; None for models without."""
  first = families.spec_of(config).layers[0].attention
  scaling = first.rope.scaling if first.rope else None
  if not isinstance(scaling, spec.Llama3Scaling): return None
  half, low, high = first.head_dim // 2, scaling.low_freq_factor, scaling.high_freq_factor
  turns = scaling.original_length / (2 * np.pi * first.rope.theta ** (np.arange(half) / half))
  blend = np.clip((turns - low) / (high - low), 0, 1)
  return (1 / ((1 - blend) / scaling.factor + blend)).astype(np.float32)


def check(path: str, config: Mapping[str, Any], made: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]):
  """Raises ConfigError for the first thing that a file of this metadata and tensors of these shapes would not say."""
  divisors = frequencies(config)
  raw = b'' if divisors is None else divisors.tobytes()
  entries = {name: Entry(shape, 'F32', 0, len(raw) if name == FREQUENCIES else 0) for name, shape in shapes.items()}
  found = families.spec_of(config_of(File(path, dict(made), entries, 0, raw)))
  for field, value, other in _differences(families.spec_of(config), found):
    raise ConfigError(field, value, f'cannot be said in a GGUF file: engines compute {made["general.architecture"]!r} with '
                                    f'{other!r}; export a Hugging Face folder')


def _check_engine(architecture: str, model: spec.Transformer):
  """Raises ConfigError for what a file could say, and llama.cpp (0.5.0-dev, run) does not hear."""
  layers = model.layers
  first, dense = layers[0].attention, [i for i, layer in enumerate(layers) if not isinstance(layer.mlp, spec.MoE)]
  if 0 < len(dense) < len(layers):
    raise ConfigError('mlp_only_layers', dense, 'llama.cpp loads experts in every layer of a mixture: export a Hugging Face '
                                                'folder')
  if architecture == 'olmoe' and first.num_kv_heads != first.num_heads:
    raise ConfigError('num_key_value_heads', first.num_kv_heads, f'llama.cpp loads an OLMoE with as many as heads only, '
                                                                 f'{first.num_heads}: export a Hugging Face folder')
  scaling = first.rope.scaling if first.rope else None
  if isinstance(scaling, spec.Yarn) and (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0):
    raise ConfigError('rope_parameters', (scaling.beta_fast, scaling.beta_slow), 'llama.cpp computes YaRN with beta_fast 32 '
                      'and beta_slow 1, whatever a file says: export a Hugging Face folder')


def _gpt2(model: spec.Transformer) -> dict[str, Any]:
  attention, mlp = model.layers[0].attention, model.layers[0].mlp
  return {'context_length': model.ends.positions.length, 'feed_forward_length': mlp.hidden,
          'attention.head_count': attention.num_heads, 'attention.layer_norm_epsilon': model.norm_eps}


def _rotary(model: spec.Transformer, config: Mapping[str, Any]) -> dict[str, Any]:
  """Of all architectures with rotary embedding and RMSNorm."""
  layers = [layer.attention for layer in model.layers]
  attention = next((one for one in layers if one.window is None), layers[0])
  head_dim, mlp = attention.head_dim, model.layers[0].mlp
  made = {
    'context_length': config.get('max_position_embeddings') or 2048, 'attention.head_count': attention.num_heads,
    'attention.head_count_kv': attention.num_kv_heads, 'attention.key_length': head_dim, 'attention.value_length': head_dim,
    'attention.layer_norm_rms_epsilon': model.norm_eps, 'rope.dimension_count': head_dim,
    'rope.freq_base': attention.rope.theta, **_scaling(attention.rope.scaling),
    'feed_forward_length': config.get('intermediate_size') or mlp.hidden, **(_experts(mlp, config))}
  windowed = next((one for one in layers if one.window is not None), None)
  if windowed and config['model_type'].startswith('gemma'): made['attention.sliding_window'] = windowed.window
  if windowed and config['model_type'] == 'gemma3_text': made['rope.freq_base_swa'] = windowed.rope.theta
  if attention.softcap is not None: made['attn_logit_softcapping'] = attention.softcap
  if model.ends.softcap is not None: made['final_logit_softcapping'] = model.ends.softcap
  return made


def _scaling(scaling) -> dict[str, Any]:
  """Llama 3's has a tensor, not a key."""
  if isinstance(scaling, spec.LinearScaling):
    return {'rope.scaling.type': 'linear', 'rope.scaling.factor': scaling.factor}
  if not isinstance(scaling, spec.Yarn): return {}
  return {'rope.scaling.type': 'yarn', 'rope.scaling.factor': scaling.factor,
          'rope.scaling.original_context_length': scaling.original_length}


def _experts(mlp, config: Mapping[str, Any]) -> dict[str, Any]:
  if not isinstance(mlp, spec.MoE): return {}
  made = {'expert_count': mlp.num_experts, 'expert_used_count': mlp.router.top_k}
  if config['model_type'] != 'mixtral': made['expert_feed_forward_length'] = mlp.hidden
  if mlp.shared is not None: made['expert_shared_feed_forward_length'] = mlp.shared.inner.hidden
  return made


def _differences(wanted: spec.Transformer, found: spec.Transformer) -> Iterator[tuple[str, Any, Any]]:
  """(field, value, other value) of what two models compute; in which dtype is no matter of the file."""
  ends = [dataclasses.replace(model, stacks=(), dtype='float32') for model in (wanted, found)]
  yield from _unequal('model', *ends)
  for i, pair in enumerate(zip(wanted.layers, found.layers, strict=True)): yield from _unequal(f'layer {i}', *pair)


def _unequal(field: str, value, other) -> Iterator[tuple[str, Any, Any]]:
  if dataclasses.is_dataclass(value) and type(value) is type(other):
    for one in dataclasses.fields(value):
      if one.name == 'balance': continue   # of training
      yield from _unequal(WORDS.get(one.name, one.name), getattr(value, one.name), getattr(other, one.name))
  # Files have numbers in 32 bits.
  elif isinstance(value, float) and isinstance(other, float):
    if np.float32(value) != np.float32(other): yield field, value, other
  elif value != other: yield field, value, other
