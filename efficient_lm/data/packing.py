"""Rows of constant length out of documents of any length.

All documents form one stream, each followed by its end mark; row r reads tokens r*T … r*T + T of it.
Neighbouring rows share one token, a target in the one and an input in the other, so that every token of the
stream but its first is a target exactly once. Batches are dicts of numpy arrays [B, T]:

  inputs_BT     int32
  targets_BT    int32, the token after each input
  segments_BT   int32, the document's number within the row, from 1 on; 0 is padding
  positions_BT  int32, index within the document's part in this row, from 0 on
  weights_BT    float32, 1 where the target counts: the end mark does, a following document's first token not
  bytes_BT      int32, bytes of text the target stands for, 0 where it does not count
"""
import dataclasses
from collections.abc import Sequence

import numpy as np

Batch = dict[str, np.ndarray]


def concatenate(tokenizer, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
  """The stream, in the smallest type that holds the vocabulary, and where each document starts (int64)."""
  dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
  end = np.array([] if tokenizer.eod is None else [tokenizer.eod], dtype)
  encoded = [np.append(ids.astype(dtype), end) for ids in tokenizer.encode_all(documents)]
  starts = np.cumsum([0] + [len(ids) for ids in encoded], dtype=np.int64)[:-1]
  return np.concatenate([np.array([], dtype), *encoded]), starts


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows of a stream, by number.

  Attributes:
    tokens: the stream, integers, possibly memory-mapped.
    starts: index in it of every document's first token, increasing from 0.
    bytes_V: the tokenizer's.
    sequence_length: T.
  """
  tokens: np.ndarray
  starts: np.ndarray
  bytes_V: np.ndarray
  sequence_length: int

  def __len__(self) -> int:
    return -(-(len(self.tokens) - 1) // self.sequence_length)  # the last one may be padded

  def __getitem__(self, rows) -> Batch:
    """The batch of the rows with these numbers; numbers past the end give rows of padding."""
    row_B = np.asarray(rows, np.int64)
    index_BS = row_B[:, None] * self.sequence_length + np.arange(self.sequence_length + 1)
    real_BS = (index_BS < len(self.tokens)) & (row_B < len(self))[:, None]
    token_BS = np.where(real_BS, self.tokens[np.where(real_BS, index_BS, 0)], 0).astype(np.int32)
    document_BS = np.searchsorted(self.starts, index_BS, side='right') - 1
    first_BS = np.maximum(self.starts[document_BS], index_BS[:, :1])  # of the document's part in this row
    counts_BT = real_BS[:, 1:] & (document_BS[:, 1:] == document_BS[:, :-1])
    real_BT = real_BS[:, :-1]
    return {
        'inputs_BT': token_BS[:, :-1],
        'targets_BT': token_BS[:, 1:],
        'segments_BT': np.where(real_BT, document_BS[:, :-1] - document_BS[:, :1] + 1, 0).astype(np.int32),
        'positions_BT': np.where(real_BT, (index_BS - first_BS)[:, :-1], 0).astype(np.int32),
        'weights_BT': counts_BT.astype(np.float32),
        'bytes_BT': np.where(counts_BT, self.bytes_V[token_BS[:, 1:]], 0).astype(np.int32),
    }
