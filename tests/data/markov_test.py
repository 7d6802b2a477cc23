import dataclasses
import itertools
import math

import numpy as np
import pytest

from efficient_lm.data import Corpus, Markov, MarkovMixture, SymbolTokenizer, markov

SMALL = Markov(document_length=64, train_documents=400, heldout_documents=100)


def symbols(source, side='train'):
  """[documents, length] ids."""
  return np.stack([SymbolTokenizer(source.symbols).encode(d.content) for d in getattr(source.read(), side)])


def ideal_nats(tables, ids_NT, domain_N):
  """-ln P of every token after the first, by the chain that drew it: what a perfect model would pay."""
  total = np.zeros(len(ids_NT))
  for domain, table in enumerate(tables):
    order = table.ndim - 1
    joint = markov.stationary(table)[..., None] * table
    members = ids_NT[domain_N == domain]
    nats = np.zeros(len(members))
    for time in range(1, members.shape[1]):
      known = min(time, order)
      block = joint.sum(axis=tuple(range(known + 1, order + 1)))  # P(known symbols and the next)
      picked = block[tuple(members[:, time - known:time + 1].T)]
      past = block.sum(axis=-1)[tuple(members[:, time - known:time].T)]
      nats -= np.log(picked / past)
    total[domain_N == domain] = nats
  return total / (ids_NT.shape[1] - 1)


@pytest.mark.parametrize('order', [0, 1, 2, 3])
@pytest.mark.parametrize('alphabet', [2, 5])
def test_the_entropy_is_what_a_perfect_model_pays(order, alphabet):
  language = dataclasses.replace(SMALL, alphabet=alphabet, order=order, train_documents=4000)
  nats = ideal_nats([language.table()], symbols(language), np.zeros(4000, int))
  error = nats.std() / math.sqrt(len(nats))
  assert abs(nats.mean() - language.entropy_nats_per_token) < 4 * error
  assert 0 < language.entropy_rate <= language.entropy_nats_per_token + 1e-12 < math.log(alphabet)


def test_the_empirical_block_entropies_approach_the_analytic_ones():
  language = Markov(alphabet=3, order=2, document_length=100, train_documents=3000, heldout_documents=1)
  ids = symbols(language)
  trigrams = np.stack([ids[:, :-2], ids[:, 1:-1], ids[:, 2:]], -1).reshape(-1, 3)
  counts = np.zeros((3, 3, 3))
  np.add.at(counts, tuple(trigrams.T), 1)
  joint = counts / counts.sum()
  conditional = joint / joint.sum(-1, keepdims=True)
  assert abs(-(joint * np.log(conditional)).sum() - language.entropy_rate) < 0.01
  np.testing.assert_allclose(joint.sum(-1), markov.stationary(language.table()), atol=0.01)
  # Stationary: the first symbols are distributed as the later ones.
  np.testing.assert_allclose(np.bincount(ids[:, 0], minlength=3) / 3000, joint.sum((1, 2)), atol=0.04)


def test_by_hand():
  # A fair coin has ln 2; a chain that repeats with 3/4 has H(1/4).
  assert markov.conditional_entropies(np.array([0.5, 0.5])) == pytest.approx([math.log(2)])
  table = np.array([[0.75, 0.25], [0.25, 0.75]])
  quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
  assert markov.conditional_entropies(table) == pytest.approx([math.log(2), quarter])
  # P(a) = 2/3 where a stays with 0.9 and b leaves with 0.2: balance 0.1 * 2/3 = 0.2 * 1/3.
  np.testing.assert_allclose(markov.stationary(np.array([[0.9, 0.1], [0.2, 0.8]])), [2 / 3, 1 / 3])


@pytest.mark.parametrize('order', [0, 1, 3])
def test_entropy_falls_with_what_is_known(order):
  entropies = markov.conditional_entropies(Markov(alphabet=4, order=order).table())
  assert len(entropies) == order + 1
  assert all(high >= low - 1e-12 for high, low in itertools.pairwise(entropies))


