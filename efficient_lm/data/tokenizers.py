"""Text to numbers and back. Each tokenizer has:

  vocab_size    how many ids there are
  eod           the id that ends a document, None where documents have no end; no text encodes to it
  bytes_V       int32, how many bytes of text each id stands for, 0 for eod: bits per byte compares tokenizers
  encode(text)  str or bytes -> int32 ids, without eod;  encode_all: many documents at once
  decode(ids)   ids -> str, broken UTF-8 replaced;  decode_bytes: exactly the bytes that were encoded
  to_json()     all of it in a string; `from_json` makes it again without the corpus

What a config names is `fit(documents, corpus_hash)` to a corpus first; `key` names its settings.
"""
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Sequence

import numpy as np

from efficient_lm.data import cache
from efficient_lm.errors import Complaint, ConfigError, too_small
from efficient_lm.lazy import lazy

tokenizers = lazy('tokenizers')


def _bytes(text: str | bytes) -> bytes:
  return text.encode('utf-8', 'surrogateescape') if isinstance(text, str) else text


class _Codec:
  """What the tokenizers share; they differ in `encode` and `decode_bytes`."""

  def encode_all(self, documents: Sequence[str | bytes]) -> list[np.ndarray]:
    return [self.encode(document) for document in documents]

  def decode(self, ids) -> str:
    return self.decode_bytes(ids).decode('utf-8', 'replace')

  def check(self) -> Iterator[Complaint]:
    yield from ()

  def fit(self, documents: Sequence[bytes], corpus_hash: str):
    del documents, corpus_hash  # nothing to learn
    return self


@dataclasses.dataclass
class ByteTokenizer(_Codec):
  """Every byte is its own id; id 256 ends a document."""
  vocab_size = 257
  eod = 256
  key = 'bytes'

  @property
  def bytes_V(self) -> np.ndarray:
    return np.append(np.ones(256, np.int32), np.int32(0))

  def encode(self, text: str | bytes) -> np.ndarray:
    return np.frombuffer(_bytes(text), np.uint8).astype(np.int32)

  def decode_bytes(self, ids) -> bytes:
    ids = np.asarray(ids)
    return ids[ids < 256].astype(np.uint8).tobytes()

  def to_json(self) -> str:
    return json.dumps({'kind': 'bytes'})


@dataclasses.dataclass
class SymbolTokenizer(_Codec):
  """Every character of `symbols` is its own id, in that order. Documents have no end mark."""
  symbols: str = 'ab'
  eod = None

  def check(self) -> Iterator[Complaint]:
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


@dataclasses.dataclass
class BPE:
  """Byte-pair encoding over bytes; `fit` learns it from the training text once and caches it: a BytePairs.

  Source: Sennrich et al. 2016, arXiv:1508.07909; bytes and the splitting of words as in GPT-2.

  Attributes:
    vocab_size: ids in all: 256 bytes, the merges, and the end of a document as the last one. A corpus too
      small for so many merges leaves ids unused.
    train_bytes: of the training text are learned from.
  """
  vocab_size: int = 4096
  train_bytes: int = 32_000_000

  def check(self) -> Iterator[Complaint]:
    yield from too_small(self, vocab_size=257, train_bytes=1)

  def fit(self, documents: Sequence[bytes], corpus_hash: str) -> 'BytePairs':
    key = cache.digest('bpe', corpus_hash, self.vocab_size, self.train_bytes)
    model = cache.fetch(key, lambda: {'model': np.frombuffer(self._learn(documents).encode(), np.uint8)})
    return BytePairs(model['model'].tobytes().decode(), self.vocab_size)

  def _learn(self, documents: Sequence[bytes]) -> str:
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=self.vocab_size - 1, min_frequency=2, show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))

    def texts():
      left = self.train_bytes
      for document in documents:
        if left <= 0: return
        yield document[:left].decode('utf-8', 'ignore')
        left -= len(document)

    learner.train_from_iterator(texts(), trainer)
    return learner.to_str()


class BytePairs(_Codec):
  """A learned BPE. Bytes that are not UTF-8 become ids of single bytes: every document survives."""

  def __init__(self, model: str, vocab_size: int):
    """model: JSON of the package `tokenizers`. Raises ValueError if it does not fit in `vocab_size`."""
    self.model = json.dumps(json.loads(model))  # one spelling, as it is part of the key
    self.vocab_size, self.eod = vocab_size, vocab_size - 1
    self._encoder = tokenizers.Tokenizer.from_str(model)
    byte_of = _byte_of_character()
    self._pieces = [b''] * vocab_size
    for piece, index in self._encoder.get_vocab().items():
      if index >= self.eod: raise ValueError(f'token {index} does not fit in a vocabulary of {vocab_size}')
      self._pieces[index] = bytes(byte_of[character] for character in piece)
    self._byte_ids = {piece[0]: index for index, piece in enumerate(self._pieces) if len(piece) == 1}

  @functools.cached_property
  def key(self) -> str:
    return cache.digest('byte pairs', self.model, self.vocab_size)

  @property
  def bytes_V(self) -> np.ndarray:
    return np.array([len(piece) for piece in self._pieces], np.int32)

  def encode(self, text: str | bytes) -> np.ndarray:
    return self.encode_all([text])[0]

  def encode_all(self, documents: Sequence[str | bytes]) -> list[np.ndarray]:
    # Pieces alternate: valid text, then broken bytes, which Python decodes to lone surrogates.
    split = [re.split('([\udc80-\udcff]+)', _bytes(d).decode('utf-8', 'surrogateescape')) for d in documents]
    encoded = iter(self._encoder.encode_batch_fast([text for pieces in split for text in pieces[::2]]))

    def ids(index, piece):
      found = [self._byte_ids[byte] for byte in _bytes(piece)] if index % 2 else next(encoded).ids
      return np.array(found, np.int32)

    return [np.concatenate([ids(*item) for item in enumerate(pieces)]) for pieces in split]

  def decode_bytes(self, ids) -> bytes:
    return b''.join(self._pieces[index] for index in np.asarray(ids).tolist())

  def to_json(self) -> str:
    return json.dumps({'kind': 'bpe', 'vocab_size': self.vocab_size, 'model': json.loads(self.model)})


def from_json(text: str) -> ByteTokenizer | SymbolTokenizer | BytePairs:
  """The inverse of `to_json`. Raises ConfigError for anything else."""
  try:
    saved = json.loads(text)
    match saved['kind']:
      case 'bytes': return ByteTokenizer()
      case 'symbols': return SymbolTokenizer(saved['symbols'])
      case 'bpe': return BytePairs(json.dumps(saved['model']), saved['vocab_size'])
  except ImportError: raise
  except Exception as error:  # the package raises bare Exceptions for a bad model
    raise ConfigError('tokenizer', text[:40], f'is no saved tokenizer ({type(error).__name__})') from error
  raise ConfigError('tokenizer', saved['kind'], 'bytes, symbols or bpe are the kinds there are')


def _byte_of_character() -> dict[str, int]:
  """GPT-2's spelling of bytes: printable characters are themselves, the others follow from 256 on."""
  printable = [byte for byte in range(256) if 33 <= byte <= 126 or (byte >= 161 and byte != 173)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}
