"""Mixtures of experts around Llama's attention: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE."""
from efficient_lm.interop.families import llama
from efficient_lm.interop.families.keys import MOST_EXPERTS, MOST_LAYERS, Keys
from efficient_lm.interop.families.places import Part, Parts, Place, alone, of_layers
from efficient_lm.models import spec
from efficient_lm.models.moe.routing import SoftmaxTopK

NUM_EXPERTS = {'mixtral': ('num_local_experts', 8), 'olmoe': ('num_experts', 64), 'qwen2_moe': ('num_experts', 60),
               'qwen3_moe': ('num_experts', 128)}
TOP_K = {'mixtral': 2, 'olmoe': 8, 'qwen2_moe': 4, 'qwen3_moe': 8}
MIXTRAL = {'gate': 'w1', 'up': 'w3', 'down': 'w2'}


def mixture(keys: Keys) -> spec.Transformer:
  """The description of any of the four."""
  kind = keys.get('model_type')
  keys.only('hidden_act', 'silu', 'swish', default='silu')   # experts are SwiGLU
  keys.off('clip_qkv')
  keys.off('use_sliding_window')
  if kind.startswith('qwen'): keys.asked |= {'sliding_window', 'max_window_layers', 'intermediate_size'}   # may not be used
  qk_norm = {'olmoe': 'NH', 'qwen3_moe': 'H'}.get(kind, '')
  attention = llama.attention(keys, _biases(keys, kind), qk_norm, llama.windows(keys)[0])
  layers = [spec.Layer(attention=attention, mlp=_experts(keys, kind) if sparse else llama.feed_forward(keys))
            for sparse in _sparse(keys, kind)]
  eps = 1e-5 if kind in ('mixtral', 'olmoe') else 1e-6
  return llama.model(keys, layers, norm_eps=keys.number('rms_norm_eps', eps))


def _biases(keys: Keys, kind: str) -> tuple[str, ...]:
  if kind == 'qwen2_moe': return llama.ALL[:3] if keys.flag('qkv_bias', True) else ()
  return llama.ALL if kind != 'mixtral' and keys.flag('attention_bias', False) else ()


def _sparse(keys: Keys, kind: str) -> list[bool]:
  """Of each layer, whether it has experts."""
  n = keys.whole('num_hidden_layers', most=MOST_LAYERS)
  if not kind.startswith('qwen'): return [True] * n
  if (types := keys.listed('layer_types', str)) and any(llama.windowed_layers(keys, types)):
    keys.refuse('layer_types', 'has windows, which no mixture here has')
  step, dense = keys.whole('decoder_sparse_step', 1), keys.listed('mlp_only_layers', int, [])
  return [i not in dense and (i + 1) % step == 0 for i in range(n)]


def _experts(keys: Keys, kind: str) -> spec.MoE:
  """Gates are normalised over the chosen experts where `norm_topk_prob` says so; Mixtral always does."""
  key, default = NUM_EXPERTS[kind]
  other = {'num_experts': 'num_local_experts', 'num_local_experts': 'num_experts'}[key]   # as other versions have written it
  if keys.get(key) is None and keys.get(other) is not None: key, other = other, key
  if keys.get(other, keys.get(key)) != keys.get(key): keys.refuse(other, f'says something else than {key}')
  hidden = keys.whole('moe_intermediate_size' if kind.startswith('qwen') else 'intermediate_size')
  normalize = True if kind == 'mixtral' else keys.flag('norm_topk_prob', False)
  shared = None
  if kind == 'qwen2_moe': shared = spec.SigmoidGated(inner=spec.SwiGLU(hidden=keys.whole('shared_expert_intermediate_size')))
  return spec.MoE(num_experts=keys.whole(key, default, MOST_EXPERTS), hidden=hidden, shared=shared,
                  router=SoftmaxTopK(top_k=keys.whole('num_experts_per_tok', TOP_K[kind]), normalize=normalize))


def places(model: spec.Transformer, keys: Keys) -> dict[str, Place]:
  """Of any of the four; in files every expert has tensors of its own."""
  mixtral = keys.get('model_type') == 'mixtral'

  def parts(layer: spec.Layer, stack) -> Parts:
    found = llama.norms(llama.PRE_NORM) | llama.attention_parts(layer.attention)
    if not isinstance(layer.mlp, spec.MoE): return found | llama.mlp_parts(layer.mlp)
    return found | expert_parts(layer.mlp, 'block_sparse_moe.' if mixtral else 'mlp.', MIXTRAL if mixtral else None)

  return of_layers(model, llama.LAYERS, parts) | alone(llama.outer(model))


def expert_parts(moe: spec.MoE, prefix: str, names: dict[str, str] | None = None) -> Parts:
  """Of the router, of the experts under `names`, and of what else sees every token."""
  names = names or {own: name for own, (name, _, _) in llama.MLP.items()}
  parts = {'mlp/router/array': Part(f'{prefix}gate.weight', 'E D')}
  for own, (_, layout, _) in llama.MLP.items():
    parts[f'mlp/experts/{own}/array'] = Part(f'{prefix}experts.{{e}}.{names[own]}.weight', layout)
  if isinstance(moe.shared, spec.SigmoidGated):
    parts |= llama.mlp_parts(moe.shared.inner, 'mlp/shared/inner', f'{prefix}shared_expert.')
    parts['mlp/shared/gate_out/array'] = Part(f'{prefix}shared_expert_gate.weight', 'E D')
  if moe.num_shared: parts |= llama.mlp_parts(None, 'mlp/shared', f'{prefix}shared_experts.')
  return parts