def test_the_mixture_with_a_domain_symbol_is_what_a_perfect_model_pays():
  # Short documents, so that the first symbols weigh.
  mixture = MarkovMixture(dataclasses.replace(SMALL, order=1, train_documents=8000, document_length=4), domains=3)
  ids = symbols(mixture)
  domain_N = ids[:, 0] - mixture.language.alphabet
  assert set(domain_N) == {0, 1, 2} and (ids[:, 1:] < mixture.language.alphabet).all()
  # The chain begins after the domain symbol, so its first symbol is paid for as well.
  pay = ideal_nats(mixture.tables(), ids[:, 1:], domain_N) * (ids.shape[1] - 2)
  first = np.array([markov.stationary(table) for table in mixture.tables()])
  pay = (pay - np.log(first[domain_N, ids[:, 1]])) / (ids.shape[1] - 1)
  assert abs(pay.mean() - mixture.entropy_nats_per_token) < 4 * pay.std() / math.sqrt(len(pay))


def test_without_a_domain_symbol_the_entropy_is_a_bound_that_bayes_nearly_attains():
  language = dataclasses.replace(SMALL, order=1, train_documents=2000)
  mixture = MarkovMixture(language, domains=4, domain_symbol=False)
  ids = symbols(mixture)
  length = ids.shape[1]
  every = np.stack([ideal_nats([t], ids, np.zeros(len(ids), int)) for t in mixture.tables()]) * (length - 1)
  first = np.array([markov.stationary(table) for table in mixture.tables()])[:, ids[:, 0]]
  # The Bayes mixture of the domains, given the first symbol.
  bayes = -np.log((first * np.exp(-every)).sum(0) / first.sum(0)) / (length - 1)
  error = bayes.std() / math.sqrt(len(bayes))
  assert mixture.entropy_nats_per_token - 4 * error < bayes.mean()
  assert bayes.mean() < mixture.entropy_nats_per_token + math.log(4) / (length - 1) + 4 * error


def test_one_domain_without_a_symbol_is_the_language_itself():
  mixture = MarkovMixture(SMALL, domains=1, domain_symbol=False)
  assert mixture.entropy_rate == SMALL.entropy_rate
  assert mixture.entropy_nats_per_token == SMALL.entropy_nats_per_token
  assert mixture.symbols == SMALL.symbols


def test_the_seed_is_everything():
  assert SMALL.read().hash == SMALL.read().hash
  assert SMALL.read().hash != dataclasses.replace(SMALL, seed=1).read().hash
  text = SMALL.read()
  assert len(text.train) == 400 and len(text.heldout) == 100
  assert all(len(d.content) == 64 for d in text.train)


def test_rows_hold_whole_documents_when_lengths_agree():
  opened = Corpus(MarkovMixture(SMALL)).open(seed=0)
  batch = opened.batches(batch_size=4, sequence_length=64)[0]
  assert opened.tokenizer.vocab_size == SMALL.alphabet + 4 == Corpus(MarkovMixture(SMALL)).vocab_size
  assert (batch['inputs_BT'][:, 0] >= SMALL.alphabet).all()
  assert (batch['weights_BT'] == (np.arange(64) < 63)).all()
  assert opened.entropy_nats_per_token == MarkovMixture(SMALL).entropy_nats_per_token
  assert opened.tokenizer.eod is None


def test_bad_settings_are_named():
  every = {'alphabet': 1, 'order': -1, 'concentration': 0, 'document_length': 1, 'train_documents': 0,
           'heldout_documents': 0, 'seed': -1}
  for field, bad in every.items():
    source = dataclasses.replace(SMALL, **{field: bad})
    assert [(found, value) for found, value, _ in source.check()] == [(field, bad)]
    assert [found for found, _, _ in MarkovMixture(source).check()] == [f'language.{field}']
  assert [field for field, _, _ in Markov(alphabet=37).check()] == ['alphabet']
  assert [field for field, _, _ in Markov(alphabet=36, order=9).check()] == ['order']
  assert [field for field, _, _ in MarkovMixture(domains=27).check()] == ['domains']
  assert not list(MarkovMixture().check()) and not list(Markov().check())
