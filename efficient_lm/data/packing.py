"""Rows of constant length out of documents of any length.

All documents form one stream of tokens, each between the tokenizer's marks: `bos d1 … dn eod`. Where bos and eod are one
mark, it stands once between two documents and does both: `eod d1 … dn eod e1 … em eod`. Row r reads tokens r*T … r*T + T of
the stream. Neighbouring rows share one token, a target in the one and an input in the other, so that every token of the
stream but its first is a target exactly once. With a bos these are all tokens of all documents and all their ends; without,
a document's first token is none, as nothing stands before it. Batches are dicts of numpy arrays [B, T]:

  inputs_BT     int32
  targets_BT    int32, the token after each input
  segments_BT   int32, the document's number within the row, from 1 on; 0 is padding
  positions_BT  int32, index within the document's part in this row, from 0 on
  weights_BT    float32, 1 where the target counts: not where it begins another document than the input's
  bytes_BT      int32, bytes of text the target stands for, 0 for marks and where it does not count

Rows may overlap, for an evaluation by sliding windows: with a stride below T, row r reads tokens r*stride … r*stride + T,
and of these only targets that no earlier row has count. So every token is a target that counts once still, and all but
those of the first row are predicted from at least T - stride + 1 tokens, where their document has so many.

As an input, a mark that two documents share belongs to the second, at position 0; as a target it is the end of the first.
The last one begins no document and is no input.
"""
import dataclasses
from collections.abc import Sequence

import numpy as np

from efficient_lm.errors import ConfigError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Stream:
  """Documents one after the other.

  Attributes:
    tokens: integers, possibly memory-mapped.
    starts: int64, index in it of every document's first token, its bos if it has one; increasing from 0.
    bytes_V: the tokenizer's.
    shared_mark: whether the token that begins a document is also the end of the one before.
  """
  tokens: np.ndarray
  starts: np.ndarray
  bytes_V: np.ndarray
  shared_mark: bool = False

  @property
  def num_targets(self) -> int:
    """How many tokens are asked: all but the first of each document or, where the ends are shared, of the stream."""
    return len(self.tokens) - (1 if self.shared_mark else len(self.starts))

  def first(self, count: int) -> 'Stream':
    """The stream of which the first `count` tokens are inputs and the one after them is the last target."""
    tokens = self.tokens[:count + 1]
    return dataclasses.replace(self, tokens=tokens, starts=self.starts[:np.searchsorted(self.starts, len(tokens))])


def pack(tokenizer, documents: Sequence[bytes]) -> Stream:
  """The stream of these documents, in the smallest type that holds the vocabulary."""
  dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
  shared = has_shared_mark(tokenizer)
  mark = lambda index, wanted: np.array([index] if wanted and index is not None else [], dtype)
  begin, end = mark(tokenizer.bos, True), mark(tokenizer.eod, not shared)
  parts = [np.concatenate([begin, ids.astype(dtype), end]) for ids in tokenizer.encode_all(documents)]
  starts = np.cumsum([0] + [len(part) for part in parts], dtype=np.int64)[:-1]
  tokens = np.concatenate([*parts, mark(tokenizer.eod, shared)])
  return Stream(tokens, starts, tokenizer.bytes_V, shared)


def has_shared_mark(tokenizer) -> bool:
  """Whether one mark ends a document and begins the next."""
  return tokenizer.bos is not None and tokenizer.bos == tokenizer.eod


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows of a stream, by number. `stride`: of overlapping ones (None: T, rows side by side). Raises ConfigError for a
  sequence_length (T) below 1, and for a stride that is not in 1 … T."""
  stream: Stream
  sequence_length: int
  stride: int | None = None

  def __post_init__(self):
    if self.sequence_length < 1: raise ConfigError('train.sequence_length', self.sequence_length, 'at least 1')
    if self.stride is not None and not 1 <= self.stride <= self.sequence_length:
      raise ConfigError('stride', self.stride, f'must be from 1 to {self.sequence_length}, the tokens of a row')

  @property
  def step(self) -> int:
    """How many tokens a row begins after the one before."""
    return self.sequence_length if self.stride is None else self.stride

  def __len__(self) -> int:
    after_first = len(self.stream.tokens) - 1 - self.sequence_length
    return max(-(-after_first // self.step), 0) + (len(self.stream.tokens) > 1)  # the last one may be padded

  def __getitem__(self, rows) -> Batch:
    """The batch of the rows with these numbers; numbers past the end give rows of padding."""
    tokens, starts = self.stream.tokens, self.stream.starts
    row_B = np.asarray(rows, np.int64)
    index_BS = row_B[:, None] * self.step + np.arange(self.sequence_length + 1)
    real_BS = (index_BS < len(tokens)) & (row_B < len(self))[:, None]
    token_BS = np.where(real_BS, tokens[np.where(real_BS, index_BS, 0)], 0).astype(np.int32)
    document_BS = np.searchsorted(starts, index_BS, side='right') - 1
    first_BS = np.maximum(starts[document_BS], index_BS[:, :1])  # of the document's part in this row
    # A shared mark is asked of the document that it ends, and the last one begins none.
    shared, same_BT = self.stream.shared_mark, document_BS[:, 1:] == document_BS[:, :-1]
    new_BT = (row_B[:, None] == 0) | (np.arange(self.sequence_length) >= self.sequence_length - self.step)
    counts_BT = real_BS[:, 1:] & (same_BT | shared) & new_BT
    real_BT = real_BS[:, 1:] if shared else real_BS[:, :-1]
    return {
        'inputs_BT': np.where(real_BT, token_BS[:, :-1], 0),
        'targets_BT': token_BS[:, 1:],
        'segments_BT': np.where(real_BT, document_BS[:, :-1] - document_BS[:, :1] + 1, 0).astype(np.int32),
        'positions_BT': np.where(real_BT, (index_BS - first_BS)[:, :-1], 0).astype(np.int32),
        'weights_BT': counts_BT.astype(np.float32),
        'bytes_BT': np.where(counts_BT, self.stream.bytes_V[token_BS[:, 1:]], 0).astype(np.int32),
    }
