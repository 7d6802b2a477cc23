"""Languages whose entropy is known exactly: a loss below it proves a leak, a loss near it proves learning.

A document is `document_length` symbols of a stationary order-k chain: the next symbol depends on the k before
it through a table drawn once from a Dirichlet distribution. Documents are independent and have one length and
no end mark, so that no nat is spent on where they end. Symbols are letters, so documents can be read.

The entropy per predicted token counts what a model of whole documents is asked: every token but the first,
the early ones from fewer than k symbols. It is attained when rows hold whole documents (`sequence_length` a
multiple of `document_length`) and is a strict lower bound otherwise, for held-out text; training text repeats
after an epoch and can be memorised.
Source: Cover and Thomas, Elements of Information Theory, 2nd ed., theorem 4.2.4.
"""
import dataclasses
import itertools
import math
import string
from collections.abc import Iterator, Sequence

import numpy as np

from efficient_lm.data.files import Document, Text
from efficient_lm.errors import Problem, at_least

_SYMBOLS = string.ascii_lowercase + string.digits
_DOMAINS = string.ascii_uppercase
_MAX_TABLE = 2**22


@dataclasses.dataclass
class Markov:
  """One order-k language.

  Attributes:
    alphabet: how many symbols, at most 36.
    order: k, how many symbols the next one depends on.
    concentration: of the Dirichlet distribution; small is predictable, large is noise.
    document_length: symbols a document.
    train_documents, heldout_documents: how many are drawn, independently.
    seed: draws the language and the documents.
  """
  alphabet: int = 8
  order: int = 2
  concentration: float = 0.3
  document_length: int = 256
  train_documents: int = 16384
  heldout_documents: int = 1024
  seed: int = dataclasses.field(default=0, metadata={'wide': True})

  def check(self) -> Iterator[Problem]:
    bad = list(at_least(self, alphabet=2, order=0, concentration=1e-3, document_length=2, train_documents=1,
                         heldout_documents=1, seed=0))
    yield from bad
    if bad: return
    if self.alphabet > len(_SYMBOLS): yield 'alphabet', self.alphabet, f'at most {len(_SYMBOLS)} symbols'
    elif (self.order + 1) * math.log2(self.alphabet) > math.log2(_MAX_TABLE):
      yield 'order', self.order, f'alphabet ** (order + 1) may be {_MAX_TABLE} at most'

  @property
  def symbols(self) -> str:
    """One character a token, in the order of their ids."""
    return _SYMBOLS[:self.alphabet]

  @property
  def entropy_rate(self) -> float:
    """Nats a symbol, given all before it."""
    return conditional_entropies(self.table())[-1]

  @property
  def entropy_nats_per_token(self) -> float:
    """Nats a predicted token: the mean over positions 2 … document_length."""
    return float(np.mean(_entropy_at(self.table(), np.arange(1, self.document_length))))

  def table(self) -> np.ndarray:
    """P(next | context), [alphabet] * (order + 1), oldest symbol first."""
    return _table(self, domain=0)

  def read(self) -> Text:
    return _text(self, [self.table()], marks=[''], length=self.document_length)


@dataclasses.dataclass
class MarkovMixture:
  """Domains with a language each, all equally likely a document: something for experts to specialise in.

  Attributes:
    language: the settings all domains share; each has its own table.
    domains: how many, at most 26.
    domain_symbol: whether a document begins with a capital letter that names its domain. Without it the
      entropy is a lower bound: finding the domain out costs up to log(domains) nats a document more.
  """
  language: Markov = dataclasses.field(default_factory=lambda: Markov(order=1))
  domains: int = 4
  domain_symbol: bool = True

  def check(self) -> Iterator[Problem]:
    bad = [(f'language.{field}', value, fix) for field, value, fix in self.language.check()]
    bad += at_least(self, domains=1)
    yield from bad
    if bad: return
    if self.domains > len(_DOMAINS):
      yield 'domains', self.domains, f'at most {len(_DOMAINS)}'
    if self.domain_symbol and self.language.document_length < 3:
      yield 'language.document_length', self.language.document_length, 'at least 3, one of them the domain'

  @property
  def symbols(self) -> str:
    """The language's symbols and then, where documents name it, the domains."""
    return self.language.symbols + (_DOMAINS[:self.domains] if self.domain_symbol else '')

  @property
  def entropy_rate(self) -> float:
    """Nats a symbol, given the domain and all before it."""
    return float(np.mean([conditional_entropies(table)[-1] for table in self.tables()]))

  @property
  def entropy_nats_per_token(self) -> float:
    """Nats a predicted token given the domain; a domain symbol comes first and is never predicted."""
    length = self.language.document_length
    positions = np.arange(0, length - 1) if self.domain_symbol else np.arange(1, length)
    return float(np.mean([_entropy_at(table, positions) for table in self.tables()]))

  def tables(self) -> list[np.ndarray]:
    """One `Markov.table` a domain."""
    return [_table(self.language, domain) for domain in range(self.domains)]

  def read(self) -> Text:
    marks = _DOMAINS[:self.domains] if self.domain_symbol else [''] * self.domains
    length = self.language.document_length - bool(self.domain_symbol)
    return _text(self.language, self.tables(), marks, length)


