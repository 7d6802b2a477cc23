"""Two compressors without a neural network, on the very text the evaluation reads: what a loss is to be compared with.

`xz` gets the held-out text alone; `order3` learns from the training text, as the model does. Both predict what the model is
asked: every byte and every end of a document, except what the tokenizer leaves out, which is a document's first token where
no mark begins it and its end where no mark ends it. Both in bits per byte; an interesting model is below both.
Source: interpolated Kneser-Ney smoothing, Chen and Goodman 1998, TR-10-98, section 2.7.
"""
import lzma
from collections.abc import Iterable, Sequence

import numpy as np

from efficient_lm.data import cache
from efficient_lm.data.corpus import Asked, OpenCorpus

_BITS = 9  # of a symbol in a packed n-gram: 256 bytes and the end of a document
_END = 256
_MAX_BYTES = 64_000_000  # of training text the context model counts


def baselines(corpus: OpenCorpus) -> dict[str, float]:
  """{'xz': …, 'order3': …} in bits per byte on the text of `corpus.eval_batches`; seconds, then cached."""
  def build():
    documents = corpus.eval_documents()
    model = ContextModel((document.content for document in corpus.text.train), ends=corpus.tokenizer.eod is not None)
    return {'bits': np.array([xz(documents), model.bits_per_byte(documents)])}
  key = cache.digest('baselines', corpus.hash, corpus.tokenizer.key, corpus.config.eval_tokens)
  return dict(zip(('xz', 'order3'), cache.fetch(key, build)['bits'].tolist()))


def xz(documents: Sequence[Asked]) -> float:
  """Bits per byte after lzma at its strongest preset of the concatenated documents and, four bytes each, the lengths of
  those whose end is asked. What is given is compressed, and counted, with the rest."""
  text = b''.join(document.content for document in documents)
  lengths = b''.join(len(document.content).to_bytes(4) for document in documents if document.is_ended)
  return 8 * len(lzma.compress(text + lengths, preset=9 | lzma.PRESET_EXTREME)) / max(len(text), 1)


class ContextModel:
  """P(symbol | the `order` before it) of bytes and document ends, counted over documents.

  P_k(w|c) = (max(n(cw) - D_k, 0) + D_k u(c) P_{k-1}(w|c')) / n(c): c' lacks the oldest symbol of c, u(c)
  counts the different symbols after c; below the highest order n counts the different symbols before an
  n-gram. P_{-1} is uniform, D_k is n_1 / (n_1 + 2 n_2).

  ends: whether it learns where documents end; one that is never asked should not expect it.
  """

  def __init__(self, documents: Iterable[bytes], order: int = 3, ends: bool = True):
    self.order = order
    documents = [Asked(document, 0, ends) for document in _limited(documents)]
    grams, counts = np.unique(_grams(documents, order), return_counts=True)
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

  def bits_per_byte(self, documents: Sequence[Asked]) -> float:
    """Bits of the bytes and ends that are asked, divided by these bytes."""
    num_bytes = sum(len(document.content) - document.given for document in documents)
    return float(-np.log2(self.probability(_grams(documents, self.order))).sum()) / max(num_bytes, 1)


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


def _grams(documents: Sequence[Asked], order: int) -> np.ndarray:
  """One packed n-gram (int64) for each byte and end that is asked.

  Before a document stand `order` end marks, so that no context reaches into the document before.
  """
  before = np.full(order, _END, np.int64)
  padded = [np.concatenate([before, np.frombuffer(document.content, np.uint8), [_END]]) for document in documents]
  stream = np.concatenate(padded)
  grams = np.zeros_like(stream)
  for back in range(order + 1): grams[back:] |= stream[:len(stream) - back] << _BITS * back
  asked = np.zeros(len(stream), bool)
  end = 0
  for document, part in zip(documents, padded):
    first, end = end + order + document.given, end + len(part)
    asked[first:end if document.is_ended else end - 1] = True
  return grams[asked]


def _limited(documents: Iterable[bytes]) -> list[bytes]:
  """The first documents, until there is more text than three bytes of context can learn from."""
  taken, left = [], _MAX_BYTES
  for document in documents:
    if left <= 0: break
    taken.append(document[:left])
    left -= len(document)
  return taken
