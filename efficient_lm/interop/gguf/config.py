"""What the metadata of a GGUF file says of its model, spelled as a config.json of Hugging Face.

Engines read their own architecture's keys and take the rest from their code (src/llama-model.cpp of llama.cpp), so an
architecture here says both. A key of the architecture that is not understood here may change numbers: it is refused.
"""
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from efficient_lm.errors import IncompatibleError
from efficient_lm.interop.gguf.reader import File, quoted

REQUIRED = object()


class Keys:
  """The keys of an architecture, each taken once by whoever understands it."""

  def __init__(self, file: File):
    self.path, self.metadata = file.path, file.metadata
    self.architecture = self._checked('general.architecture', self.metadata.get('general.architecture'), str)
    self.taken = set()

  def refuse(self, key: str, why: str):
    """Raises IncompatibleError that names the file and the key."""
    raise IncompatibleError(f'{self.path}: {quoted(key)} = {str(self.metadata.get(key))[:60]!r} {why}')

  def take(self, name: str, kind, default: Any = REQUIRED):
    """The value of `{architecture}.{name}`: of type `kind`; one for all layers, where the file lists one for each."""
    key = f'{self.architecture}.{name}'
    self.taken.add(key)
    if key not in self.metadata:
      if default is REQUIRED: raise IncompatibleError(f'{self.path}: {quoted(key)} is missing, which its model needs')
      return default
    return self._checked(key, self.metadata[key], kind)

  def only(self, name: str, *values):
    """Takes a key whose other values stand for something that is not read here."""
    value = self.take(name, type(values[0]), values[0])
    if value not in values: self.refuse(f'{self.architecture}.{name}', f'is not understood: only {values[0]!r} is')

  def check_all_taken(self):
    """Raises IncompatibleError for the first key of the architecture that nobody has taken."""
    for key in self.metadata:
      if key.startswith(f'{self.architecture}.') and key not in self.taken:
        self.refuse(key, 'is not understood, and may change what the model computes')

  def _checked(self, key: str, value, kind):
    if isinstance(value, np.ndarray) and value.size and np.all(value == value[0]): value = value[0].item()
    if kind is float and isinstance(value, float):
      # The file holds float32; the number that was meant is the shortest one that rounds to it.
      if math.isfinite(value): return float(str(np.float32(value)))
    elif kind is bool and isinstance(value, bool): return value
    elif kind is int and isinstance(value, int) and not isinstance(value, bool):
      if value >= 0: return value
    elif kind is str and isinstance(value, str): return value
    raise IncompatibleError(f'{self.path}: {quoted(key)} = {str(value)[:60]!r} must be one {kind.__name__}')


