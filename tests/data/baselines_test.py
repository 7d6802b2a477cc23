import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_lm.data import Corpus, Markov, StandardLibrary, TextFiles
from efficient_lm.data.baselines import ContextModel, baselines, xz
from efficient_lm.data.corpus import Asked
from efficient_lm.data.tokenizers import from_json


def whole(*contents):
  return [Asked(content, 0, True) for content in contents]


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
  assert model.bits_per_byte(whole(b'abcd' * 50)) < 0.2 < 5 < model.bits_per_byte(whole(b'zyxw' * 50))


def test_more_context_helps_on_text():
  text = StandardLibrary(max_bytes=2_000_000).read()
  train, heldout = ([document.content for document in side] for side in (text.train, text.heldout))
  bits = [ContextModel(train, order).bits_per_byte(whole(*heldout)) for order in range(4)]
  assert bits == sorted(bits, reverse=True)
  assert 1.5 < bits[3] < 3 < bits[0] < 6


def test_on_a_markov_language_it_finds_the_entropy():
  language = Markov(alphabet=4, order=2, train_documents=2000, heldout_documents=200)
  bits = baselines(Corpus(language).open(seed=0))['order3'] * np.log(2)
  assert language.entropy_nats_per_token - 0.02 < bits < language.entropy_nats_per_token + 0.03


def test_what_is_never_asked_is_never_expected():
  """Where no document ends, an end takes no probability from what may come."""
  documents = [b'ab'] * 100
  ended, unended = (ContextModel(documents, ends=ends).probability(np.array([packed(256, *b'ab', 256)])) for ends in (1, 0))
  assert ended > 0.9 and unended < 0.01


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=5), st.data())
def test_bits_are_those_of_what_is_asked(contents, data):
  """Asked symbol by symbol: a byte that is given and an end that is not asked cost nothing."""
  model = ContextModel([b'abcab', b'xyz'])
  asked = [Asked(c, data.draw(st.integers(0, len(c))), data.draw(st.booleans())) for c in contents]
  bits = 0
  for content, given, is_ended in asked:
    symbols = [256] * 3 + [*content] + [256]
    for index in range(given, len(content) + is_ended):
      bits -= np.log2(model.probability(np.array([packed(*symbols[index:index + 4])]))[0])
  num_bytes = sum(len(content) - given for content, given, _ in asked)
  # Sums of the same numbers in another order.
  assert model.bits_per_byte(asked) == pytest.approx(bits / max(num_bytes, 1), rel=1e-12)


def test_xz():
  assert xz(whole(b'a' * 10000)) < 0.2
  noise = np.random.default_rng(0).bytes(10000)
  assert 8 <= xz(whole(noise)) < 8.2
  unended = lambda *contents: [Asked(content, 0, False) for content in contents]
  assert xz(unended(noise[:5000], noise[5000:])) == xz(unended(noise))
  # Where documents end is asked too, and costs something.
  assert xz(whole(noise[:5000], noise[5000:])) > xz(unended(noise))


def test_they_are_measured_once_and_on_what_is_evaluated(monkeypatch):
  language = Markov(train_documents=50, heldout_documents=9)
  first = baselines(Corpus(language, eval_tokens=256).open(seed=0))
  assert first != baselines(Corpus(language, eval_tokens=512).open(seed=0))
  monkeypatch.setattr('efficient_lm.data.baselines.ContextModel', None)
  assert baselines(Corpus(language, eval_tokens=256).open(seed=9)) == first


def test_another_mark_is_another_question(tmp_path):
  for number in range(40): (tmp_path / f'{number}.txt').write_text(f'document {number}')
  corpus = Corpus(TextFiles(str(tmp_path / '*.txt')))
  assert baselines(corpus.open(seed=0)) != baselines(corpus.open(seed=0, tokenizer=from_json('{"kind": "bytes"}')))
