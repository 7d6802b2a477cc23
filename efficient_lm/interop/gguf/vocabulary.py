"""The tokenizer of a GGUF file, rebuilt as the JSON of the package `tokenizers` that its model was published with.

A file names how text is cut before byte pairs are merged (`tokenizer.ggml.pre`); what the names mean stands in engines
(src/llama-vocab.cpp of llama.cpp) and in the tokenizer.json files that they stand for. A name not known here is refused: a
wrong cut gives wrong ids for a tenth of the text, and no error. transformers 5.24 reads the same files, but cuts 'smollm',
'olmo' and 'deepseek-v3' as it does GPT-2's, never composes characters, and always merges: where a text has digits behind
spaces, say, its ids are not those of the published tokenizer, and not these.
"""
import dataclasses
import json

import numpy as np

from efficient_lm.errors import IncompatibleError
from efficient_lm.interop.gguf.reader import File, quoted

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6   # of tokenizer.ggml.token_type

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r'\s*[\r\n]+|\s+(?!\S)|\s+'
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'


def _contractions_first(digits: str) -> str:
  """Llama 3 and Qwen 2: words with what stands before them, digits by so many."""
  return rf'{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}'


def _by_case(ending: str, digits: str) -> str:
  """GPT-4o and Tekken: words are cut where a capital follows a small letter."""
  before = r'[^\r\n\p{L}\p{N}]?'
  return (rf'{before}{_UPPER}*{_LOWER}+{ending}|{before}{_UPPER}+{_LOWER}*{ending}|\p{{N}}{digits}'
          rf'| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}')


@dataclasses.dataclass(frozen=True)
class Cut:
  """splits: expressions that cut text one after another; whole: a piece that is a token is taken without merging; nfc:
  whether text is composed first; bos: whether texts begin with a mark, where the file does not say."""
  splits: tuple[str, ...]
  whole: bool = False
  nfc: bool = False
  bos: bool = False


CUTS = {
  'gpt-2': Cut((GPT2,)),
  'smollm': Cut((r'\p{N}', GPT2)),
  'olmo': Cut((GPT2,), nfc=True),
  **dict.fromkeys(('llama-bpe', 'llama3', 'llama-v3', 'falcon3'),
                  Cut((_contractions_first('{1,3}'),), whole=True, bos=True)),
  'dbrx': Cut((_contractions_first('{1,3}'),)),
  'qwen2': Cut((_contractions_first(''),), nfc=True),
  'deepseek-r1-qwen': Cut((_contractions_first(''),)),
  'gpt-4o': Cut((_by_case(f'{_CONTRACTED}?', '{1,3}'),), whole=True),
  'tekken': Cut((_by_case('', ''),), whole=True, bos=True),
  'deepseek-v3': Cut((r'\p{N}{1,3}', '[一-龥぀-ゟ゠-ヿ]+',
                      r'[!"#$%&' r"'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
                      r'| ?[\p{P}\p{S}]+[\r\n]*|' + _SPACES))}

# Control tokens at which a reply ends, whatever the file calls its end of text (the same list as in llama-vocab.cpp).
ENDS = ('<|im_end|>', '<|endoftext|>', '<|eot_id|>', '<|eom_id|>', '<|end_of_text|>', '<|end|>', '<end_of_turn>', '<eos>',
        '</s>', '<|return|>', '<|call|>', '<｜end▁of▁sentence｜>', '<EOT>', '<|END_OF_TURN_TOKEN|>')


LONGEST = 256   # characters of a piece that is merged: every pair that makes it is looked for


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """model: JSON of the package `tokenizers`. bos: the id that begins a text, None where nothing does. eod: the id that ends
  one. stops: the ids at which generation stops. template: of chats, in Jinja, or None."""
  model: str
  size: int
  bos: int | None
  eod: int | None
  stops: tuple[int, ...]
  template: str | None


def read(file: File) -> Vocabulary:
  """Raises IncompatibleError, with the file's name, for a tokenizer that is not understood or not whole."""
  get = lambda name, default=None: file.metadata.get(f'tokenizer.ggml.{name}', default)
  kind, tokens = get('model'), get('tokens')
  if kind not in ('gpt2', 'llama'): raise _refused(file, f'tokenizer.ggml.model = {_shown(kind)}: gpt2 and llama are read')
  if not isinstance(tokens, list) or not tokens: raise _refused(file, 'has no list tokenizer.ggml.tokens')
  embedding = file.tensors.get('token_embd.weight')
  if embedding is not None and len(tokens) > embedding.shape[0]:
    raise _refused(file, f'has {len(tokens)} tokens, and an embedding of {embedding.shape[0]}')
  types = get('token_type')
  if types is None: types = np.ones(len(tokens), np.int32)
  if not isinstance(types, np.ndarray) or len(types) != len(tokens):
    raise _refused(file, 'has not one tokenizer.ggml.token_type for each token')
  types = types.tolist()
  model, bos_by_default = _byte_pairs(file, tokens, types) if kind == 'gpt2' else _sentence_piece(file, tokens, types)
  ids = {name: _mark(file, name, len(tokens)) for name in ('bos', 'eos', 'eot', 'eom')}
  begins = get('add_bos_token', bos_by_default)
  if begins and ids['bos'] is None: raise _refused(file, 'has texts begin with a mark, and no tokenizer.ggml.bos_token_id')
  ends = [i for i, token in enumerate(tokens) if types[i] == CONTROL and token in ENDS]
  stops = dict.fromkeys(i for i in (ids['eos'], ids['eot'], ids['eom'], *ends) if i is not None)
  template = file.metadata.get('tokenizer.chat_template')
  return Vocabulary(json.dumps(model), len(tokens), ids['bos'] if begins else None, ids['eos'], tuple(stops),
                    template if isinstance(template, str) else None)


