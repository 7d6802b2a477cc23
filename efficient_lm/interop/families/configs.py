"""Descriptions of models as the config.json of a family: the inverse of what the families read.

A config is a candidate until it has been read back: the family whose config means the very description is the one that says
it, and a model that none says is refused, with what the nearest differs in. Every key is spelled as transformers 5 spells it
and, beside that, as 4 did (`rope_theta`, `rope_scaling`, `torch_dtype`): a reader that knows one spelling alone takes the
default for the other, silently.
"""
import dataclasses
from typing import Any

from efficient_lm.errors import ConfigError, IncompatibleError
from efficient_lm.interop import families
from efficient_lm.interop.families import llama
from efficient_lm.models import spec
from efficient_lm.models.moe.routing import SigmoidTopK, SoftmaxTopK

ACTIVATIONS = {'silu': 'silu', 'gelu': 'gelu', 'gelu_tanh': 'gelu_pytorch_tanh', 'relu': 'relu', 'relu2': 'relu2'}


def config_of(model: spec.Transformer, length: int, alike) -> dict[str, Any]:
  """The config.json of a description with a stack for each layer, made for texts of `length` tokens. `alike` brings what a
  config means into the spelling of `model`. Raises IncompatibleError where no family says the model."""
  nearest, fewest = '', None
  kinds = sorted(families.FAMILIES, key=lambda kind: kind == 'gpt2')   # OPT's matrices lie as all others do
  for kind in kinds:
    config = _candidate(kind, model, length)
    if config is None: continue
    config = {'architectures': [families.FAMILIES[kind].architecture], 'model_type': kind, **config}
    try: meant = alike(families.spec_of(config))
    except ConfigError as error: different = [str(error)]
    else:
      different = list(differences(model, meant))
      if not different: return config
    if fewest is None or len(different) < fewest: nearest, fewest = f'{kind} would have {different[0]}', len(different)
  raise IncompatibleError(f'no family of Hugging Face computes what this model does: {nearest or "none has such layers"}')


def differences(one, other, path: str = 'model'):
  """Where a description differs from another, 'path = value of the other instead of value of the one'."""
  if type(one) is type(other) and dataclasses.is_dataclass(one):
    for field in dataclasses.fields(one):
      yield from differences(getattr(one, field.name), getattr(other, field.name), f'{path}.{field.name}')
  elif isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
    for i, pair in enumerate(zip(one, other)): yield from differences(*pair, f'{path}[{i}]')
  elif one != other: yield f'{path} = {other} instead of {one}'


def _candidate(kind: str, model: spec.Transformer, length: int) -> dict[str, Any] | None:
  """A config of the family, right where the model is one of its kind; None where its layers are of other classes."""
  first = model.stacks[0]
  mixtures = [stack.mlp for stack in model.stacks if isinstance(stack.mlp, spec.MoE)]
  latent, gated = isinstance(first.attention, spec.Latent), not isinstance(first.mlp, spec.Plain)
  if any(type(stack.attention) is not type(first.attention) for stack in model.stacks): return None
  if kind in ('gpt2', 'opt'): return None if latent or gated or mixtures else _with_positions(kind, model)
  if not gated or kind.startswith('gemma') != isinstance(first.block, spec.SandwichNorm): return None
  if kind == 'deepseek_v3': return _latent(model, mixtures, length) if latent and mixtures else None
  if latent or bool(mixtures) != (kind in ('mixtral', 'olmoe', 'qwen2_moe', 'qwen3_moe')): return None
  config = _shared(model, length) | _grouped(kind, first.attention, model)
  if mixtures: return config | _mixture(kind, model, mixtures[0]) if _by_softmax(mixtures) else None
  if not isinstance(first.mlp, spec.Gated): return None
  config |= dict(intermediate_size=first.mlp.hidden, hidden_act=ACTIVATIONS[first.mlp.activation])
  if kind.startswith('gemma'): return config | _gemma(kind, model)
  if kind == 'llama': config['mlp_bias'] = bool(first.mlp.biases)
  return config


