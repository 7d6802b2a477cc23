"""What a loss is worth: two compressors without a neural network, on the very text the evaluation reads.

`xz` gets the held-out text alone; `order3` learns from the training text, as the model does, and predicts
what the model is asked: every byte after a document's first, and its end where it has one. Both in bits per
byte; an interesting model is below both.
Source: interpolated Kneser-Ney smoothing, Chen and Goodman 1998, TR-10-98, section 2.7.
"""
import lzma
from collections.abc import Iterable

import numpy as np

from efficient_lm.data import cache
from efficient_lm.data.corpus import OpenCorpus

_BITS = 9  # of a symbol in a packed n-gram: 256 bytes and the end of a document
_END = 256
_MAX_BYTES = 64_000_000  # of training text the context model counts


def yardsticks(corpus: OpenCorpus) -> dict[str, float]:
  """{'xz': …, 'order3': …} in bits per byte on the text of `corpus.eval_batches()`; seconds, then cached."""
  def build():
    documents = corpus.eval_documents()
    model = ContextModel(document.content for document in corpus.text.train)
    ends = corpus.tokenizer.eod is not None
    return {'bits': np.array([xz(documents), model.bits_per_byte(documents, ends)])}
  tokens = corpus.eval_rows * corpus.heldout.sequence_length
  bits = cache.fetch(cache.digest('yardsticks', corpus.hash, corpus.tokenizer.key, tokens), build)['bits']
  return {'xz': float(bits[0]), 'order3': float(bits[1])}


def xz(documents: Iterable[bytes]) -> float:
  """Bits per byte of the concatenated documents after lzma at its strongest preset."""
  text = b''.join(documents)
  return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


class ContextModel:
  """P(symbol | the `order` before it) of bytes and document ends, counted over documents.

  P_k(w|c) = (max(n(cw) - D_k, 0) + D_k u(c) P_{k-1}(w|c')) / n(c): c' lacks the oldest symbol of c, u(c)
  counts the different symbols after c; below the highest order n counts the different symbols before an
  n-gram. P_{-1} is uniform, D_k is n_1 / (n_1 + 2 n_2).
  """

  def __init__(self, documents: Iterable[bytes], order: int = 3):
    self.order = order
    grams, counts = np.unique(_grams(_limited(documents), order), return_counts=True)
    self._levels = []
    for length in range(order + 1, 0, -1):
      if length <= order: grams, counts = np.unique(grams & (1 << _BITS * length) - 1, return_counts=True)
      self._levels.insert(0, _Level(grams, counts))

  def probability(self, grams: np.ndarray) -> np.ndarray:
    """P(last symbol | those before it) of packed n-grams: order + 1 symbols, 9 bits each, oldest highest."""
    result = np.full(grams.shape, 1 / (_END + 1))
    for length, level in enumerate(self._levels, start=1):
      result = level.refine(grams & (1 << _BITS * length) - 1, result)
    return result

  def bits_per_byte(self, documents: Iterable[bytes], ends: bool = True) -> float:
    """Bits of all but each document's first byte, and of its end if `ends`, divided by those bytes."""
    grams = _grams(documents, self.order, skip=1)
    is_byte = grams & (1 << _BITS) - 1 != _END
    asked = grams if ends else grams[is_byte]
    return float(-np.log2(self.probability(asked)).sum()) / max(int(is_byte.sum()), 1)


class _Level:
  """The counts of one order: grams (sorted, packed) with how often each."""

  def __init__(self, grams: np.ndarray, counts: np.ndarray):
    self.grams, self.counts = grams, counts.astype(np.float64)
    # Sorted n-grams keep those of a context together.
    self.contexts, first = np.unique(grams >> _BITS, return_index=True)
    self.totals = np.add.reduceat(self.counts, first)
    self.kinds = np.diff(np.append(first, len(grams)))
    ones, twos = np.sum(counts == 1), np.sum(counts == 2)
    # One more of each than seen: a corpus without rare n-grams must still leave something for what it lacks.
    self.discount = (ones + 1) / (ones + 1 + 2 * (twos + 1))

  def refine(self, grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """The probability at this order from the one below, which an unseen context cannot improve on."""
    place, known = _find(self.contexts, grams >> _BITS)
    seen, here = _find(self.grams, grams)
    kept = np.where(here, np.maximum(self.counts[seen] - self.discount, 0), 0)
    mixed = (kept + self.discount * self.kinds[place] * lower) / self.totals[place]
    return np.where(known, mixed, lower)


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
  return place, table[place] == keys


def _grams(documents: Iterable[bytes], order: int, skip: int = 0) -> np.ndarray:
  """One packed n-gram a symbol (int64), the end of its document included, the first `skip` left out.

  Before a document stand `order` end marks, so that no context reaches into the document before.
  """
  before = np.full(order, _END, np.int64)
  padded = [np.concatenate([before, np.frombuffer(document, np.uint8), [_END]]) for document in documents]
  first = [np.arange(len(document)) < order + skip for document in padded]
  stream = np.concatenate(padded)
  grams = np.zeros_like(stream)
  for back in range(order + 1): grams[back:] |= stream[:len(stream) - back] << _BITS * back
  return grams[~np.concatenate(first)]


def _limited(documents: Iterable[bytes]) -> list[bytes]:
  """The first documents, until there is more text than three bytes of context can learn from."""
  taken, left = [], _MAX_BYTES
  for document in documents:
    if left <= 0: break
    taken.append(document[:left])
    left -= len(document)
  return taken
