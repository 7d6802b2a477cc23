import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_lm.data import Corpus, Markov, StandardLibrary
from efficient_lm.data.baselines import ContextModel, xz, yardsticks


def packed(*symbols):
  gram = 0
  for symbol in symbols: gram = gram << 9 | symbol
  return gram


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.binary(max_size=40), min_size=1, max_size=5), st.integers(0, 3),
                  st.lists(st.integers(0, 256), min_size=3, max_size=3))
def test_probabilities_are_positive_and_sum_to_one_in_every_context(documents, order, strange):
  model = ContextModel(documents, order)
  seen = [256, 256, 256, *documents[0]][:3]
  for context in (seen, [256] * 3, strange):
    grams = np.array([packed(*context[3 - order:], symbol) for symbol in range(257)], np.int64)
    probability = model.probability(grams)
    assert (probability > 0).all()
    assert probability.sum() == pytest.approx(1)


def test_what_was_seen_is_likely():
  model = ContextModel([b'abcd' * 50])
  assert model.probability(np.array([packed(*b'abcd')]))[0] > 0.95
  assert model.probability(np.array([packed(*b'abcz')]))[0] < 0.01
  assert model.bits_per_byte([b'abcd' * 50]) < 0.2 < 5 < model.bits_per_byte([b'zyxw' * 50])


def test_more_context_helps_on_text():
  text = StandardLibrary(max_bytes=2_000_000).read()
  train, heldout = ([document.content for document in side] for side in (text.train, text.heldout))
  bits = [ContextModel(train, order).bits_per_byte(heldout) for order in range(4)]
  assert bits == sorted(bits, reverse=True)
  assert 1.5 < bits[3] < 3 < bits[0] < 6


def test_on_a_markov_language_it_finds_the_entropy():
  language = Markov(alphabet=4, order=2, train_documents=2000, heldout_documents=200)
  corpus = Corpus(language).open(sequence_length=256, batch_size=8, seed=0)
  bits = yardsticks(corpus)['order3'] * np.log(2)
  assert language.entropy_nats_per_token - 0.02 < bits < language.entropy_nats_per_token + 0.03


def test_xz():
  assert xz([b'a' * 10000]) < 0.2
  noise = np.random.default_rng(0).bytes(10000)
  assert 8 <= xz([noise]) < 8.2
  assert xz([noise[:5000], noise[5000:]]) == xz([noise])


def test_they_are_measured_once_and_on_what_is_evaluated(monkeypatch):
  corpus = Corpus(Markov(train_documents=50, heldout_documents=9), eval_batches=1)
  first = yardsticks(corpus.open(sequence_length=64, batch_size=4, seed=0))
  other = yardsticks(corpus.open(sequence_length=64, batch_size=8, seed=0))
  assert first != other
  monkeypatch.setattr('efficient_lm.data.yardsticks.ContextModel', None)
  assert yardsticks(corpus.open(sequence_length=64, batch_size=4, seed=9)) == first
