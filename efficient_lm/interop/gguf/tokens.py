"""Tokenizers in the metadata of a GGUF file: the inverse of `vocabulary`.

How text is cut before byte pairs are merged is said by a name that engines know, never by an expression: a tokenizer with
another cut is refused, as a name that is nearly right gives wrong ids for a tenth of the text. What has been written is read
back, and must give the ids of the tokenizer for a text of odd characters.
"""
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from efficient_lm.data import tokenizers
from efficient_lm.errors import ConfigError, IncompatibleError
from efficient_lm.interop.gguf import vocabulary
from efficient_lm.interop.gguf.reader import Entry, File
from efficient_lm.interop.gguf.vocabulary import BYTE, CONTROL, CUTS, ENDS, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

NONE = {'tokenizer.ggml.model': 'none'}   # of a file without one
PROBE = ('A é\te\u0301\r\n\n  ﬁ 漢字 \U0001f600 theThe DON\'T we\'ll 12 1234567  x=[1, 22]; //\n\tif (a_b)  \n camelCase '
         'HTTPServer ¿qué? ŠĐ 第１２課 \u200b…—"quoted"  end ')
OWN_CUTS = {tokenizers.WORDS: vocabulary.GPT2}   # but for words of more than 64 characters
OWN_MARK = '<|endoftext|>'   # what a mark that is no text of the tokenizer is called


def metadata(tokenizer, size: int, architecture: str) -> dict[str, Any]:
  """The keys of a tokenizer of data.tokenizers for an embedding of `size` rows; those without a token are marked unused.
  Raises ConfigError for a tokenizer that no engine would read as it is."""
  if tokenizer.vocab_size > size:
    raise ConfigError('tokenizer', tokenizer.vocab_size, f'has more ids than the embedding has rows, {size}')
  match tokenizer:
    case tokenizers.ByteTokenizer(): made = _bytes(tokenizer, size)
    case tokenizers.BytePairs(): made = _byte_pairs(tokenizer, size)
    case tokenizers.SentencePieces(): made = _pieces(tokenizer, size)
    case _: raise _refused(tokenizer, 'has no form in GGUF')
  made |= _marks(tokenizer, made)
  made = {f'tokenizer.ggml.{key}': value for key, value in made.items()}
  if template := getattr(tokenizer, 'template', None): made['tokenizer.chat_template'] = template
  embedding = {'token_embd.weight': Entry((size, 1), 'F32', 0, 0)}
  _check(tokenizer, File('the file', {'general.architecture': architecture, **made}, embedding, 0, b''))
  return made


def notes(tokenizer) -> tuple[str, ...]:
  """What engines do in another way, in sentences."""
  if not isinstance(tokenizer, tokenizers.BytePairs): return ()
  model = json.loads(tokenizer.model)
  if any(cut in OWN_CUTS for cut in _splits(model.get('pre_tokenizer'))):
    return ('Words of more than 64 characters are cut by the tokenizer, and not by engines.',)
  if not model.get('normalizer'): return ()
  return ('The tokenizer composes characters (NFC) first; llama.cpp does not, and finds other ids for a letter and an '
          'accent that are written apart.',)


def _refused(tokenizer, why: str) -> ConfigError:
  return ConfigError('tokenizer', type(tokenizer).__name__, f"{why}: write the file without, by GgufFile(tokenizer=False)")


def _table(size: int, tokens: Mapping[int, str], types: Mapping[int, int]) -> dict[str, Any]:
  """Of `size` ids; those that are missing are unused."""
  filled = [tokens.get(i, f'[UNUSED{i}]') for i in range(size)]
  kinds = [types.get(i, NORMAL) if i in tokens else UNUSED for i in range(size)]
  return {'tokens': filled, 'token_type': np.array(kinds, np.int32)}


def _bytes(tokenizer, size: int) -> dict[str, Any]:
  """Every byte a token, and nothing to merge."""
  spelled = {byte: character for character, byte in tokenizers.byte_of_character().items()}
  marks = {tokenizer.eod: CONTROL}
  return {'model': 'gpt2', 'pre': 'gpt-2', 'merges': [], **_table(size, spelled | {tokenizer.eod: OWN_MARK}, marks)}


def _byte_pairs(tokenizer, size: int) -> dict[str, Any]:
  model = json.loads(tokenizer.model)
  tokens, types = _added(model)
  tokens |= {i: token for token, i in model['model']['vocab'].items() if i not in tokens}
  for mark in {tokenizer.bos, tokenizer.eod} - {None, *tokens}:
    tokens[mark], types[mark] = OWN_MARK if OWN_MARK not in tokens.values() else f'<|{mark}|>', CONTROL
  merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in model['model']['merges']]
  return {'model': 'gpt2', 'pre': _cut(tokenizer, model), 'merges': merges, **_table(size, tokens, types)}


