"""The tokenizer in a Hugging Face folder: tokenizer.json, and the marks that the files beside it name.

Ids are those that transformers gives; texts never encode to marks. Whether a text begins with one is said by
`add_bos_token` of tokenizer_config.json, or, where that is missing, done by the post-processor of tokenizer.json.
"""
import json
import os

from efficient_lm.data import tokenizers
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.interop import folder
from efficient_lm.lazy import lazy

TOKENIZER, SETTINGS = 'tokenizer.json', 'tokenizer_config.json'
library = lazy('tokenizers')


def read(path: str) -> tokenizers.BytePairs | tokenizers.SentencePieces:
  """Raises ConfigError where there is none, or none that is understood; CheckpointError for a damaged file."""
  file = os.path.join(path, TOKENIZER)
  if not os.path.isfile(file): raise ConfigError('path', path, f'holds no {TOKENIZER}, and so no tokenizer')
  model, settings = folder.json_of(file), _optional(path, SETTINGS)
  try:
    encoder = library.Tokenizer.from_str(json.dumps(model))
    ids = encoder.get_vocab()   # those that are added, too
    bos, eod = _bos(encoder, model, settings, ids), _id(_mark(path, settings, 'eos_token'), ids)
    stops = _stops(path, eod)
    kind = tokenizers.BytePairs if _byte_level(model) else tokenizers.SentencePieces
    more = {'foreign': True} if _byte_level(model) else {}
    size, template = max(ids.values()) + 1, _template(path, settings)
    return kind(json.dumps(model), size, bos=bos, eod=eod, stops=stops, template=template, **more)
  except ImportError as error:
    fix = f'its {TOKENIZER} needs the package tokenizers: pip install "efficient_lm[hf]"'
    raise ConfigError('path', path, fix) from error
  except (ConfigError, CheckpointError): raise
  except Exception as error:   # the package raises bare Exceptions for a bad model
    raise ConfigError('path', path, f'its {TOKENIZER} cannot be used: {error}') from error


def _byte_level(model: dict) -> bool:
  """Whether text is cut into bytes, as GPT-2's tokenizer does, rather than into SentencePiece's pieces. Raises ValueError
  for tokenizers of other kinds."""
  kind, cut = model.get('model', {}).get('type', 'BPE'), json.dumps(model.get('pre_tokenizer'))
  if kind == 'BPE' and '"ByteLevel"' in cut: return True
  pieces = '▁' in json.dumps([model.get('normalizer'), model.get('pre_tokenizer')], ensure_ascii=False)
  if kind in ('BPE', 'Unigram') and pieces: return False
  raise ValueError(f'it is a {kind} over neither bytes nor pieces of SentencePiece')


def _bos(encoder, model: dict, settings: dict, ids: dict[str, int]) -> int | None:
  """The id before every text, if one is."""
  if 'add_bos_token' in settings or 'add_eos_token' in settings:
    return _id(_text(settings.get('bos_token')), ids) if settings.get('add_bos_token') else None
  if model.get('post_processor') is None: return None
  encoder.no_truncation()
  bare, marked = (encoder.encode('a', add_special_tokens=added).ids for added in (False, True))
  before = next(i for i in range(len(marked)) if marked[i:i + len(bare)] == bare)
  if before > 1: raise ValueError(f'it begins every text with {before} marks; one can be read')
  return marked[0] if before else None


def _mark(path: str, settings: dict, name: str) -> str | None:
  """The text of a mark, from the newer place or the older one."""
  return _text(settings.get(name)) or _text(_optional(path, 'special_tokens_map.json').get(name))


def _text(mark) -> str | None:
  return mark.get('content') if isinstance(mark, dict) else mark


def _id(mark: str | None, ids: dict[str, int]) -> int | None:
  if mark is None: return None
  if mark not in ids: raise ValueError(f'it has no token {mark!r}, which {SETTINGS} names')
  return ids[mark]


def _stops(path: str, eod: int | None) -> tuple[int, ...]:
  """Where generation stops: the end of a document, and what the files for generation name."""
  found = {} if eod is None else {eod: None}
  for file in ('generation_config.json', folder.CONFIG):
    named = _optional(path, file).get('eos_token_id')
    for one in named if isinstance(named, list) else [named]:
      if isinstance(one, int) and not isinstance(one, bool): found[one] = None
  return tuple(found)


def _template(path: str, settings: dict) -> str | None:
  """Jinja of chats: a file of its own since transformers 4.50, a setting before; of several, the one named 'default'."""
  file = os.path.join(path, 'chat_template.jinja')
  if os.path.isfile(file):
    with open(file, encoding='utf-8', errors='replace') as opened: return opened.read()
  named = settings.get('chat_template')
  if isinstance(named, list):
    return next((one.get('template') for one in named if isinstance(one, dict) and one.get('name') == 'default'), None)
  return named if isinstance(named, str) else None


def _optional(path: str, name: str) -> dict:
  file = os.path.join(path, name)
  return folder.json_of(file) if os.path.isfile(file) else {}