def _shared(model: spec.Transformer, length: int) -> dict[str, Any]:
  """What all but GPT-2 and OPT have."""
  return dict(vocab_size=model.vocab_size, hidden_size=model.dim, num_hidden_layers=len(model.stacks),
              max_position_embeddings=length, rms_norm_eps=model.norm_eps, hidden_act='silu', **_ends(model))


def _ends(model: spec.Transformer) -> dict[str, Any]:
  return dict(tie_word_embeddings=model.tied, dtype=model.dtype, torch_dtype=model.dtype)


def _grouped(kind: str, attention: spec.GroupedQuery, model: spec.Transformer) -> dict[str, Any]:
  """Grouped-query attention, and which layers have a window."""
  config = dict(num_attention_heads=attention.num_heads, num_key_value_heads=attention.num_kv_heads,
                head_dim=attention.head_dim, **_rope(attention.rope))
  if kind in ('llama', 'qwen3', 'olmo2', 'olmoe', 'qwen3_moe', 'gemma2', 'gemma3_text'):
    config['attention_bias'] = bool(attention.biases)
  windows = [stack.attention.window for stack in model.stacks]
  if kind in ('mistral', 'mixtral'): config['sliding_window'] = attention.window
  if kind in ('qwen2', 'qwen3'): config |= _windows(windows) | dict(
    use_sliding_window=any(windows), max_window_layers=next((i for i, window in enumerate(windows) if window), len(windows)))
  return config


def _windows(windows: list[int | None]) -> dict[str, Any]:
  types = [llama.WINDOWED if window else llama.FULL for window in windows]
  return dict(sliding_window=next((window for window in windows if window), None), layer_types=types)


def _rope(rope: spec.Rope | None) -> dict[str, Any]:
  """In both spellings."""
  if rope is None: return {}
  scaling = _scaling(rope.scaling)
  return dict(rope_theta=rope.theta, rope_scaling=scaling,
              rope_parameters={'rope_type': 'default', **(scaling or {}), 'rope_theta': rope.theta})


def _scaling(scaling) -> dict[str, Any] | None:
  match scaling:
    case None: return None
    case spec.LinearScaling(): return dict(rope_type='linear', factor=scaling.factor)
    case spec.Llama3Scaling():
      return dict(rope_type='llama3', factor=scaling.factor, low_freq_factor=scaling.low_freq_factor,
                  high_freq_factor=scaling.high_freq_factor, original_max_position_embeddings=scaling.original_length)
    case spec.Yarn():
      found = {field.name: getattr(scaling, field.name) for field in dataclasses.fields(scaling)}
      length = found.pop('original_length')
      said = {name: value for name, value in found.items() if value is not None}
      return dict(rope_type='yarn', original_max_position_embeddings=length, **said)
  raise IncompatibleError(f'{type(scaling).__name__} is a scaling of RoPE that has no name elsewhere')


def _by_softmax(mixtures: list[spec.MoE]) -> bool:
  return all(isinstance(mixture.router, SoftmaxTopK) for mixture in mixtures)


def _mixture(kind: str, model: spec.Transformer, mixture: spec.MoE) -> dict[str, Any]:
  """Experts, and which layers have any."""
  config = {'num_local_experts' if kind == 'mixtral' else 'num_experts': mixture.num_experts,
            'num_experts_per_tok': mixture.router.top_k, 'intermediate_size': mixture.hidden}
  if kind != 'mixtral': config['norm_topk_prob'] = mixture.router.normalize
  if not kind.startswith('qwen'): return config
  dense = [i for i, stack in enumerate(model.stacks) if not isinstance(stack.mlp, spec.MoE)]
  hidden = next((stack.mlp.hidden for stack in model.stacks if isinstance(stack.mlp, spec.Gated)), mixture.hidden)
  config |= dict(moe_intermediate_size=mixture.hidden, intermediate_size=hidden, mlp_only_layers=dense,
                 decoder_sparse_step=1, use_sliding_window=False)
  if kind == 'qwen3_moe': return config
  biases = model.stacks[0].attention.biases
  shared = mixture.shared.inner.hidden if isinstance(mixture.shared, spec.SigmoidGated) else 0
  return config | dict(shared_expert_intermediate_size=shared, qkv_bias=bool(biases))


