"""`Corpus`, what a config calls `data`, and `OpenCorpus`, what a run reads."""
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from efficient_lm.data import cache, packing, pipeline
from efficient_lm.data.files import Text
from efficient_lm.data.packing import Batch, Rows
from efficient_lm.data.sources import StandardLibrary
from efficient_lm.data.tokenizers import ByteTokenizer, SymbolTokenizer
from efficient_lm.errors import Complaint, ConfigError, too_small


@dataclasses.dataclass
class Corpus:
  """Text, how it becomes tokens, and how much of its held-out part an evaluation reads.

  Attributes:
    source: one of `sources` or `markov`.
    tokenizer: ByteTokenizer(), BPE(…) or SymbolTokenizer(…); None: the symbols of a synthetic language,
      bytes for all else.
    eval_batches: of held-out text an evaluation reads at most, from the beginning.
  """
  source: Any = dataclasses.field(default_factory=StandardLibrary)
  tokenizer: Any = None
  eval_batches: int = 32

  def check(self) -> Iterator[Complaint]:
    """Complaints as (field, value, fix), fields relative to this object. Reads no text: takes no time."""
    for name, part in (('source', self.source), ('tokenizer', self.unfitted)):
      for field, value, fix in part.check(): yield f'{name}.{field}', value, fix
    yield from too_small(self, eval_batches=1)
    symbols = getattr(self.source, 'symbols', None)
    if symbols and self.tokenizer is not None and self.tokenizer != SymbolTokenizer(symbols):
      yield 'tokenizer', self.tokenizer, 'leave it None: a synthetic language brings its own'

  @property
  def unfitted(self):
    """The tokenizer as configured."""
    if self.tokenizer is not None: return self.tokenizer
    symbols = getattr(self.source, 'symbols', None)
    return SymbolTokenizer(symbols) if symbols else ByteTokenizer()

  @property
  def vocab_size(self) -> int:
    """Known without reading any text."""
    return self.unfitted.vocab_size

  def open(self, *, sequence_length: int, batch_size: int, seed: int, process_index: int = 0,
           process_count: int = 1) -> 'OpenCorpus':
    """Reads and tokenizes, or takes both from the cache. Raises ConfigError for what cannot be used."""
    for field, value, fix in self.check(): raise ConfigError(f'data.{field}', value, fix)
    if sequence_length < 1: raise ConfigError('train.sequence_length', sequence_length, 'at least 1')
    if seed < 0: raise ConfigError('seed', seed, 'at least 0')
    text = self.source.read()
    for side, documents in (('training', text.train), ('held-out', text.heldout)):
      if sum(len(document.content) for document in documents) < 2:
        raise ConfigError('data.source', self.source, f'no {side} text is left; name more or other text')
    tokenizer = self.unfitted.fit([document.content for document in text.train], text.hash)
    arrays = _tokens(text, tokenizer)
    train, heldout = (
        Rows(arrays[f'{side}_tokens'], arrays[f'{side}_starts'], tokenizer.bytes_V, sequence_length)
        for side in ('train', 'heldout'))
    process = {'process_index': process_index, 'process_count': process_count}
    batches = pipeline.Batches(train, batch_size=batch_size, seed=seed, **process)
    return OpenCorpus(self, text, tokenizer, batches, heldout, process)


@dataclasses.dataclass(frozen=True)
class OpenCorpus:
  """A corpus as a run reads it.

  Attributes:
    config: what it was opened from.
    text: the documents themselves.
    tokenizer: fitted; see `tokenizers` for what it has.
    train: `train[step]` is this process's part of that step's batch (see `packing` for its arrays).
    heldout: the rows of the held-out text.
    process: process_index and process_count.
  """
  config: Corpus
  text: Text
  tokenizer: Any
  train: pipeline.Batches
  heldout: Rows
  process: dict[str, int]

  def iterate(self, start_step: int = 0) -> Iterator[Batch]:
    """train[start_step], train[start_step + 1], … without end, made ahead in a thread."""
    return self.train.iterate(start_step)

  def eval_batches(self) -> Iterator[Batch]:
    """This process's part of the evaluation: the same rows in the same order every time."""
    return pipeline.in_sequence(
        self.heldout, batch_size=self.train.batch_size, limit=self.config.eval_batches, **self.process)

  @property
  def eval_rows(self) -> int:
    """How many rows one evaluation reads, over all processes."""
    return min(len(self.heldout), self.config.eval_batches * self.train.batch_size)

  @functools.cached_property
  def eval_bytes(self) -> int:
    """Bytes of text one evaluation predicts, over all processes: bits per byte = nats / (ln 2 * bytes)."""
    rows = range(self.eval_rows)
    # A few rows at a time: memory stays small.
    return sum(int(self.heldout[rows[first:first + 64]]['bytes_BT'].sum()) for first in rows[::64])

  def eval_documents(self) -> list[bytes]:
    """The text the evaluation reads, a document each; the last may be cut."""
    end = min(self.eval_rows * self.heldout.sequence_length + 1, len(self.heldout.tokens))
    starts = self.heldout.starts[:np.searchsorted(self.heldout.starts, end)]
    return [self.tokenizer.decode_bytes(part) for part in np.split(self.heldout.tokens[:end], starts[1:])]

  @property
  def hash(self) -> str:
    """sha256 of all names and contents."""
    return self.text.hash

  @functools.cached_property
  def entropy_nats_per_token(self) -> float | None:
    """No model of held-out text can have a lower expected loss; None where nobody knows."""
    return getattr(self.config.source, 'entropy_nats_per_token', None)

  def describe(self) -> dict[str, Any]:
    """What a run records of its text."""
    return {
        'name': type(self.config.source).__name__,
        'tokenizer': type(self.tokenizer).__name__,
        'vocab_size': self.tokenizer.vocab_size,
        'train_bytes': sum(len(document.content) for document in self.text.train),
        'heldout_bytes': sum(len(document.content) for document in self.text.heldout),
        'train_tokens': len(self.train.rows.tokens),
        'heldout_tokens': len(self.heldout.tokens),
        'train_files': len(self.text.train),
        'heldout_files': len(self.text.heldout),
        'hash': self.hash,
    }


def _tokens(text: Text, tokenizer) -> dict[str, np.ndarray]:
  """{train,heldout}_{tokens,starts}, through the cache."""
  def build():
    arrays = {}
    for side, documents in (('train', text.train), ('heldout', text.heldout)):
      stream, starts = packing.concatenate(tokenizer, [document.content for document in documents])
      arrays |= {f'{side}_tokens': stream, f'{side}_starts': starts}
    return arrays
  return cache.fetch(cache.digest('tokens', text.hash, tokenizer.key), build)
