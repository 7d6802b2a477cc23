"""Gemma 2 and the text models of Gemma 3: norms on both sides of a branch, windows in most layers, scaled embeddings.

Their norms multiply by 1 + w in float32 (`modeling_gemma2.py`); 1 + w is kept in float32 here, whatever w is stored in, so
that nothing is rounded that transformers does not round.
"""
import math

from efficient_lm.interop.families import llama, rotary
from efficient_lm.interop.families.keys import MOST_LAYERS, Keys
from efficient_lm.interop.families.places import Parts, Place, alone, of_layers
from efficient_lm.models import spec

SANDWICH = {'attention_norm': 'input_layernorm', 'attention_out_norm': 'post_attention_layernorm',
            'mlp_norm': 'pre_feedforward_layernorm', 'mlp_out_norm': 'post_feedforward_layernorm'}


def gemma(keys: Keys) -> spec.Transformer:
  """The description. Gemma 2 has a window in every other layer, Gemma 3 in five of six, and RoPE of its own there."""
  second = keys.get('model_type') == 'gemma2'
  keys.off('use_bidirectional_attention')
  activation = llama.activation_of(keys, 'hidden_activation', 'gelu_pytorch_tanh')
  if keys.get('hidden_act') is not None and llama.activation_of(keys, 'hidden_act', '') != activation:
    keys.refuse('hidden_act', f'says something else than hidden_activation, {activation}')
  mlp = spec.Gated(hidden=keys.whole('intermediate_size'), activation=activation)
  if second: ropes = dict.fromkeys((llama.FULL, llama.WINDOWED), rotary.rope(keys))
  else: ropes = rotary.by_layer_type(keys, 1e6, 1e4)
  windowed = _windowed(keys, second)
  window = keys.whole('sliding_window') if any(windowed) else keys.get('sliding_window')
  layers = [_layer(keys, mlp, ropes[llama.WINDOWED if one else llama.FULL], window if one else None) for one in windowed]
  dim = keys.whole('hidden_size')
  return llama.model(keys, layers, spec.SandwichNorm(), tied=True, norm_eps=keys.number('rms_norm_eps', 1e-6),
                     ends=spec.Ends(embed_scale=math.sqrt(dim),
                                    softcap=_softcap(keys, 'final_logit_softcapping', 30.0 if second else None)))


def _windowed(keys: Keys, second: bool) -> list[bool]:
  n, types = keys.whole('num_hidden_layers', most=MOST_LAYERS), keys.listed('layer_types', str)
  written, private = keys.get('sliding_window_pattern'), keys.get('_sliding_window_pattern')
  if types: return llama.windowed_layers(keys, types)
  period = 2 if second else written or private or 6
  if not isinstance(period, int) or period < 1: keys.refuse('sliding_window_pattern', 'a whole number is needed')
  return [bool((i + 1) % period) for i in range(n)]


def _layer(keys: Keys, mlp, rope, window) -> spec.Layer:
  biases = llama.ALL if keys.flag('attention_bias', False) else ()
  norm = '' if keys.get('model_type') == 'gemma2' else 'H'
  scale = keys.number('query_pre_attn_scalar', 256) ** -0.5
  softcap = _softcap(keys, 'attn_logit_softcapping', None if norm else 50.0)
  attention = llama.attention(keys, biases, norm, window, rope, scale=scale, softcap=softcap)
  return spec.Layer(attention=attention, mlp=mlp)


def _softcap(keys: Keys, key: str, missing: float | None) -> float | None:
  """A key that is missing means Gemma 2's own value, one that is null means none."""
  return keys.number_or_none(key) if key in keys.config else missing


def places(model: spec.Transformer, keys: Keys) -> dict[str, Place]:
  """Of both."""
  del keys
  return of_layers(model, llama.LAYERS, _parts) | alone(llama.outer(model, plus=1.0))


def _parts(layer: spec.Layer, stack) -> Parts:
  return llama.norms(SANDWICH, 1.0) | llama.attention_parts(layer.attention, 1.0) | llama.mlp_parts(layer.mlp)