def _latent(model: spec.Transformer, mixtures: list[spec.MoE], length: int) -> dict[str, Any] | None:
  """DeepSeek-V3's; its shared experts are one layer as wide as all of them."""
  attention, mixture = model.stacks[0].attention, mixtures[0]
  if not isinstance(mixture.router, SigmoidTopK) or not isinstance(mixture.shared, spec.Gated): return None
  dense = [stack.mlp for stack in model.stacks if isinstance(stack.mlp, spec.Gated)]
  router = mixture.router
  return _shared(model, length) | _rope(attention.rope) | dict(
    num_attention_heads=attention.num_heads, num_key_value_heads=attention.num_heads, q_lora_rank=attention.query_rank,
    kv_lora_rank=attention.kv_rank, qk_rope_head_dim=attention.rope_dim, qk_nope_head_dim=attention.nope_dim,
    v_head_dim=attention.value_dim, rope_interleave=attention.rope.layout == 'interleaved', attention_bias=False,
    intermediate_size=dense[0].hidden if dense else mixture.hidden, first_k_dense_replace=len(dense),
    n_routed_experts=mixture.num_experts, moe_intermediate_size=mixture.hidden,
    n_shared_experts=mixture.shared.hidden // mixture.hidden, num_experts_per_tok=router.top_k, n_group=router.num_groups,
    topk_group=router.top_groups, routed_scaling_factor=router.scale, norm_topk_prob=True, num_nextn_predict_layers=0,
    scoring_func='sigmoid', topk_method='noaux_tc')


def _gemma(kind: str, model: spec.Transformer) -> dict[str, Any]:
  """Gemma 2's, or Gemma 3's with its two kinds of layers."""
  attention, ends = [stack.attention for stack in model.stacks], model.ends
  activation = ACTIVATIONS[model.stacks[0].mlp.activation]
  scalar = (attention[0].scale or attention[0].head_dim ** -0.5) ** -2
  scalar = next((one for one in (round(scalar), scalar) if one ** -0.5 == attention[0].scale), scalar)
  config = dict(hidden_act=activation, hidden_activation=activation, query_pre_attn_scalar=scalar,
                final_logit_softcapping=ends.softcap, attn_logit_softcapping=attention[0].softcap,
                **_windows([one.window for one in attention]))
  if kind == 'gemma2': return config
  full, local = (next((one.rope for one in attention if bool(one.window) == windowed), None) for windowed in (False, True))
  full, local = full or spec.Rope(theta=1e6), local or spec.Rope(theta=1e4)
  return config | _rope(full) | dict(rope_local_base_freq=local.theta, rope_parameters={
    llama.FULL: _rope(full)['rope_parameters'], llama.WINDOWED: _rope(local)['rope_parameters']})


def _with_positions(kind: str, model: spec.Transformer) -> dict[str, Any] | None:
  """GPT-2's and OPT's."""
  attention, mlp, positions = model.stacks[0].attention, model.stacks[0].mlp, model.ends.positions
  if positions is None: return None
  if kind == 'opt':
    if mlp.activation != 'relu': return None
    return dict(hidden_size=model.dim, num_attention_heads=attention.num_heads, num_hidden_layers=len(model.stacks),
                ffn_dim=mlp.hidden, activation_function=ACTIVATIONS[mlp.activation], do_layer_norm_before=True,
                word_embed_proj_dim=model.dim, enable_bias=True, layer_norm_elementwise_affine=True,
                max_position_embeddings=positions.length, vocab_size=model.vocab_size, **_ends(model))
  activation = {'gelu_tanh': 'gelu_new'}.get(mlp.activation, ACTIVATIONS[mlp.activation])
  return dict(n_embd=model.dim, n_head=attention.num_heads, n_layer=len(model.stacks), n_inner=mlp.hidden,
              activation_function=activation, layer_norm_epsilon=model.norm_eps, n_positions=positions.length,
              n_ctx=positions.length,   # the converter of llama.cpp reads this one
              scale_attn_weights=attention.scale is None, vocab_size=model.vocab_size, **_ends(model))
