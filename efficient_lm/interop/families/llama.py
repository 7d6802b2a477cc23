"""Llama and those that differ from it in a few words: Mistral, Qwen2, Qwen3, OLMo 2; SmolLM and TinyLlama call themselves
llama. Names of tensors are shared by all, and by the mixtures of `mixtures.py`."""
from efficient_lm.interop.families import rotary
from efficient_lm.interop.families.keys import MOST_LAYERS, Keys
from efficient_lm.interop.families.places import Part, Parts, Place, alone, biased, of_layers, stacks_of
from efficient_lm.models import spec

LAYERS = 'model.layers.{l}.'
ALL = ('query', 'key', 'value', 'output')
# Names of projections, and the letters of their tensors: (outputs, inputs).
ATTENTION = {'query': ('q_proj', 'NH D', 'NH'), 'key': ('k_proj', 'KH D', 'KH'), 'value': ('v_proj', 'KH D', 'KH'),
             'output': ('o_proj', 'D NH', 'D')}
MLP = {'gate': ('gate_proj', 'F D', 'F'), 'up': ('up_proj', 'F D', 'F'), 'down': ('down_proj', 'D F', 'D')}
PRE_NORM = {'attention_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm'}
POST_NORM = {'attention_out_norm': 'post_attention_layernorm', 'mlp_out_norm': 'post_feedforward_layernorm'}
ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh',
               'relu': 'relu', 'relu2': 'relu2'}
OWN_HEAD_DIM = ('qwen3', 'gemma2', 'gemma3_text')   # which must say it
WINDOWED, FULL = 'sliding_attention', 'full_attention'


# ------------------------------------------------------------------ what a config says

def dense(keys: Keys) -> spec.Transformer:
  """The description of a model without experts."""
  kind = keys.get('model_type')
  biases = {'qwen2': ALL[:3], 'mistral': ()}.get(kind)   # the others say so
  if biases is None: biases = ALL if keys.flag('attention_bias', False) else ()
  qk_norm = {'qwen3': 'H', 'olmo2': 'NH'}.get(kind, '')
  mlp = feed_forward(keys, 'mlp_bias' if kind == 'llama' else None)
  layers = [spec.Layer(attention=attention(keys, biases, qk_norm, window), mlp=mlp) for window in windows(keys)]
  block = spec.PostNorm() if kind == 'olmo2' else spec.PreNorm()
  return model(keys, layers, block, norm_eps=keys.number('rms_norm_eps', 1e-5 if kind == 'olmo2' else 1e-6))


def model(keys: Keys, layers: list[spec.Layer], block=None, tied: bool = False, **more) -> spec.Transformer:
  """The description around the layers."""
  return spec.Transformer(
    vocab_size=keys.whole('vocab_size'), dim=keys.whole('hidden_size'), stacks=stacks_of(layers, block),
    tied=keys.flag('tie_word_embeddings', tied), dtype=dtype(keys), **more)


def dtype(keys: Keys) -> str:
  """That of the computation: the one that the weights are stored in, as in transformers; float32 where none is named."""
  new, old = keys.get('dtype'), keys.get('torch_dtype')
  if new is not None and old is not None and new != old: keys.refuse('torch_dtype', f'says something else than dtype, {new}')
  return keys.only('dtype' if old is None else 'torch_dtype', *spec.DTYPES, default='float32')


def attention(keys: Keys, biases: tuple[str, ...], qk_norm: str = '', window: int | None = None, rope=None, **more):
  """Grouped-query attention of a layer; `rope` None: the one of all layers. A head_dim that is missing is what heads divide
  the width into, in families whose transformers class has no other default."""
  heads, dim, kind = keys.whole('num_attention_heads'), keys.whole('hidden_size'), keys.get('model_type')
  divided = None if kind in OWN_HEAD_DIM else dim // heads
  if divided and keys.get('head_dim') is None and dim % heads:
    keys.refuse('num_attention_heads', f'must divide hidden_size = {dim}, or head_dim be given')
  stated = kind not in ('llama', 'olmo2', 'olmoe') and 'num_key_value_heads' not in keys.config
  return spec.GroupedQuery(
    num_heads=heads, num_kv_heads=keys.whole('num_key_value_heads', None if stated else heads),
    head_dim=keys.whole('head_dim', divided or None), rope=rope or rotary.rope(keys, 1e6 if kind == 'mixtral' else 1e4),
    qk_norm=qk_norm, window=window, biases=biases, **more)


def feed_forward(keys: Keys, bias_key: str | None = None):
  """A gated layer; the activation of which is SiLU where the config names none."""
  activation = activation_of(keys, 'hidden_act', 'silu')
  biases = ('gate', 'up', 'down') if bias_key and keys.flag(bias_key, False) else ()
  hidden = keys.whole('intermediate_size')
  if activation == 'silu' and not biases: return spec.SwiGLU(hidden=hidden)
  return spec.Gated(hidden=hidden, activation=activation, biases=biases)


