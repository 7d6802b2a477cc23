"""Text to numbers and back. Each tokenizer has:

  vocab_size    how many ids there are
  bos           the id that begins every document as an input, None where nothing stands before a document
  eod           the id that ends a document, None where documents have no end; no text encodes to a mark
  stops         the ids at which generation stops: eod where there is one
  bytes_V       int32, how many bytes of text each id stands for, 0 for marks: bits per byte compares tokenizers
  key           a string, the same for two tokenizers exactly if they give all documents the same ids and marks
  encode(text)  str or bytes -> int32 ids, without marks;  encode_all: many documents at once
  prompt(text)  str or bytes -> int32 ids that generation continues: bos where there is one, then the text
  decode(ids)   ids -> str, broken UTF-8 replaced;  decode_bytes: exactly the bytes that were encoded
  to_json()     all of it in a string; `from_json` makes it again without the corpus

What a config names is `fit(documents, corpus_hash)` to a corpus first.
"""
import dataclasses
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from efficient_lm.data import cache
from efficient_lm.errors import ConfigError, Problem, at_least
from efficient_lm.lazy import lazy

tokenizers = lazy('tokenizers')


def _bytes(text: str | bytes) -> bytes:
  return text.encode('utf-8', 'surrogateescape') if isinstance(text, str) else text


class _Codec:
  """What the tokenizers share; they differ in `encode` and `decode_bytes`."""

  @property
  def stops(self) -> tuple[int, ...]:
    return () if self.eod is None else (self.eod,)

  def encode_all(self, documents: Sequence[str | bytes]) -> list[np.ndarray]:
    return [self.encode(document) for document in documents]

  def prompt(self, text: str | bytes) -> np.ndarray:
    """Raises ValueError for an empty text where nothing begins a document: there is nothing to continue."""
    ids = self.encode(text)
    if self.bos is not None: ids = np.append(np.int32(self.bos), ids)
    if not len(ids): raise ValueError('an empty text is no prompt: this tokenizer has no mark that begins a document')
    return ids

  def decode(self, ids) -> str:
    return self.decode_bytes(ids).decode('utf-8', 'replace')

  def check(self) -> Iterator[Problem]:
    yield from ()

  def fit(self, documents: Sequence[bytes], corpus_hash: str):
    del documents, corpus_hash  # nothing to learn
    return self


@dataclasses.dataclass
class ByteTokenizer(_Codec):
  """Every byte is its own id; id 256 ends a document.

  Attributes:
    bos: 256, so that one mark stands between two documents; None: a document begins with its first byte, as in runs whose
      tokenizer was stored before there were such marks.
  """
  bos: int | None = 256
  vocab_size = 257
  eod = 256

  def check(self) -> Iterator[Problem]:
    if self.bos not in (None, 256): yield 'bos', self.bos, '256 or None is needed'

  @property
  def key(self) -> str:
    return f'bytes {self.bos}'

  @property
  def bytes_V(self) -> np.ndarray:
    return np.append(np.ones(256, np.int32), np.int32(0))

  def encode(self, text: str | bytes) -> np.ndarray:
    return np.frombuffer(_bytes(text), np.uint8).astype(np.int32)

  def decode_bytes(self, ids) -> bytes:
    ids = np.asarray(ids)
    return ids[ids < 256].astype(np.uint8).tobytes()

  def to_json(self) -> str:
    return json.dumps({'kind': 'bytes', 'bos': self.bos})


@dataclasses.dataclass
class SymbolTokenizer(_Codec):
  """Every character of `symbols` is its own id, in that order. Documents have no marks."""
  symbols: str = 'ab'
  bos = None
  eod = None

  def check(self) -> Iterator[Problem]:
    if not self.symbols.isascii() or len(set(self.symbols)) != len(self.symbols) or len(self.symbols) < 2:
      yield 'symbols', self.symbols, 'two or more different ASCII characters are needed'

  @property
  def vocab_size(self) -> int:
    return len(self.symbols)

  @property
  def key(self) -> str:
    return f'symbols {self.symbols}'

  @property
  def bytes_V(self) -> np.ndarray:
    return np.ones(self.vocab_size, np.int32)

  def encode(self, text: str | bytes) -> np.ndarray:
    """Raises ValueError for a character that is no symbol."""
    ids_V = np.full(256, -1, np.int32)
    ids_V[np.frombuffer(self.symbols.encode(), np.uint8)] = np.arange(self.vocab_size)
    raw = np.frombuffer(_bytes(text), np.uint8)
    ids = ids_V[raw]
    if (ids < 0).any(): raise ValueError(f'{bytes(raw[ids < 0][:1])!r} is not among {self.symbols!r}')
    return ids

  def decode_bytes(self, ids) -> bytes:
    return np.frombuffer(self.symbols.encode(), np.uint8)[np.asarray(ids, np.int64)].tobytes()

  def to_json(self) -> str:
    return json.dumps({'kind': 'symbols', 'symbols': self.symbols})


