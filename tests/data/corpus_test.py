import dataclasses
import time

import numpy as np
import pytest

from efficient_lm import data
from efficient_lm.data import BPE, ByteTokenizer, Corpus, Markov, StandardLibrary, TextFiles
from efficient_lm.errors import ConfigError


@pytest.fixture(name='folder')
def _folder(tmp_path):
  for number in range(40): (tmp_path / f'{number}.txt').write_text(f'document {number} with some text\n' * 5)
  return tmp_path


def open_(corpus, **changes):
  return corpus.open(**{'sequence_length': 16, 'batch_size': 4, 'seed': 0} | changes)


@pytest.mark.parametrize('tokenizer', [None, ByteTokenizer(), BPE(300)])
def test_the_evaluation_counts_its_text_and_only_once(folder, tokenizer):
  if isinstance(tokenizer, BPE): pytest.importorskip('tokenizers')
  corpus = open_(Corpus(TextFiles(str(folder / '*.txt')), tokenizer, eval_batches=1000))
  first, again = list(corpus.eval_batches()), list(corpus.eval_batches())
  for left, right in zip(first, again, strict=True):
    for name in left: np.testing.assert_array_equal(left[name], right[name])
  assert corpus.eval_bytes == sum(int(batch['bytes_BT'].sum()) for batch in first)
  assert corpus.eval_documents() == [document.content for document in corpus.text.heldout]
  skipped = sum(corpus.tokenizer.bytes_V[corpus.tokenizer.encode(d)[0]] for d in corpus.eval_documents())
  assert corpus.eval_bytes == sum(map(len, corpus.eval_documents())) - skipped
  # Another batch size, the same text.
  other = open_(corpus.config, batch_size=7)
  assert other.eval_bytes == corpus.eval_bytes and other.eval_documents() == corpus.eval_documents()


def test_a_limited_evaluation_reads_the_beginning(folder):
  corpus = open_(Corpus(TextFiles(str(folder / '*.txt')), eval_batches=1), batch_size=2)
  read = b''.join(corpus.eval_documents())
  assert b''.join(d.content for d in corpus.text.heldout).startswith(read) and len(read) == 2 * 16 + 1
  assert corpus.eval_bytes == 32 and len(list(corpus.eval_batches())) == 1


def test_batches_do_not_depend_on_the_cache(folder, tmp_path, monkeypatch):
  corpus = Corpus(TextFiles(str(folder / '*.txt')))
  first = open_(corpus).train[3]
  monkeypatch.setenv('EFFICIENT_LM_CACHE', str(tmp_path / 'other'))
  for _ in range(2):  # built, then loaded
    opened = open_(corpus)
    for name, array in opened.train[3].items(): np.testing.assert_array_equal(array, first[name])
  for name, array in next(opened.iterate(3)).items(): np.testing.assert_array_equal(array, first[name])


def test_other_text_is_another_corpus(folder):
  corpus = Corpus(TextFiles(str(folder / '*.txt')))
  before = open_(corpus).hash
  (folder / '7.txt').write_text('changed')
  after = open_(corpus)
  assert after.hash != before
  described = after.describe()
  assert described['hash'] == after.hash and described['name'] == 'TextFiles'
  assert described['train_files'] + described['heldout_files'] == 40
  assert described['train_tokens'] == described['train_bytes'] + described['train_files']
  assert after.entropy_nats_per_token is None


def test_complaints_carry_their_path():
  fields = lambda corpus: [field for field, _, _ in corpus.check()]
  assert not fields(Corpus()) and not fields(Corpus(Markov()))
  assert fields(Corpus(eval_batches=0)) == ['eval_batches']
  assert fields(Corpus(StandardLibrary(max_bytes=0))) == ['source.max_bytes']
  assert fields(Corpus(tokenizer=BPE(3))) == ['tokenizer.vocab_size']
  assert fields(Corpus(Markov(), ByteTokenizer())) == ['tokenizer']
  assert fields(Corpus(data.MarkovMixture(Markov(order=-1)))) == ['source.language.order']
  with pytest.raises(ConfigError) as error: open_(Corpus(TextFiles(('no.txt',))))
  assert str(error.value) == "data.source.train = 'no.txt': no such file"


@pytest.mark.parametrize(
    'change', [{'sequence_length': 0}, {'batch_size': 0}, {'seed': -1}, {'process_count': 3}])
def test_bad_arguments_are_named(folder, change):
  with pytest.raises(ConfigError): open_(Corpus(TextFiles(str(folder / '*.txt'))), **change)


def test_an_empty_file_changes_nothing(tmp_path):
  (tmp_path / 'a.txt').write_text('line\n' * 100)
  (tmp_path / 'b.txt').write_text('')
  assert open_(Corpus(TextFiles(str(tmp_path / '*.txt')))).describe()['train_bytes'] > 400


def test_an_empty_corpus_is_an_error(tmp_path):
  (tmp_path / 'empty.txt').write_text('')
  with pytest.raises(ConfigError, match='no training text'):
    open_(Corpus(TextFiles(str(tmp_path / 'empty.txt'))))


def test_everything_a_config_names_is_plain():
  for kind in (Corpus, StandardLibrary, data.PythonPackages, TextFiles, data.HuggingFaceDataset, Markov,
               data.MarkovMixture, BPE, ByteTokenizer):
    fields = dataclasses.fields(kind)
    assert len(fields) <= 8
    assert kind() == kind()
    assert dataclasses.asdict(kind()).keys() == {field.name for field in fields}


def test_the_default_corpus_is_ready_in_seconds(tmp_path, monkeypatch):
  monkeypatch.setenv('EFFICIENT_LM_CACHE', str(tmp_path))
  took = []
  for _ in range(2):
    start = time.perf_counter()
    corpus = open_(Corpus(), sequence_length=256)
    took.append(time.perf_counter() - start)
  assert took[0] < 10 and took[1] < 2, took  # a tenth of that on an idle machine
  assert corpus.describe()['train_bytes'] > 1_000_000