def tokenizer(file: File):
  """The tokenizer itself (`data.tokenizers`). Raises IncompatibleError as `read` does, and where the package `tokenizers`
  makes nothing of the file's."""
  from efficient_lm.data import tokenizers
  found = read(file)
  marks = dict(bos=found.bos, eod=found.eod, stops=found.stops, template=found.template)
  try:
    if file.metadata['tokenizer.ggml.model'] == 'llama': return tokenizers.SentencePieces(found.model, found.size, **marks)
    return tokenizers.BytePairs(found.model, found.size, foreign=True, **marks)
  except ImportError: raise
  except Exception as error:   # the package raises bare Exceptions for a bad model
    raise _refused(file, f'its tokenizer cannot be used: {" ".join(str(error).split())[:120]}') from error


def _refused(file: File, why: str) -> IncompatibleError:
  return IncompatibleError(f'{file.path}: {why}')


def _shown(value) -> str:
  return quoted(str(value))


def _mark(file: File, name: str, size: int) -> int | None:
  found = file.metadata.get(f'tokenizer.ggml.{name}_token_id')
  if found is None: return None
  if not isinstance(found, int) or not 0 <= found < size:
    raise _refused(file, f'tokenizer.ggml.{name}_token_id = {_shown(found)} is none of its {size} tokens')
  return found


def _added(tokens: list[str], types: list[int]) -> list[dict]:
  flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
  return [{'id': i, 'content': token, 'special': types[i] == CONTROL, **flags}
          for i, token in enumerate(tokens) if types[i] in (CONTROL, USER_DEFINED)]


def _ids(file: File, tokens: list[str], types: list[int]) -> dict[str, int]:
  used = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
  if len(used) != sum(kind != UNUSED for kind in types): raise _refused(file, 'has a token twice in tokenizer.ggml.tokens')
  return used


def _byte_pairs(file: File, tokens: list[str], types: list[int]) -> tuple[dict, bool]:
  pre, merges = file.metadata.get('tokenizer.ggml.pre'), file.metadata.get('tokenizer.ggml.merges')
  if pre not in CUTS: raise _refused(file, f'tokenizer.ggml.pre = {_shown(pre)} is not known: {", ".join(CUTS)} are')
  if not isinstance(merges, list): raise _refused(file, 'has no list tokenizer.ggml.merges')
  pairs = [merge.split(' ') for merge in merges]
  if any(len(pair) != 2 for pair in pairs): raise _refused(file, 'has something else than pairs in tokenizer.ggml.merges')
  cut = CUTS[pre]
  level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
  splits = [dict(type='Split', pattern={'Regex': split}, behavior='Isolated', invert=False) for split in cut.splits]
  model = dict(type='BPE', dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
               fuse_unk=False, byte_fallback=False, ignore_merges=cut.whole, vocab=_ids(file, tokens, types), merges=pairs)
  return dict(version='1.0', truncation=None, padding=None, added_tokens=_added(tokens, types),
              normalizer={'type': 'NFC'} if cut.nfc else None,
              pre_tokenizer={'type': 'Sequence', 'pretokenizers': [*splits, level]}, post_processor=None,
              decoder={**level, 'use_regex': True}, model=model), cut.bos


def _sentence_piece(file: File, tokens: list[str], types: list[int]) -> tuple[dict, bool]:
  """Pieces are merged by their scores, the best pair first; the package merges by a list of pairs, which follows."""
  get = lambda name, default=None: file.metadata.get(f'tokenizer.ggml.{name}', default)
  gemma = str(file.metadata.get('general.architecture')).startswith('gemma')
  if gemma: tokens = ['▁' * len(token) if token.isspace() and set(token) == {' '} else token for token in tokens]
  ids, scores = _ids(file, tokens, types), get('scores')
  if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
    raise _refused(file, 'has not one tokenizer.ggml.scores for each token')
  # Gemma's scores do not rise with the order in which its pieces were made; their places do.
  order = -np.arange(len(tokens)) if gemma else scores
  mergeable = {token: float(order[i]) for token, i in ids.items() if types[i] in (NORMAL, USER_DEFINED)}
  longest = max(map(len, mergeable), default=0)
  if longest > LONGEST: raise _refused(file, f'has a piece of {longest} characters: {LONGEST} are read')
  unknown = [token for token, i in ids.items() if types[i] == UNKNOWN]
  spaces = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
  before = [{'type': 'Prepend', 'prepend': '▁'}] if get('add_space_prefix', True) else []
  model = dict(type='BPE', dropout=None, unk_token=unknown[0] if unknown else None, continuing_subword_prefix=None,
               end_of_word_suffix=None, fuse_unk=True, byte_fallback=BYTE in types, ignore_merges=False, vocab=ids,
               merges=_merges(mergeable, ids))
  decoders = [{'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '}, {'type': 'ByteFallback'}, {'type': 'Fuse'}]
  return dict(version='1.0', truncation=None, padding=None, added_tokens=_added(tokens, types),
              normalizer={'type': 'Sequence', 'normalizers': [*before, spaces]}, pre_tokenizer=None, post_processor=None,
              decoder={'type': 'Sequence', 'decoders': decoders}, model=model), True


def _merges(scores: dict[str, float], ids: dict[str, int]) -> list[list[str]]:
  """All pairs of pieces that make a piece, those of the best piece first; of one piece's, in the order of transformers."""
  pairs = [(score, i, len(piece) - i, piece) for piece, score in scores.items() for i in range(1, len(piece))
           if piece[:i] in ids and piece[i:] in ids]
  pairs.sort(key=lambda pair: pair[:3], reverse=True)
  return [[piece[:i], piece[i:]] for _, i, _, piece in pairs]
