"""`Corpus`, what a config calls `data`, and `OpenCorpus`, what a run reads."""
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from efficient_lm.data import cache, packing, pipeline
from efficient_lm.data.files import Text
from efficient_lm.data.packing import Batch, Rows, Stream
from efficient_lm.data.sources import StandardLibrary
from efficient_lm.data.tokenizers import ByteTokenizer, SymbolTokenizer
from efficient_lm.errors import ConfigError, Problem, at_least


@dataclasses.dataclass
class Corpus:
  """Text, how it becomes tokens, and how much of its held-out part an evaluation reads.

  Attributes:
    source: one of `sources` or `markov`.
    tokenizer: ByteTokenizer(), BPE(…) or SymbolTokenizer(…); a source, such as FromRun(path=…): the one that its model
      was trained with; None: the symbols of a synthetic language, bytes for all else.
    eval_tokens: how many tokens of the held-out text an evaluation predicts at most, from the beginning: the same
      text whatever the batch size and the sequence length.
  """
  source: Any = dataclasses.field(default_factory=StandardLibrary)
  tokenizer: Any = None
  eval_tokens: int = dataclasses.field(default=131_072, metadata={'wide': True})

  def check(self) -> Iterator[Problem]:
    """Problems as (field, value, fix), fields relative to this object. Reads no text: takes no time."""
    parts = {'source': self.source} | ({} if _is_source(self.tokenizer) else {'tokenizer': self.unfitted})
    for name, part in parts.items():
      for field, value, fix in part.check(): yield f'{name}.{field}', value, fix
    yield from at_least(self, eval_tokens=1)
    symbols = getattr(self.source, 'symbols', None)
    if symbols and self.tokenizer is not None and self.tokenizer != SymbolTokenizer(symbols):
      yield 'tokenizer', self.tokenizer, 'leave it None: a synthetic language brings its own'

  @property
  def unfitted(self):
    """The tokenizer as configured."""
    if _is_source(self.tokenizer): return self.tokenizer.tokenizer()
    if self.tokenizer is not None: return self.tokenizer
    symbols = getattr(self.source, 'symbols', None)
    return SymbolTokenizer(symbols) if symbols else ByteTokenizer()

  @property
  def vocab_size(self) -> int:
    """Known without reading any text."""
    return self.unfitted.vocab_size

  def open(self, *, seed: int, tokenizer=None, process_index: int = 0, process_count: int = 1) -> 'OpenCorpus':
    """Reads and tokenizes, or takes both from the cache. Raises ConfigError for what cannot be used.

    tokenizer: a fitted one, such as that of an earlier run, to be used as it is; None: the configured one, fitted to
      the training text.
    """
    for field, value, fix in self.check(): raise ConfigError(f'data.{field}', value, fix)
    if seed < 0: raise ConfigError('seed', seed, 'at least 0')
    text = self.source.read()
    if tokenizer is None: tokenizer = self.unfitted.fit([document.content for document in text.train], text.hash)
    try: train, heldout = _streams(text, tokenizer)
    except ConfigError: raise
    except ValueError as error:  # a character that is no symbol
      raise ConfigError('data.tokenizer', tokenizer, str(error)) from error
    for side, stream in (('training', train), ('held-out', heldout)):
      if stream.num_targets < 1:
        raise ConfigError('data.source', self.source, f'no {side} text is left; name more or other text')
    process = {'process_index': process_index, 'process_count': process_count}
    return OpenCorpus(self, text, tokenizer, train, heldout, seed, process)


def _is_source(part) -> bool: return hasattr(part, 'tokenizer')


class Asked(NamedTuple):
  """A document as an evaluation reads it."""
  content: bytes
  given: int  # bytes at its beginning that nothing precedes, which are therefore not predicted
  is_ended: bool  # whether its end is predicted