def _shape(keys: Keys, vocab_size: int) -> dict[str, Any]:
  """What all architectures with rotary embedding and RMSNorm share."""
  heads, width = keys.take('attention.head_count', int), keys.take('embedding_length', int)
  if not heads or not width: keys.refuse(f'{keys.architecture}.attention.head_count', 'must be at least 1')
  head_dim = keys.take('attention.key_length', int, width // heads)
  for name in ('attention.value_length', 'rope.dimension_count'): keys.only(name, head_dim)
  keys.only('attention.causal', True)
  keys.only('vocab_size', vocab_size)
  return dict(
    vocab_size=vocab_size, hidden_size=width, num_hidden_layers=keys.take('block_count', int),
    intermediate_size=keys.take('feed_forward_length', int), num_attention_heads=heads,
    num_key_value_heads=keys.take('attention.head_count_kv', int, heads), head_dim=head_dim,
    max_position_embeddings=keys.take('context_length', int),
    rms_norm_eps=keys.take('attention.layer_norm_rms_epsilon', float),
    rope_theta=keys.take('rope.freq_base', float, 10_000.0), rope_scaling=_scaling(keys), hidden_act='silu',
    attention_bias=False)


def _scaling(keys: Keys) -> dict[str, Any] | None:
  kind = keys.take('rope.scaling.type', str, 'none')
  keys.take('rope.scaling.finetuned', bool, False)   # says how the model was trained
  if kind == 'none': return None
  if kind not in ('linear', 'yarn'):
    keys.refuse(f'{keys.architecture}.rope.scaling.type', 'is not read: linear and yarn are')
  scaling = {'rope_type': kind, 'factor': keys.take('rope.scaling.factor', float)}
  if kind == 'linear':
    keys.take('rope.scaling.original_context_length', int, 0)   # of no use to linear scaling
    return scaling
  scaling['original_max_position_embeddings'] = keys.take('rope.scaling.original_context_length', int)
  for name, meant in (('yarn_beta_fast', 'beta_fast'), ('yarn_beta_slow', 'beta_slow')):
    if (value := keys.take(f'rope.scaling.{name}', float, None)) is not None: scaling[meant] = value
  keys.only('rope.scaling.yarn_ext_factor', 1.0)
  for name in ('attn_factor', 'yarn_attn_factor'): keys.only(f'rope.scaling.{name}', 1.0)
  return scaling


def _llama(keys: Keys, vocab_size: int) -> dict[str, Any]:
  config = _shape(keys, vocab_size) | dict(model_type='llama', architectures=['LlamaForCausalLM'], mlp_bias=False)
  experts, active = keys.take('expert_count', int, 0), keys.take('expert_used_count', int, 0)
  if not experts: return config
  return config | dict(model_type='mixtral', architectures=['MixtralForCausalLM'], num_local_experts=experts,
                       num_experts_per_tok=active, sliding_window=None)


def _qwen2(keys: Keys, vocab_size: int) -> dict[str, Any]:
  return _shape(keys, vocab_size) | dict(model_type='qwen2', architectures=['Qwen2ForCausalLM'], use_sliding_window=False)


def _qwen3(keys: Keys, vocab_size: int) -> dict[str, Any]:
  return _shape(keys, vocab_size) | dict(model_type='qwen3', architectures=['Qwen3ForCausalLM'], use_sliding_window=False)


def _experts(keys: Keys, normalised: bool, shared: bool = False) -> dict[str, Any]:
  """No key says whether the gates of the chosen experts sum to one: each engine has it in its code. shared: whether there
  is an expert that sees every token, which no key has to say either."""
  keys.only('expert_weights_norm', normalised)
  keys.only('expert_weights_scale', 1.0, 0.0)
  keys.only('expert_gating_func', 1)   # softmax
  keys.only('expert_shared_count', 0, int(shared))
  return dict(num_experts=keys.take('expert_count', int), num_experts_per_tok=keys.take('expert_used_count', int),
              norm_topk_prob=normalised)


def _qwen3moe(keys: Keys, vocab_size: int) -> dict[str, Any]:
  return _shape(keys, vocab_size) | _experts(keys, normalised=True) | dict(
    model_type='qwen3_moe', architectures=['Qwen3MoeForCausalLM'], use_sliding_window=False, decoder_sparse_step=1,
    mlp_only_layers=[], moe_intermediate_size=keys.take('expert_feed_forward_length', int))


def _qwen2moe(keys: Keys, vocab_size: int) -> dict[str, Any]:
  return _shape(keys, vocab_size) | _experts(keys, normalised=False, shared=True) | dict(
    model_type='qwen2_moe', architectures=['Qwen2MoeForCausalLM'], use_sliding_window=False, decoder_sparse_step=1,
    mlp_only_layers=[], qkv_bias=True, moe_intermediate_size=keys.take('expert_feed_forward_length', int),
    shared_expert_intermediate_size=keys.take('expert_shared_feed_forward_length', int))


def _olmoe(keys: Keys, vocab_size: int) -> dict[str, Any]:
  config = _shape(keys, vocab_size) | _experts(keys, normalised=False)
  keys.only('expert_feed_forward_length', config['intermediate_size'])
  clip = keys.take('attention.clamp_kqv', float, 0.0)
  return config | dict(model_type='olmoe', architectures=['OlmoeForCausalLM'], clip_qkv=clip or None)


def _olmo2(keys: Keys, vocab_size: int) -> dict[str, Any]:
  return _shape(keys, vocab_size) | dict(model_type='olmo2', architectures=['Olmo2ForCausalLM'])


def _gemma(keys: Keys, vocab_size: int, largest: int) -> dict[str, Any]:
  """largest: the number of layers of the one size whose queries are scaled by the width of a head's share of the model."""
  config = _shape(keys, vocab_size)
  share = config['hidden_size'] // config['num_attention_heads']
  return config | dict(query_pre_attn_scalar=share if config['num_hidden_layers'] == largest else config['head_dim'],
                       hidden_activation='gelu_pytorch_tanh', hidden_act='gelu_pytorch_tanh', tie_word_embeddings=True)


def _gemma2(keys: Keys, vocab_size: int) -> dict[str, Any]:
  window = keys.take('attention.sliding_window', int, 4096)
  return _gemma(keys, vocab_size, 46) | dict(
    model_type='gemma2', architectures=['Gemma2ForCausalLM'], sliding_window=window,
    attn_logit_softcapping=keys.take('attn_logit_softcapping', float, 50.0),
    final_logit_softcapping=keys.take('final_logit_softcapping', float, 30.0))


def _gemma3(keys: Keys, vocab_size: int) -> dict[str, Any]:
  keys.only('attention.sliding_window_pattern', 6)
  config = _gemma(keys, vocab_size, 62)
  return config | dict(
    model_type='gemma3_text', architectures=['Gemma3ForCausalLM'], sliding_window=keys.take('attention.sliding_window', int),
    sliding_window_pattern=6, rope_local_base_freq=keys.take('rope.freq_base_swa', float, 10_000.0),
    rope_theta=keys.take('rope.freq_base', float, 1_000_000.0), attn_logit_softcapping=None,
    final_logit_softcapping=keys.take('final_logit_softcapping', float, None))


def _gpt2(keys: Keys, vocab_size: int) -> dict[str, Any]:
  heads = keys.take('attention.head_count', int)
  keys.only('attention.head_count_kv', heads)
  keys.only('vocab_size', vocab_size)
  keys.only('attention.causal', True)
  return dict(
    model_type='gpt2', architectures=['GPT2LMHeadModel'], vocab_size=vocab_size, n_embd=keys.take('embedding_length', int),
    n_layer=keys.take('block_count', int), n_head=heads, n_positions=keys.take('context_length', int),
    n_inner=keys.take('feed_forward_length', int), layer_norm_epsilon=keys.take('attention.layer_norm_epsilon', float),
    activation_function='gelu_new')


@dataclasses.dataclass(frozen=True)
class Architecture:
  """How an architecture is read. config(keys, vocab_size): its config; names: of `gguf.names`; permuted: whether rows of
  queries and keys lie as neighbours that are rotated together; plus_one: whether norms are stored as 1 + weight;
  transposed: whether Hugging Face stores its matrices as (inputs, outputs)."""
  config: Callable[[Keys, int], dict[str, Any]]
  names: str
  permuted: bool = False
  plus_one: bool = False
  transposed: bool = False


ARCHITECTURES = {
  'llama': Architecture(_llama, 'llama', permuted=True), 'qwen2': Architecture(_qwen2, 'llama'),
  'qwen3': Architecture(_qwen3, 'llama'), 'qwen2moe': Architecture(_qwen2moe, 'llama'),
  'qwen3moe': Architecture(_qwen3moe, 'llama'),
  'olmoe': Architecture(_olmoe, 'llama'), 'olmo2': Architecture(_olmo2, 'post_norm'),
  'gemma2': Architecture(_gemma2, 'sandwich', plus_one=True), 'gemma3': Architecture(_gemma3, 'sandwich', plus_one=True),
  'gpt2': Architecture(_gpt2, 'gpt2', transposed=True)}


def architecture_of(file: File) -> Architecture:
  """Raises IncompatibleError for one that is not known, and for files that hold something else than a whole model."""
  keys = Keys(file)
  if keys.architecture not in ARCHITECTURES:
    keys.refuse('general.architecture', f'is not read: {", ".join(ARCHITECTURES)} are')
  if file.metadata.get('general.type', 'model') != 'model': keys.refuse('general.type', 'is not read: only a model is')
  if file.metadata.get('split.count', 1) not in (0, 1): keys.refuse('split.count', 'is not read: join the parts of the file')
  return ARCHITECTURES[keys.architecture]


def config_of(file: File) -> dict[str, Any]:
  """The config.json of the file's model. Raises IncompatibleError for what is missing or not understood, in one line."""
  architecture, keys = architecture_of(file), Keys(file)
  embedding = file.tensors.get('token_embd.weight')
  if embedding is None: raise IncompatibleError(f'{file.path}: the tensor token_embd.weight is missing')
  config = architecture.config(keys, embedding.shape[0])
  keys.check_all_taken()
  _check_fits(file, config)
  config['tie_word_embeddings'] = 'output.weight' not in file.tensors
  if keys.architecture == 'llama': _biases(file, config)
  if 'rope_freqs.weight' in file.tensors: config['rope_scaling'] = _llama3(file, config, keys)
  return config | {'torch_dtype': 'float32'}


def _check_fits(file: File, config: dict[str, Any]):
  """Raises IncompatibleError where sizes that the metadata gives are not those of the first layer: all that follows believes
  them, and makes as many layers, heads and experts."""
  layers = {name.split('.')[1] for name in file.tensors if name.startswith('blk.')}
  number = config.get('num_hidden_layers', config.get('n_layer'))
  if number != len(layers): raise IncompatibleError(f'{file.path}: has {len(layers)} layers, not block_count = {number}')
  if config['model_type'] == 'gpt2':
    width, hidden = config['n_embd'], config['n_inner']
    wanted = {'token_embd': (config['vocab_size'], width), 'position_embd': (config['n_positions'], width),
              'blk.0.attn_qkv': (3 * width, width), 'blk.0.ffn_up': (hidden, width)}
  else:
    width, hidden, head_dim = config['hidden_size'], config['intermediate_size'], config['head_dim']
    experts = config.get('num_experts', config.get('num_local_experts'))
    wanted = {'token_embd': (config['vocab_size'], width),
              'blk.0.attn_q': (config['num_attention_heads'] * head_dim, width),
              'blk.0.attn_k': (config['num_key_value_heads'] * head_dim, width),
              **({'blk.0.ffn_gate_inp': (experts, width)} if experts else {'blk.0.ffn_up': (hidden, width)})}
    stacked = [entry.shape[0] for name, entry in file.tensors.items() if name.endswith('_exps.weight')]
    if any(number != experts for number in stacked):
      raise IncompatibleError(f'{file.path}: has {max(stacked)} experts in a tensor, its metadata says {experts}')
  for name, shape in wanted.items():
    entry = file.tensors.get(f'{name}.weight')
    if entry is None: raise IncompatibleError(f'{file.path}: the tensor {name}.weight is missing')
    if entry.shape != shape:
      raise IncompatibleError(f'{file.path}: {name}.weight has shape {list(entry.shape)}, its metadata says {list(shape)}')


def _biases(file: File, config: dict[str, Any]):
  """Llamas have them or not, and no key says so."""
  config['attention_bias'] = 'blk.0.attn_q.bias' in file.tensors
  config['mlp_bias'] = 'blk.0.ffn_up.bias' in file.tensors


def _llama3(file: File, config: dict[str, Any], keys: Keys) -> dict[str, Any]:
  """Llama 3.1 divides its frequencies by a tensor of H / 2 numbers, which follow from four; three of these are the same in
  all published models. Raises IncompatibleError where the tensor is not what follows."""
  if keys.architecture != 'llama' or config['rope_scaling']:
    raise IncompatibleError(f'{file.path}: rope_freqs.weight is not understood beside this architecture or another scaling')
  divisors = np.asarray(file.numbers('rope_freqs.weight'), np.float64).reshape(-1)
  factor = float(divisors.max())
  low, high, length = 1.0, 4.0, 8192
  half = config['head_dim'] // 2
  turns = length / (2 * np.pi * config['rope_theta'] ** (np.arange(half) / half))   # over the original length
  blend = np.clip((turns - low) / (high - low), 0, 1)
  if divisors.shape != (half,) or not np.allclose(divisors, 1 / ((1 - blend) / factor + blend), rtol=1e-4, atol=0):
    raise IncompatibleError(f'{file.path}: rope_freqs.weight is not the scaling of Llama 3.1, and not understood')
  return {'rope_type': 'llama3', 'factor': factor, 'low_freq_factor': low, 'high_freq_factor': high,
          'original_max_position_embeddings': length}