# What is encoded on its own: the words of GPT-2, in pieces of 64 characters at most. The time to learn from a piece grows
# with the square of its length, as any two neighbours in it may merge.
WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}{1,64}| ?\p{N}{1,64}| ?[^\s\p{L}\p{N}]{1,64}|\s{1,64}(?!\S)|\s{1,64}"
MOST_IDS = 2 ** 24   # of a vocabulary; the largest there are have 2^18
_PROBE = 'A é\te\u0301\r\n  ﬁ 漢字 \U0001f600 the'  # what tokenizers that are not plain byte pairs change


@dataclasses.dataclass
class BPE:
  """Byte-pair encoding over bytes; `fit` learns it from the training text once and caches it: a BytePairs.

  Source: Sennrich et al. 2016, arXiv:1508.07909; bytes and the splitting of words as in GPT-2.

  Attributes:
    vocab_size: ids in all: 256 bytes, the merges, and the mark between two documents as the last one. A corpus
      too small for so many merges leaves ids unused.
    train_bytes: of the training text are learned from.
  """
  vocab_size: int = 4096
  train_bytes: int = dataclasses.field(default=32_000_000, metadata={'wide': True})

  def check(self) -> Iterator[Problem]:
    yield from at_least(self, vocab_size=257, train_bytes=1)

  def fit(self, documents: Sequence[bytes], corpus_hash: str) -> 'BytePairs':
    key = cache.digest('bpe', corpus_hash, self.vocab_size, self.train_bytes)
    model = cache.fetch(key, lambda: {'model': np.frombuffer(self._learn(documents).encode(), np.uint8)})
    mark = self.vocab_size - 1
    return BytePairs(model['model'].tobytes().decode(), self.vocab_size, bos=mark, eod=mark)

  def _learn(self, documents: Sequence[bytes]) -> str:
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers
    learner.pre_tokenizer = split.Sequence([split.Split(tokenizers.Regex(WORDS), 'isolated'),
                                            split.ByteLevel(add_prefix_space=False, use_regex=False)])
    learner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=self.vocab_size - 1, min_frequency=2, show_progress=False,
        initial_alphabet=sorted(split.ByteLevel.alphabet()))

    def texts():
      left = self.train_bytes
      for document in documents:
        if left <= 0: return
        yield document[:left].decode('utf-8', 'ignore')
        left -= len(document)

    learner.train_from_iterator(texts(), trainer)
    return learner.to_str()


class _Pieces(_Codec):
  """A model of the package `tokenizers`; `_pieces` are the bytes that each id stands for.

  Attributes:
    specials: the ids of its marks, by their text; no text encodes to them.
    template: Jinja of the chats that it was trained on, or None.
  """

  def __init__(self, model: str, vocab_size: int, *, bos: int | None, eod: int | None, stops: Sequence[int] | None,
               template: str | None):
    """As BytePairs."""
    if not (type(vocab_size) is int and 0 < vocab_size <= MOST_IDS): raise ValueError(f'{vocab_size} ids')
    # The package ends in a panic, which no one catches by accident, if the prefix is longer than a piece. Bytes have none.
    if json.loads(model)['model'].get('continuing_subword_prefix'): raise ValueError('pieces with a prefix change the text')
    self.model = json.dumps(json.loads(model))
    self.vocab_size, self.bos, self.eod, self.template = vocab_size, bos, eod, template
    self._stops = super().stops if stops is None else tuple(stops)
    self._encoder = tokenizers.Tokenizer.from_str(model)
    _plain(self._encoder)
    self._added = self._encoder.get_added_tokens_decoder()
    self.specials = {token.content: index for index, token in self._added.items() if token.special}
    self._marks = {mark for mark in (bos, eod) if mark is not None}
    self._pieces = [b''] * vocab_size

  @property
  def stops(self) -> tuple[int, ...]:
    return self._stops

  @property
  def bytes_V(self) -> np.ndarray:
    return np.array([len(piece) for piece in self._pieces], np.int32)

  def encode(self, text: str | bytes) -> np.ndarray:
    return self.encode_all([text])[0]

  def decode_bytes(self, ids) -> bytes:
    return b''.join(self._pieces[index] for index in np.asarray(ids).tolist())