@dataclasses.dataclass(frozen=True)
class OpenCorpus:
  """A corpus as a run reads it: any number of trainings, each in batches of its own shape.

  Attributes:
    config: what it was opened from.
    text: the documents themselves.
    tokenizer: fitted; see `tokenizers` for what it has.
    train, heldout: the tokens of both sides.
    seed: of the order of the rows.
    process: process_index and process_count.
  """
  config: Corpus
  text: Text
  tokenizer: Any
  train: Stream
  heldout: Stream
  seed: int
  process: dict[str, int]

  def batches(self, *, batch_size: int, sequence_length: int) -> pipeline.Batches:
    """`batches[step]` is this process's part of that step's batch (see `packing` for its arrays).

    Raises ConfigError for a batch_size, over all processes, that these cannot share.
    """
    return pipeline.Batches(Rows(self.train, sequence_length), batch_size=batch_size, seed=self.seed, **self.process)

  def eval_batches(self, *, rows: int, sequence_length: int) -> Iterator[Batch]:
    """This process's part of the evaluation, `rows` rows at a time over all processes, the last ones padding.

    The same targets count whatever `rows` and `sequence_length` are; the latter limits what a target is predicted from.
    """
    return pipeline.in_sequence(Rows(self.evaluated, sequence_length), batch_size=rows, **self.process)

  def eval_rows(self, sequence_length: int) -> int:
    """How many rows that are not all padding one evaluation reads, over all processes."""
    return len(Rows(self.evaluated, sequence_length))

  @functools.cached_property
  def eval_bytes(self) -> int:
    """Bytes of text one evaluation predicts, over all processes: bits per byte = nats / (ln 2 * bytes)."""
    return sum(len(document.content) - document.given for document in self.eval_documents())

  def eval_documents(self) -> list[Asked]:
    """What the evaluation reads, by document; the last may be cut."""
    stream, found = self.evaluated, []
    for start, end in zip(stream.starts, [*stream.starts[1:], len(stream.tokens)]):
      asked = stream.tokens[start + 1:end + stream.shared_mark]
      if not len(asked): continue
      content = self.tokenizer.decode_bytes(stream.tokens[start:end])
      is_ended = self.tokenizer.eod is not None and int(asked[-1]) == self.tokenizer.eod
      found.append(Asked(content, len(content) - int(stream.bytes_V[asked].sum()), is_ended))
    return found

  @functools.cached_property
  def evaluated(self) -> Stream:
    """The held-out text that an evaluation reads."""
    return self.heldout.first(self.config.eval_tokens)

  @property
  def hash(self) -> str:
    """sha256 of all names and contents."""
    return self.text.hash

  @functools.cached_property
  def entropy_nats_per_token(self) -> float | None:
    """No model of held-out text can have a lower expected loss; None where nobody knows."""
    return getattr(self.config.source, 'entropy_nats_per_token', None)

  def describe(self) -> dict[str, Any]:
    """What a run records of its text, in plain values: with these it can say later that, and how much, it has changed."""
    described = {'name': type(self.config.source).__name__, 'hash': self.hash, 'tokenizer': type(self.tokenizer).__name__,
                 'tokenizer_key': self.tokenizer.key, 'vocab_size': self.tokenizer.vocab_size,
                 'left_out': list(self.text.left_out)}
    for side, documents, stream in (('train', self.text.train, self.train), ('heldout', self.text.heldout, self.heldout)):
      described |= {f'{side}_files': len(documents), f'{side}_bytes': sum(len(document.content) for document in documents),
                    f'{side}_tokens': len(stream.tokens)}
    return described


def _streams(text: Text, tokenizer) -> list[Stream]:
  """Of training and held-out text, through the cache."""
  def build():
    arrays = {}
    for side, documents in (('train', text.train), ('heldout', text.heldout)):
      stream = packing.pack(tokenizer, [document.content for document in documents])
      arrays |= {f'{side}_tokens': stream.tokens, f'{side}_starts': stream.starts}
    return arrays
  arrays = cache.fetch(cache.digest('tokens', text.hash, tokenizer.key), build)
  shared = packing.has_shared_mark(tokenizer)
  return [Stream(arrays[f'{side}_tokens'], arrays[f'{side}_starts'], tokenizer.bytes_V, shared)
          for side in ('train', 'heldout')]
