"""A config.json as it is read: every key that changes a number is asked for by name, and what nobody asked for is refused.

A key that is unknown is refused rather than warned of: it may be the one that changes the numbers, and a model that is
subtly wrong looks like one that is badly trained. `HARMLESS` are those that change none in any family here: they belong to
training, to generation, or to other tasks. A key whose value is null says nothing, and passes.
"""
import math
from collections.abc import Mapping
from typing import Any

from efficient_lm.errors import ConfigError

NO_NUMBERS = '''
  model_type architectures auto_map transformers_version torch_dtype dtype use_cache return_dict output_attentions
  output_hidden_states output_router_logits torchscript use_bfloat16 initializer_range init_std initializer_factor
  attention_dropout hidden_dropout hidden_dropout_prob dropout embd_pdrop resid_pdrop attn_pdrop layerdrop
  activation_dropout classifier_dropout router_aux_loss_coef router_z_loss_coef aux_loss_alpha seq_aux router_jitter_noise
  pretraining_tp max_position_embeddings model_max_length bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id
  decoder_start_token_id forced_eos_token_id prefix problem_type id2label label2id num_labels task_specific_params
  finetuning_task summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout n_ctx
  gradient_checkpointing chunk_size_feed_forward is_decoder is_llama_config tokenizer_class cache_implementation ep_size
  max_length min_length do_sample temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
  num_beams num_return_sequences early_stopping suppress_tokens begin_suppress_tokens bad_words_ids _name_or_path
  _attn_implementation _attn_implementation_autoset attn_implementation _flash_attn_2_enabled _from_auto _commit_hash
  unsloth_version unsloth_fixed transformers.js_config'''
HARMLESS = frozenset(NO_NUMBERS.split())
# Keys of what some other family computes: harmless while they are off, for a family that does not ask for them.
OFF = ('attention_bias', 'mlp_bias', 'clip_qkv', 'use_sliding_window', 'add_cross_attention', 'cross_attention_hidden_size',
       'is_encoder_decoder', 'tie_encoder_decoder', 'pruned_heads', 'qk_layernorm', 'use_qk_norm', 'use_mrope',
       'rope_interleaved')
MOST = 100_000_000          # of a whole number: more than any size of a model
MOST_LAYERS, MOST_EXPERTS = 1024, 4096


class Keys:
  """A config; `prefix` is that of its keys in messages."""

  def __init__(self, config: Mapping[str, Any], where: str, prefix: str = ''):
    self.config, self.where, self.prefix, self.asked = config, where, prefix, set(HARMLESS)

  def refuse(self, key: str, fix: str):
    """Raises ConfigError for a key."""
    raise ConfigError(f'{self.where}: {self.prefix}{key}', self.config.get(key), fix)

  def get(self, key: str, default=None):
    """The value as it is, the default where it is missing or null."""
    self.asked.add(key)
    value = self.config.get(key)
    return default if value is None else value

  def whole(self, key: str, default: int | None = None, most: int = MOST) -> int:
    """A whole number from 1 to `most`; needed where there is no default."""
    value = self.get(key, default)
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most: return value
    return self.refuse(key, f'a whole number from 1 to {most} is needed')

  def number(self, key: str, default: float | None = None) -> float:
    """A finite number above 0; needed where there is no default."""
    value = self.get(key, default)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf: return float(value)
    return self.refuse(key, 'a number above 0 is needed')

  def number_or_none(self, key: str) -> float | None:
    """As `number`; None where it is missing or null."""
    return None if self.get(key) is None else self.number(key)

  def flag(self, key: str, default: bool) -> bool:
    value = self.get(key, default)
    return value if isinstance(value, bool) else self.refuse(key, 'true or false is needed')

  def only(self, key: str, *values, default=None, fix: str = ''):
    """One of `values`: other ones are not implemented. `default`: what a missing key means."""
    value = self.get(key, default)
    if any(value == one and type(value) is type(one) for one in values): return value
    if default is None and value is None and None in values: return None
    fix = fix or 'computes something else, which no model here does'
    return self.refuse(key, f'only {" or ".join(map(repr, values))} can be read: this {fix}')

  def off(self, *keys: str):
    """Keys that must be missing, null, false, 0 or empty."""
    for key in keys:
      if self.get(key): self.refuse(key, 'computes something that no model here does: it must be off')

  def table(self, key: str) -> 'Keys | None':
    """An object within; None where it is missing or null."""
    value = self.get(key)
    if value is None: return None
    if not isinstance(value, Mapping): self.refuse(key, 'an object is needed')
    inner = Keys(value, self.where, f'{self.prefix}{key}.')
    inner.asked = set()
    return inner

  def listed(self, key: str, kind: type, default=None) -> list | None:
    """A list of values of a type."""
    value = self.get(key, default)
    if value is None: return None
    if isinstance(value, list | tuple) and all(type(one) is kind for one in value): return list(value)
    return self.refuse(key, f'a list of {kind.__name__} is needed')

  def finish(self):
    """Raises ConfigError for a key that nobody has asked for."""
    self.off(*(key for key in OFF if key not in self.asked))
    named = lambda key, value: key.startswith('_') and isinstance(value, str)   # what the writer called something
    unknown = [key for key, value in self.config.items()
               if key not in self.asked and value is not None and not named(key, value)]
    if unknown:
      self.refuse(unknown[0], 'is a key that is not known here, and may change the numbers: take it out of config.json if '
                              'it does not')
