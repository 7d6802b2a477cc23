"""Families of models, by the `model_type` of their config.json: what the config means, and where their tensors are.

Adding one is a file here with two functions, and a line in FAMILIES; a fixture that transformers has written and computed
(`tests/interop/make_fixtures.py`) is its test. Light: nothing here loads JAX.
"""
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from efficient_lm.errors import ConfigError
from efficient_lm.interop.families import deepseek, gemma, gpt, llama, mixtures
from efficient_lm.interop.families.keys import Keys
from efficient_lm.interop.families.places import Part, Place
from efficient_lm.models import spec

__all__ = ['FAMILIES', 'Family', 'Part', 'Place', 'family_of', 'places', 'spec_of']

LARGEST_PRODUCT = 1 << 18   # layers times experts: more than any model has


@dataclasses.dataclass(frozen=True)
class Family:
  """architecture: the class whose weights are read, as config.json names it. describe: what a config means; places: where
  the arrays come from. prefix: of all names but the head's, which some checkpoints leave out. buffers: how names end that
  are no parameters; ignored: how they begin, of parts that take no part."""
  architecture: str
  describe: Callable[[Keys], spec.Transformer]
  places: Callable[[spec.Transformer, Keys], dict[str, Place]]
  prefix: str = 'model.'
  buffers: tuple[str, ...] = ('.rotary_emb.inv_freq',)
  ignored: Callable[[Keys], tuple[str, ...]] = lambda keys: ()


FAMILIES = {
  'llama': Family('LlamaForCausalLM', llama.dense, llama.places),
  'mistral': Family('MistralForCausalLM', llama.dense, llama.places),
  'qwen2': Family('Qwen2ForCausalLM', llama.dense, llama.places),
  'qwen3': Family('Qwen3ForCausalLM', llama.dense, llama.places),
  'olmo2': Family('Olmo2ForCausalLM', llama.dense, llama.places),
  'mixtral': Family('MixtralForCausalLM', mixtures.mixture, mixtures.places),
  'olmoe': Family('OlmoeForCausalLM', mixtures.mixture, mixtures.places),
  'qwen2_moe': Family('Qwen2MoeForCausalLM', mixtures.mixture, mixtures.places),
  'qwen3_moe': Family('Qwen3MoeForCausalLM', mixtures.mixture, mixtures.places),
  'deepseek_v3': Family('DeepseekV3ForCausalLM', deepseek.latent, deepseek.places, ignored=deepseek.ignored),
  'gemma2': Family('Gemma2ForCausalLM', gemma.gemma, gemma.places),
  'gemma3_text': Family('Gemma3ForCausalLM', gemma.gemma, gemma.places),
  'gpt2': Family('GPT2LMHeadModel', gpt.gpt2, gpt.gpt2_places, 'transformer.', ('.attn.bias', '.attn.masked_bias')),
  'opt': Family('OPTForCausalLM', gpt.opt, gpt.opt_places),
}


def spec_of(config: Mapping[str, Any], where: str = 'config.json') -> spec.Transformer:
  """What a config.json means. Raises ConfigError for the first key whose value, or which itself, cannot be read; `where`
  begins its message."""
  keys, family = Keys(config, where), family_of(config, where)
  if keys.get('quantization_config') or keys.get('compression_config'):
    keys.refuse('quantization_config', 'quantized weights cannot be read: save the model dequantized')
  named = keys.listed('architectures', str, [family.architecture])
  if family.architecture not in named: keys.refuse('architectures', f'only {family.architecture} can be read')
  model = family.describe(keys)
  keys.finish()
  _check(model, where)
  return model


def places(model: spec.Transformer, config: Mapping[str, Any]) -> dict[str, Place]:
  """For each array of the model that `spec_of` has described, by its path, what it is made of."""
  return family_of(config).places(model, Keys(config, 'config.json'))


def family_of(config: Mapping[str, Any], where: str = 'config.json') -> Family:
  """Raises ConfigError for a `model_type` that is not among FAMILIES."""
  kind = config.get('model_type')
  if isinstance(kind, str) and kind in FAMILIES: return FAMILIES[kind]
  raise ConfigError(f'{where}: model_type', kind, f'is a family that cannot be read; there are {", ".join(FAMILIES)}')


def _check(model: spec.Transformer, where: str):
  """Raises ConfigError for what the description refuses of itself."""
  for node in _nodes(model):
    for field, value, fix in getattr(node, 'check', tuple)():
      raise ConfigError(f'{where}: {type(node).__name__}.{field}', value, fix)
    if isinstance(node, spec.MoE) and node.num_experts * sum(stack.num_layers for stack in model.stacks) > LARGEST_PRODUCT:
      raise ConfigError(f'{where}: number of experts', node.num_experts, 'is more, times the layers, than any model has')


def _nodes(value):
  """All descriptions in a description."""
  if isinstance(value, tuple):
    for one in value: yield from _nodes(one)
  elif dataclasses.is_dataclass(value):
    yield value
    for field in dataclasses.fields(value): yield from _nodes(getattr(value, field.name))