def activation_of(keys: Keys, key: str, default: str) -> str:
  """The activation that a key names, in our words."""
  return ACTIVATIONS[keys.only(key, *ACTIVATIONS, default=default)]


def windows(keys: Keys) -> list[int | None]:
  """Of each layer, how many keys a query sees, itself included; None for all. Qwen has a window only where
  `use_sliding_window` says so, and then in layers from `max_window_layers` on; `layer_types` says it layer by layer."""
  n, kind = keys.whole('num_hidden_layers', most=MOST_LAYERS), keys.get('model_type')
  if kind in ('mistral', 'mixtral'): return [whole_or_none(keys, 'sliding_window')] * n
  if kind not in ('qwen2', 'qwen3'): return [None] * n
  used, first = keys.flag('use_sliding_window', False), keys.get('max_window_layers', 28)
  types = keys.listed('layer_types', str)
  if not used:
    if types and WINDOWED in types: keys.refuse('layer_types', 'has windows, and use_sliding_window is not true')
    keys.get('sliding_window')
    return [None] * n
  window = whole_or_none(keys, 'sliding_window')
  if not isinstance(first, int): keys.refuse('max_window_layers', 'a whole number is needed')
  types = types or [WINDOWED if window and i >= first else FULL for i in range(n)]
  return [window if windowed else None for windowed in windowed_layers(keys, types)]


def windowed_layers(keys: Keys, types: list[str]) -> list[bool]:
  """Of each layer, whether it has a window, by its type."""
  n = keys.whole('num_hidden_layers', most=MOST_LAYERS)
  unknown = [one for one in types if one not in (WINDOWED, FULL)]
  if len(types) != n: keys.refuse('layer_types', f'has {len(types)} of num_hidden_layers = {n}')
  if unknown: keys.refuse('layer_types', f'{unknown[0]!r} cannot be read: there are {FULL} and {WINDOWED}')
  return [one == WINDOWED for one in types]


def whole_or_none(keys: Keys, key: str) -> int | None:
  """As `Keys.whole`; None where it is missing or null."""
  return None if keys.get(key) is None else keys.whole(key)


# ------------------------------------------------------------------ where its tensors are

def places(model: spec.Transformer, keys: Keys) -> dict[str, Place]:
  """Of a model without experts."""
  del keys
  return of_layers(model, LAYERS, dense_parts) | alone(outer(model))


def outer(model: spec.Transformer, plus: float = 0.0) -> Parts:
  """What belongs to no layer."""
  parts = {'embed/array': Part('model.embed_tokens.weight', 'V D'), 'norm/scale': Part('model.norm.weight', 'D', plus=plus)}
  return parts if model.tied else parts | {'own_head/array': Part('lm_head.weight', 'V D')}


def dense_parts(layer: spec.Layer, stack) -> Parts:
  """Of a layer without experts."""
  names = POST_NORM if isinstance(stack.block, spec.PostNorm) else PRE_NORM
  return norms(names) | attention_parts(layer.attention) | mlp_parts(layer.mlp)


def norms(names: dict[str, str], plus: float = 0.0) -> Parts:
  """Of the norms of a layer, by their path."""
  return {f'{path}/scale': Part(f'{name}.weight', 'D', plus=plus) for path, name in names.items()}


def attention_parts(attention: spec.GroupedQuery, plus: float = 0.0) -> Parts:
  """`plus`: of the norms of queries and keys."""
  parts = {}
  for path, (name, layout, outputs) in ATTENTION.items():
    bias = Part(f'self_attn.{name}.bias', outputs) if path in attention.biases else None
    parts |= biased(f'attention/{path}', Part(f'self_attn.{name}.weight', layout), bias)
  if not attention.qk_norm: return parts
  letters = {'query': attention.qk_norm, 'key': attention.qk_norm.replace('N', 'K')}
  return parts | {f'attention/{side}_norm/scale': Part(f'self_attn.{side[0]}_norm.weight', letters[side], plus=plus)
                  for side in ('query', 'key')}


def mlp_parts(mlp, path: str = 'mlp', prefix: str = 'mlp.') -> Parts:
  """Of a gated layer at `path`; `prefix` begins the names of its tensors."""
  parts = {}
  for own, (name, layout, outputs) in MLP.items():
    bias = Part(f'{prefix}{name}.bias', outputs) if own in getattr(mlp, 'biases', ()) else None
    parts |= biased(f'{path}/{own}', Part(f'{prefix}{name}.weight', layout), bias)
  return parts
