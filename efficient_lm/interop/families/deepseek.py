"""DeepSeek-V3 and R1: latent attention, dense layers first, then experts that a sigmoid with a load bias chooses.

The layer for multi-token prediction that is stored behind the others is left out: it takes no part in the next token's.
"""
from efficient_lm.interop.families import llama, rotary
from efficient_lm.interop.families.keys import MOST_EXPERTS, MOST_LAYERS, Keys
from efficient_lm.interop.families.mixtures import expert_parts
from efficient_lm.interop.families.places import Part, Parts, Place, alone, of_layers
from efficient_lm.models import spec
from efficient_lm.models.moe.routing import LossFreeBias, SigmoidTopK


def latent(keys: Keys) -> spec.Transformer:
  """The description."""
  keys.only('hidden_act', 'silu', 'swish', default='silu')
  keys.off('attention_bias')
  attention, _ = _attention(keys), ignored(keys)
  n, dense = keys.whole('num_hidden_layers', most=MOST_LAYERS), keys.get('first_k_dense_replace', 3)
  if not isinstance(dense, int) or dense < 0: keys.refuse('first_k_dense_replace', 'a whole number is needed')
  keys.only('moe_layer_freq', None, 1)
  plain = spec.Layer(attention=attention, mlp=llama.feed_forward(keys))
  sparse = spec.Layer(attention=attention, mlp=_experts(keys))
  layers = [plain if i < dense else sparse for i in range(n)]
  return llama.model(keys, layers, norm_eps=keys.number('rms_norm_eps', 1e-6))


def _attention(keys: Keys) -> spec.Latent:
  heads, rope_dim = keys.whole('num_attention_heads'), keys.whole('qk_rope_head_dim', 64)
  if keys.whole('num_key_value_heads', heads) != heads:
    keys.refuse('num_key_value_heads', f'must be {heads}, as queries have')
  for key, size in (('qk_head_dim', keys.whole('qk_nope_head_dim', 128) + rope_dim), ('head_dim', rope_dim)):
    if keys.get(key, size) != size: keys.refuse(key, f'must be {size}, by the sizes of its parts')
  layout = 'interleaved' if keys.flag('rope_interleave', True) else 'half'
  return spec.Latent(
    num_heads=heads, query_rank=llama.whole_or_none(keys, 'q_lora_rank'), kv_rank=keys.whole('kv_lora_rank', 512),
    nope_dim=keys.whole('qk_nope_head_dim', 128), rope_dim=rope_dim, value_dim=keys.whole('v_head_dim', 128),
    rope=rotary.rope(keys, layout=layout))


def _experts(keys: Keys) -> spec.MoE:
  keys.only('scoring_func', None, 'sigmoid')
  keys.only('topk_method', None, 'noaux_tc')
  keys.only('norm_topk_prob', True, default=True)
  router = SigmoidTopK(top_k=keys.whole('num_experts_per_tok', 8), num_groups=keys.whole('n_group', 8),
                       top_groups=keys.whole('topk_group', 4), scale=keys.number('routed_scaling_factor', 2.5))
  return spec.MoE(num_experts=keys.whole('n_routed_experts', 256, MOST_EXPERTS), hidden=keys.whole('moe_intermediate_size'),
                  router=router, balance=(LossFreeBias(),), num_shared=keys.whole('n_shared_experts', 1))


def ignored(keys: Keys) -> tuple[str, ...]:
  """How the names of tensors begin that are left out: those of layers for multi-token prediction."""
  n = keys.whole('num_hidden_layers', most=MOST_LAYERS)
  more = keys.get('num_nextn_predict_layers', keys.get('num_mtp_layers', 1))
  if not isinstance(more, int) or not 0 <= more <= MOST_LAYERS:
    keys.refuse('num_nextn_predict_layers', 'a whole number is needed')
  return tuple(f'model.layers.{n + i}.' for i in range(more))


def places(model: spec.Transformer, keys: Keys) -> dict[str, Place]:
  """Of all layers."""
  del keys
  return of_layers(model, llama.LAYERS, _parts) | alone(llama.outer(model))


def _parts(layer: spec.Layer, stack) -> Parts:
  parts = llama.norms(llama.PRE_NORM) | _attention_parts(layer.attention)
  if not isinstance(layer.mlp, spec.MoE): return parts | llama.mlp_parts(layer.mlp)
  bias = {'mlp/load_bias': Part('mlp.gate.e_score_correction_bias', 'E')}
  return parts | bias | expert_parts(layer.mlp, 'mlp.')


def _attention_parts(latent: spec.Latent) -> Parts:
  """Each head's query is (unrotated, rotated) and its key and value (unrotated key, value); the latent and the rotated key
  that all heads share come from one matrix."""
  R, rope, nope, value = latent.kv_rank, latent.rope_dim, latent.nope_dim, latent.value_dim
  query = 'q_proj' if latent.query_rank is None else 'q_b_proj'
  layout = 'NH D' if latent.query_rank is None else 'NH R'
  parts = {
    'query_nope/array': Part(f'{query}.weight', layout, ('H', 0, nope + rope)),
    'query_rope/array': Part(f'{query}.weight', layout, ('H', nope, nope + rope)),
    'latent_down/array': Part('kv_a_proj_with_mqa.weight', 'R D', ('R', 0, R + rope)),
    'key_rope/array': Part('kv_a_proj_with_mqa.weight', 'H D', ('H', R, R + rope)),
    'latent_norm/scale': Part('kv_a_layernorm.weight', 'R'),
    'key_up/array': Part('kv_b_proj.weight', 'NH R', ('H', 0, nope + value)),
    'value_up/array': Part('kv_b_proj.weight', 'NH R', ('H', nope, nope + value)),
    'output/array': Part('o_proj.weight', 'D NH')}
  if latent.query_rank is not None:
    parts |= {'query_down/array': Part('q_a_proj.weight', 'R D'), 'query_norm/scale': Part('q_a_layernorm.weight', 'R')}
  return {f'attention/{path}': _named(part) for path, part in parts.items()}


def _named(part: Part) -> Part:
  return Part(f'self_attn.{part.name}', part.layout, part.cut)
