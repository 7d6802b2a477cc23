"""A tokenizer as the files that a Hugging Face folder has: tokenizer.json, and beside it which of its tokens are marks."""
import json
import os
from typing import Any

from efficient_lm.data import tokenizers
from efficient_lm.interop.vocabulary import SETTINGS, TOKENIZER

MARK = '<|endoftext|>'   # how the mark between documents is called, which has no text in a tokenizer made here
TEMPLATE = 'chat_template.jinja'


def write(tokenizer, folder: str) -> tuple[str, ...]:
  """Writes the files; what there is to say of them. A tokenizer over symbols has no such files, and leaves none."""
  model = model_of(tokenizer)
  if model is None: return ('The tokenizer is no file of the folder: one over symbols is known nowhere else.',)
  texts = {token['id']: token['content'] for token in model['added_tokens']}
  model['post_processor'] = None if tokenizer.bos is None else _begins(texts[tokenizer.bos], tokenizer.bos)
  names = dict(bos_token=texts.get(tokenizer.bos), eos_token=texts.get(tokenizer.eod))
  settings = {name: text for name, text in names.items() if text is not None} | dict(
    tokenizer_class='PreTrainedTokenizerFast', add_bos_token=tokenizer.bos is not None, clean_up_tokenization_spaces=False)
  template = getattr(tokenizer, 'template', None)
  if template is not None:
    settings['chat_template'] = template
    with open(os.path.join(folder, TEMPLATE), 'w', encoding='utf-8') as file: file.write(template)
  dump(model, os.path.join(folder, TOKENIZER))
  dump(settings, os.path.join(folder, SETTINGS))
  return ()


def model_of(tokenizer) -> dict[str, Any] | None:
  """The JSON of the package `tokenizers` in which every mark is a token that is added; None where there can be none."""
  if isinstance(tokenizer, tokenizers.ByteTokenizer): model = _bytes(tokenizer)
  elif isinstance(tokenizer, (tokenizers.BytePairs, tokenizers.SentencePieces)): model = json.loads(tokenizer.model)
  else: return None
  known = {token['id'] for token in model['added_tokens']}
  marks = sorted({tokenizer.bos, tokenizer.eod, *tokenizer.stops} - {None} - known)
  vocabulary = model['model'].get('vocab')
  for mark in marks:
    text = _text_of(vocabulary, mark, MARK if mark in (tokenizer.eod, marks[0]) else f'<|mark_{mark}|>')
    if isinstance(vocabulary, dict): vocabulary.setdefault(text, mark)
    model['added_tokens'].append(dict(id=mark, content=text, single_word=False, lstrip=False, rstrip=False, normalized=False,
                                      special=True))
  model['added_tokens'].sort(key=lambda token: token['id'])
  return model


def marks_of(tokenizer) -> dict[str, Any]:
  """The ids of marks, as a config.json and a generation_config.json name them."""
  stops = list(tokenizer.stops)
  found = dict(bos_token_id=tokenizer.bos, eos_token_id=stops[0] if len(stops) == 1 else stops or None)
  return {name: value for name, value in found.items() if value is not None}


def dump(value, file: str):
  """Writes JSON for people to read."""
  with open(file, 'w', encoding='utf-8') as opened: json.dump(value, opened, indent=2, ensure_ascii=False)


def _text_of(vocabulary, mark: int, otherwise: str) -> str:
  """What a mark is called that the vocabulary has already."""
  if isinstance(vocabulary, list): return vocabulary[mark][0] if mark < len(vocabulary) else otherwise
  return next((text for text, index in vocabulary.items() if index == mark), otherwise)


def _bytes(tokenizer: tokenizers.ByteTokenizer) -> dict[str, Any]:
  """Every byte a token, none of which merge."""
  vocabulary = {character: byte for character, byte in tokenizers.byte_of_character().items()}
  level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
  return dict(version='1.0', truncation=None, padding=None, added_tokens=[], normalizer=None, pre_tokenizer=level,
              post_processor=None, decoder=level, model=dict(
                type='BPE', dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                fuse_unk=False, byte_fallback=False, ignore_merges=False, vocab=vocabulary, merges=[]))


def _begins(text: str, mark: int) -> dict[str, Any]:
  """The step that puts a mark before every text."""
  special, of = {'SpecialToken': dict(id=text, type_id=0)}, lambda name, number: {'Sequence': dict(id=name, type_id=number)}
  return dict(type='TemplateProcessing', single=[special, of('A', 0)], pair=[special, of('A', 0), special, of('B', 1)],
              special_tokens={text: dict(id=text, ids=[mark], tokens=[text])})