def _added(model: dict) -> tuple[dict[int, str], dict[int, int]]:
  added = model.get('added_tokens') or []
  return ({token['id']: token['content'] for token in added},
          {token['id']: CONTROL if token['special'] else USER_DEFINED for token in added})


def _cut(tokenizer, model: dict) -> str:
  """The name of how the tokenizer cuts text. Raises ConfigError where none says it."""
  splits = tuple(OWN_CUTS.get(cut, cut) for cut in _splits(model.get('pre_tokenizer')))
  composed = (model.get('normalizer') or {}).get('type') == 'NFC'
  whole = bool(model['model'].get('ignore_merges'))
  if not model['model']['merges'] and not composed: return 'gpt-2'   # nothing is merged, however a text is cut
  for name, cut in CUTS.items():
    if (cut.splits, cut.nfc, cut.whole) == (splits, composed, whole): return name
  raise _refused(tokenizer, f'cuts text by {" then ".join(map(repr, splits))[:80]}, for which engines have no name')


def _splits(part) -> list[str | None]:
  """The expressions that a pre-tokenizer cuts by, one after another; None for what is not one."""
  match part:
    case {'type': 'Sequence', 'pretokenizers': list(parts)}: return [one for inner in parts for one in _splits(inner)]
    case {'type': 'Split', 'pattern': {'Regex': str(cut)}, 'behavior': 'Isolated', 'invert': False}: return [cut]
    case {'type': 'Digits', 'individual_digits': True}: return [r'\p{N}']
    case {'type': 'ByteLevel', 'add_prefix_space': False}:
      return [vocabulary.GPT2] if part.get('use_regex', True) else []
  return [None]


def _pieces(tokenizer, size: int) -> dict[str, Any]:
  """Pieces of SentencePiece are merged best score first; scores here are the ranks of the merges that make them."""
  model = json.loads(tokenizer.model)
  inner = model['model']
  if inner.get('type', 'BPE') != 'BPE': raise _refused(tokenizer, f'is a {inner["type"]} model, and engines merge by rank')
  tokens, types = _added(model)
  for token, i in inner['vocab'].items():
    if i in tokens: continue
    tokens[i] = token
    if len(token) == 6 and token.startswith('<0x') and token.endswith('>'): types[i] = BYTE
  unknown = inner['vocab'].get(inner.get('unk_token'))
  if unknown is not None: types[unknown] = UNKNOWN
  made = {'model': 'llama', **_table(size, tokens, types)}
  pairs = [''.join(merge.split(' ')) if isinstance(merge, str) else ''.join(merge) for merge in inner['merges']]
  rank = {piece: i for i, piece in reversed([*enumerate(pairs)])}
  made['scores'] = np.array([-float(rank.get(token, len(pairs))) for token in made['tokens']], np.float32)
  made['add_space_prefix'] = tokenizer.decode_bytes(tokenizer.encode('a')) == b' a'
  return made | ({} if unknown is None else {'unknown_token_id': unknown})


def _marks(tokenizer, made: dict) -> dict[str, Any]:
  """Ids of marks. Generation stops at the end of a text, and at two more that no engine would know by their names."""
  found: dict[str, Any] = {'add_bos_token': tokenizer.bos is not None, 'add_eos_token': False}
  if tokenizer.bos is not None: found['bos_token_id'] = int(tokenizer.bos)
  if tokenizer.eod is not None: found['eos_token_id'] = int(tokenizer.eod)
  known = {i for i, token in enumerate(made['tokens']) if made['token_type'][i] == CONTROL and token in ENDS}
  more = [int(stop) for stop in tokenizer.stops if stop != tokenizer.eod and stop not in known]
  if len(more) > 2: raise _refused(tokenizer, f'stops at {len(more)} tokens that engines do not know: keys name two')
  return found | dict(zip(('eot_token_id', 'eom_token_id'), more))


def _check(tokenizer, file: File):
  """Raises ConfigError where engines would read another tokenizer."""
  try: found = vocabulary.tokenizer(file)
  except IncompatibleError as error: raise _refused(tokenizer, str(error)) from error
  probes = [PROBE, *PROBE.split(' ')]
  same = all(np.array_equal(a, b) for a, b in zip(tokenizer.encode_all(probes), found.encode_all(probes), strict=True))
  if not same: raise _refused(tokenizer, 'gives other ids than engines would find by its tokens')