class BytePairs(_Pieces):
  """A learned BPE. Bytes that are not UTF-8 become ids of single bytes: every document survives.

  One of others (`foreign`) may fall short of that, and gives the ids that transformers gives: it may compose characters
  (NFC) first, may know words that no merging makes and that stand whole wherever they occur, and bytes that it has no id
  for drop out of a text.
  """

  def __init__(self, model: str, vocab_size: int, *, bos: int | None, eod: int | None,
               stops: Sequence[int] | None = None, foreign: bool = False, template: str | None = None):
    """model: JSON of the package `tokenizers`. stops: default (eod,).

    A mark may be one of the model's own ids, if no text encodes to it. Raises ValueError for a model that does not fit in
    `vocab_size` beside the marks or that changes text.
    """
    super().__init__(model, vocab_size, bos=bos, eod=eod, stops=stops, template=template)
    self.foreign = foreign
    _check_text_only(self._encoder, foreign)
    byte_of, added, marks, made = byte_of_character(), self._added, self._marks, _made(json.loads(model)['model'])
    for piece, index in self._encoder.get_vocab().items():
      if index >= vocab_size or (index in marks and index not in added and piece in made and not foreign):
        raise ValueError(f'token {index} does not fit in a vocabulary of {vocab_size} with the marks {sorted(marks)}')
      if index in (*marks, *self.stops) and index not in added and piece not in made: continue   # it stands for no text
      if index not in added: self._pieces[index] = bytes(byte_of[character] for character in piece)
      elif not added[index].special: self._pieces[index] = piece.encode()
    if not {*marks, *self.stops} <= {*range(vocab_size)}: raise ValueError('bos, eod and stops must be ids')
    self._byte_ids = {piece[0]: index for index, piece in enumerate(self._pieces) if len(piece) == 1 and index not in added}
    if len(self._byte_ids) < 256 and not foreign: raise ValueError('a byte without an id would be lost')
    probe = unicodedata.normalize('NFC', _PROBE) if self._encoder.normalizer is not None else _PROBE
    if self.decode_bytes(self.encode(_PROBE)) != probe.encode(): raise ValueError('it changes the text')

  @functools.cached_property
  def key(self) -> str:
    model = json.loads(self.model)
    # Spelled in one way: some versions write a merge as a string, and leave out what is null or false.
    bpe = {name: value for name, value in model['model'].items() if value not in (None, False)}
    bpe['merges'] = [merge.split(' ') if isinstance(merge, str) else merge for merge in bpe['merges']]
    parts = [bpe, model.get('pre_tokenizer'), self.bos, self.eod]
    if self.foreign: parts += [model.get('normalizer'), [t['content'] for t in model.get('added_tokens', ()) if not t['special']]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

  def encode_all(self, documents: Sequence[str | bytes]) -> list[np.ndarray]:
    # Pieces alternate: valid text, then broken bytes, which Python decodes to lone surrogates.
    split = [re.split('([\udc80-\udcff]+)', _bytes(d).decode('utf-8', 'surrogateescape')) for d in documents]
    texts = [text for pieces in split for text in pieces[::2]]
    encoded = iter(self._encoder.encode_batch_fast(texts, add_special_tokens=False))

    def ids(index, piece):
      found = [self._byte_ids[b] for b in _bytes(piece) if b in self._byte_ids] if index % 2 else next(encoded).ids
      return np.array(found, np.int32)

    return [np.concatenate([ids(*item) for item in enumerate(pieces)]) for pieces in split]

  def to_json(self) -> str:
    foreign = {'foreign': True, 'template': self.template} if self.foreign else {}
    return json.dumps({'kind': 'bpe', 'vocab_size': self.vocab_size, 'bos': self.bos, 'eod': self.eod,
                       'stops': self.stops, **foreign, 'model': json.loads(self.model)})


class SentencePieces(_Pieces):
  """A tokenizer made by SentencePiece (Kudo and Richardson 2018, arXiv:1808.06226), as Llama 2, Mistral and Gemma have one:
  '▁' stands for a space, and bytes have ids of their own ('<0x0A>') for what no piece has. Most begin a text with a space
  that it does not have: `decode_bytes` gives it back, and bits per byte counts it.
  """

  def __init__(self, model: str, vocab_size: int, *, bos: int | None, eod: int | None, stops: Sequence[int] | None = None,
               template: str | None = None):
    """As BytePairs, one of others. Raises ValueError for a model that changes text in other ways."""
    super().__init__(model, vocab_size, bos=bos, eod=eod, stops=stops, template=template)
    added, marks = self._added, self._marks
    if not {*marks, *self.stops, *self._encoder.get_vocab().values()} <= {*range(vocab_size)}:
      raise ValueError(f'bos, eod, stops and all tokens must be ids below {vocab_size}')
    for piece, index in self._encoder.get_vocab().items():
      if index not in added: self._pieces[index] = _bytes_of_piece(piece)
      elif not added[index].special: self._pieces[index] = piece.encode()
    for index in marks: self._pieces[index] = b''
    if self.decode_bytes(self.encode(_PROBE)).removeprefix(b' ') != _PROBE.encode(): raise ValueError('it changes the text')

  @functools.cached_property
  def key(self) -> str:
    model = json.loads(self.model)
    parts = [model.get(name) for name in ('model', 'normalizer', 'pre_tokenizer', 'added_tokens')] + [self.bos, self.eod]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

  def encode_all(self, documents: Sequence[str | bytes]) -> list[np.ndarray]:
    """Bytes that are no UTF-8 are encoded as the character that replaces them."""
    texts = [_bytes(document).decode('utf-8', 'replace') for document in documents]
    return [np.array(one.ids, np.int32) for one in self._encoder.encode_batch_fast(texts, add_special_tokens=False)]

  def to_json(self) -> str:
    return json.dumps({'kind': 'sentencepiece', 'vocab_size': self.vocab_size, 'bos': self.bos, 'eod': self.eod,
                       'stops': self.stops, 'template': self.template, 'model': json.loads(self.model)})


def _bytes_of_piece(piece: str) -> bytes:
  found = re.fullmatch('<0x([0-9A-Fa-f]{2})>', piece)
  return bytes.fromhex(found[1]) if found else piece.replace('▁', ' ').encode()


def from_json(text: str) -> ByteTokenizer | SymbolTokenizer | BytePairs | SentencePieces:
  """The inverse of `to_json`; what was stored before documents began with a mark has bos None. Raises ConfigError."""
  try:
    saved = json.loads(text)
    match saved['kind']:
      case 'bytes': return _checked(ByteTokenizer(saved.get('bos')))
      case 'symbols': return _checked(SymbolTokenizer(saved['symbols']))
      case 'bpe':
        return BytePairs(json.dumps(saved['model']), saved['vocab_size'], bos=saved.get('bos'),
                         eod=saved.get('eod', saved['vocab_size'] - 1), stops=saved.get('stops'),
                         foreign=saved.get('foreign', False), template=saved.get('template'))
      case 'sentencepiece':
        return SentencePieces(json.dumps(saved['model']), saved['vocab_size'], bos=saved['bos'], eod=saved['eod'],
                              stops=saved['stops'], template=saved['template'])
  except (ImportError, KeyboardInterrupt, SystemExit): raise
  except BaseException as error:  # the package raises bare Exceptions for a bad model, and panics, which are none
    if not isinstance(error, Exception) and type(error).__name__ != 'PanicException': raise
    raise ConfigError('tokenizer', text[:40], f'is no saved tokenizer ({type(error).__name__})') from error
  raise ConfigError('tokenizer', saved['kind'], 'bytes, symbols, bpe and sentencepiece are the kinds there are')


def _checked(tokenizer):
  for field, value, fix in tokenizer.check(): raise ValueError(f'{field} = {value}: {fix}')
  return tokenizer


def _check_text_only(encoder, foreign: bool):
  """Raises ValueError for an encoder that does not give every text exactly the ids of its own characters."""
  normalizer, added = encoder.normalizer, encoder.get_added_tokens_decoder().values()
  if normalizer is not None and not (foreign and isinstance(normalizer, tokenizers.normalizers.NFC)):
    raise ValueError('a normalizer changes the text')
  if not foreign and any(not token.special for token in added):
    raise ValueError('added tokens that are not special have no place among byte pairs')
  if any(token.lstrip or token.rstrip or token.single_word for token in added if not token.special):
    raise ValueError('added tokens that take the spaces beside them change the text')


def _made(bpe: dict) -> set[str]:
  """The pieces that text can encode to: characters and what merges make, or all where a whole word is looked up first."""
  if bpe.get('ignore_merges'): return {*bpe['vocab']}
  merges = (merge.split(' ') if isinstance(merge, str) else merge for merge in bpe['merges'])
  return {piece for piece in bpe['vocab'] if len(piece) == 1} | {''.join(pair) for pair in merges}


def _plain(encoder):
  """Sets an encoder to give all of a text its ids, every time the same. Raises ValueError where it cannot."""
  encoder.no_truncation()
  encoder.no_padding()
  encoder.encode_special_tokens = True  # '<|endoftext|>' in a document is a word like any other
  if getattr(encoder.model, 'dropout', None): raise ValueError('dropout encodes a text differently each time')


def byte_of_character() -> dict[str, int]:
  """GPT-2's spelling of bytes: printable characters are themselves, the others follow from 256 on."""
  printable = [byte for byte in range(256) if 33 <= byte <= 126 or (byte >= 161 and byte != 173)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}
