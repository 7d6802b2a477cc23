import json
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_lm.data import BPE, ByteTokenizer, SymbolTokenizer
from efficient_lm.data.tokenizers import from_json
from efficient_lm.errors import ConfigError

CORPUS = [b'def the_function(argument):\n  return the_function(argument)\n' * 3, 'déjà vu, 漢字\n'.encode() * 5,
          b'<|endoftext|> \xff\xfe broken \x80 bytes']


@pytest.fixture(scope='module', name='bpe')
def _bpe():
  pytest.importorskip('tokenizers')
  return BPE(320).fit(CORPUS, 'some corpus')


@pytest.fixture(params=['bytes', 'bpe'], name='tokenizer')
def _tokenizer(request):
  return ByteTokenizer() if request.param == 'bytes' else request.getfixturevalue('bpe')


@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(content=st.one_of(st.binary(), st.text().map(str.encode), st.sampled_from(CORPUS)))
def test_every_document_survives_the_round_trip(tokenizer, content):
  ids = tokenizer.encode(content)
  assert ids.dtype == np.int32
  assert tokenizer.decode_bytes(ids) == content
  assert tokenizer.decode(ids) == content.decode('utf-8', 'replace')
  assert tokenizer.bytes_V[ids].sum() == len(content)
  assert (ids >= 0).all() and (ids < tokenizer.vocab_size).all() and not (ids == tokenizer.eod).any()


def test_documents_at_once_are_documents_one_by_one(tokenizer):
  for document, ids in zip(CORPUS, tokenizer.encode_all(CORPUS), strict=True):
    np.testing.assert_array_equal(ids, tokenizer.encode(document))
  np.testing.assert_array_equal(tokenizer.encode('é'), tokenizer.encode('é'.encode()))


def test_the_end_of_a_document_is_the_last_id_and_stands_for_no_text(tokenizer):
  assert tokenizer.eod == tokenizer.vocab_size - 1
  assert tokenizer.bytes_V.shape == (tokenizer.vocab_size,) and tokenizer.bytes_V.dtype == np.int32
  assert tokenizer.bytes_V[tokenizer.eod] == 0
  assert tokenizer.decode([tokenizer.eod]) == ''


def test_saved_and_made_again(tokenizer):
  again = from_json(tokenizer.to_json())
  assert again.key == tokenizer.key and again.vocab_size == tokenizer.vocab_size
  for document in CORPUS: np.testing.assert_array_equal(again.encode(document), tokenizer.encode(document))


@pytest.mark.parametrize(
    'bad', ['', '[]', '{}', '{"kind": "other"}', '{"kind": "bpe", "vocab_size": 9, "model": {}}'])
def test_what_is_no_tokenizer_is_refused_in_one_line(bad):
  with pytest.raises(ConfigError) as error: from_json(bad)
  assert '\n' not in str(error.value)


def test_bytes_are_themselves():
  assert ByteTokenizer().encode('aé').tolist() == [97, 195, 169]
  assert ByteTokenizer().decode([97, 195]) == 'a\N{REPLACEMENT CHARACTER}'


def test_symbols_are_numbered_in_order():
  tokenizer = SymbolTokenizer('abX')
  assert tokenizer.encode('Xab').tolist() == [2, 0, 1] and tokenizer.decode([2, 0, 1]) == 'Xab'
  assert tokenizer.vocab_size == 3 and tokenizer.eod is None and tokenizer.bytes_V.tolist() == [1, 1, 1]
  assert from_json(tokenizer.to_json()) == tokenizer
  with pytest.raises(ValueError, match="b'c'"): tokenizer.encode('abc')
  for bad in ('', 'a', 'aa', 'aé'): assert list(SymbolTokenizer(bad).check())


def test_merges_shorten_what_was_learned(bpe):
  assert len(bpe.encode(CORPUS[0])) < len(CORPUS[0]) / 3
  assert all(index < bpe.eod for index in bpe.encode(CORPUS[0]))


def test_learning_is_deterministic_across_processes(bpe, tmp_path):
  code = ('from efficient_lm.data import BPE; from tests_corpus import CORPUS; import sys;'
          'sys.stdout.write(BPE(320).fit(CORPUS, "x").to_json())')
  (tmp_path / 'tests_corpus.py').write_text(f'CORPUS = {CORPUS!r}')
  for home in 'ab':
    environment = {'EFFICIENT_LM_CACHE': str(tmp_path / home), 'PYTHONHASHSEED': str(ord(home)),
                   'PYTHONPATH': ':'.join([str(tmp_path), *sys.path])}
    learned = subprocess.check_output([sys.executable, '-c', code], env=environment, text=True)
    assert learned == bpe.to_json()


def test_it_is_learned_once_for_a_corpus_and_its_settings(monkeypatch):
  pytest.importorskip('tokenizers')
  calls = []
  learn = BPE._learn
  monkeypatch.setattr(BPE, '_learn', lambda self, documents: calls.append(self) or learn(self, documents))
  for settings_, corpus in ((BPE(300), 'one'), (BPE(300), 'one'), (BPE(301), 'one'), (BPE(300), 'two')):
    settings_.fit(CORPUS, corpus)
  assert calls == [BPE(300), BPE(301), BPE(300)]


def test_a_small_vocabulary_is_refused_and_a_small_corpus_is_not():
  assert [(field, value) for field, value, _ in BPE(256).check()] == [('vocab_size', 256)]
  pytest.importorskip('tokenizers')
  for size in (257, 5000):
    tokenizer = BPE(size).fit([b'ab'], f'tiny {size}')
    assert tokenizer.vocab_size == size and tokenizer.decode_bytes(tokenizer.encode(b'\x00ab')) == b'\x00ab'
    assert json.loads(tokenizer.to_json())['vocab_size'] == size