def conditional_entropies(table: np.ndarray) -> list[float]:
  """[H(X1), H(X2|X1), …, H(X_{k+1}|X1…Xk)] of the stationary chain in nats; the last is the entropy rate."""
  order = table.ndim - 1
  joint = stationary(table)[..., None] * table  # P(x1 … x_{k+1})
  blocks = [0.0] + [_entropy(joint.sum(axis=tuple(range(size, order + 1)))) for size in range(1, order + 2)]
  return [float(high - low) for low, high in itertools.pairwise(blocks)]


def stationary(table: np.ndarray) -> np.ndarray:
  """P(k symbols in a row), [alphabet] * k: the fixed point, unique because tables are positive."""
  order = table.ndim - 1
  context = np.full(table.shape[:-1], table.shape[-1] ** -float(order))
  for _ in range(100_000):
    moved = (context[..., None] * table).sum(axis=0) if order else context
    change = np.abs(moved - context).sum()
    context = moved / moved.sum()
    if change < 1e-14: break
  return context


def _entropy_at(table: np.ndarray, positions: np.ndarray) -> np.ndarray:
  """Nats of the symbol that follows `positions` symbols of its document."""
  return np.asarray(conditional_entropies(table))[np.minimum(positions, table.ndim - 1)]


def _entropy(probabilities: np.ndarray) -> float:
  positive = probabilities[probabilities > 0]
  return float(-(positive * np.log(positive)).sum())


def _table(language: Markov, domain: int) -> np.ndarray:
  size, order = language.alphabet, language.order
  rng = np.random.default_rng([language.seed, domain, 0])
  table = rng.dirichlet(np.full(size, language.concentration), size=size**order)
  # A little noise: with no probability at zero the stationary distribution is unique and losses are finite.
  return (0.99 * table + 0.01 / size).reshape((size,) * (order + 1))


def _text(language: Markov, tables: list[np.ndarray], marks: Sequence[str], length: int) -> Text:
  """Draws documents of `length` symbols behind their domain's mark, independently: equal ones all stay."""
  rng = np.random.default_rng([language.seed, 1])
  train = language.train_documents
  count = train + language.heldout_documents
  domain_B = rng.integers(len(tables), size=count)
  letters = np.frombuffer(language.symbols.encode(), np.uint8)
  documents: list[Document] = [Document('', b'')] * count
  for domain, table in enumerate(tables):
    members = np.flatnonzero(domain_B == domain)
    symbols_BT = letters[_draw(table, len(members), length, rng)]
    for index, symbols_T in zip(members, symbols_BT):
      documents[index] = Document(f'domain{domain}/{index:07d}', marks[domain].encode() + symbols_T.tobytes())
  return Text(train=tuple(documents[:train]), heldout=tuple(documents[train:]))


def _draw(table: np.ndarray, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
  """[count, length] symbols of the stationary chain, by inversion of its cumulative probabilities."""
  size, order = table.shape[-1], table.ndim - 1
  first_C = np.cumsum(stationary(table).reshape(-1))
  cumulative_CA = np.cumsum(table.reshape(-1, size), axis=-1)
  state_B = np.minimum(np.searchsorted(first_C, rng.random(count), 'right'), len(first_C) - 1)
  columns = [state_B // size**(order - 1 - back) % size for back in range(order)]
  while len(columns) < length:
    # The last column counts as 1 whatever rounding left of it.
    next_B = (cumulative_CA[state_B, :-1] <= rng.random(count)[:, None]).sum(axis=-1)
    columns.append(next_B)
    state_B = (state_B * size + next_B) % size**order
  return np.stack(columns[:length], axis=-1)
