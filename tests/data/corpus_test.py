import dataclasses
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_lm import data
from efficient_lm.data import BPE, ByteTokenizer, Corpus, Markov, StandardLibrary, SymbolTokenizer, TextFiles
from efficient_lm.data.tokenizers import from_json
from efficient_lm.errors import ConfigError


@pytest.fixture(name='folder')
def _folder(tmp_path):
  for number in range(40): (tmp_path / f'{number}.txt').write_text(f'document {number} with some text\n' * 5)
  return tmp_path


def corpus_of(folder, *args, **options):
  return Corpus(TextFiles(str(folder / '*.txt')), *args, **options)


def asked(batches):
  """(target, bytes) of every target that counts, in order."""
  return [pair for batch in batches for pair in zip(batch['targets_BT'][batch['weights_BT'] > 0].tolist(),
                                                    batch['bytes_BT'][batch['weights_BT'] > 0].tolist())]


@pytest.mark.parametrize('tokenizer', [None, ByteTokenizer(None), BPE(300)])
def test_the_evaluation_counts_its_text_and_only_once(folder, tokenizer):
  if isinstance(tokenizer, BPE): pytest.importorskip('tokenizers')
  corpus = corpus_of(folder, tokenizer, eval_tokens=10**6).open(seed=0)
  first, again = (list(corpus.eval_batches(rows=4, sequence_length=16)) for _ in range(2))
  for left, right in zip(first, again, strict=True):
    for name in left: np.testing.assert_array_equal(left[name], right[name])
  documents = corpus.eval_documents()
  assert [document.content for document in documents] == [document.content for document in corpus.text.heldout]
  assert all(document.is_ended for document in documents)
  begins = corpus.tokenizer.bos is None  # and so its first token is not predicted
  assert [document.given for document in documents] == [int(begins)] * len(documents)
  assert corpus.eval_bytes == sum(int(batch['bytes_BT'].sum()) for batch in first)
  assert corpus.eval_bytes == sum(len(document.content) - begins for document in documents)
  assert len(asked(first)) == sum(len(corpus.tokenizer.encode(d.content)) + 1 - begins for d in documents)


TOKENIZERS = [ByteTokenizer(), ByteTokenizer(None), SymbolTokenizer('ab')]
texts = st.lists(st.text('ab', min_size=1, max_size=9), min_size=2, max_size=8, unique=True)


class Given:
  """A source of these texts, all held out but one."""
  def __init__(self, contents): self.documents = tuple(data.files.Document(c, c.encode()) for c in contents)
  def check(self): return ()
  def read(self): return data.files.Text((data.files.Document('train', b'abab'),), self.documents)


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(texts=texts, tokenizer=st.sampled_from(TOKENIZERS), limit=st.integers(1, 60), rows=st.integers(1, 9),
                  length=st.integers(1, 20), processes=st.integers(1, 3))
def test_what_an_evaluation_asks_does_not_depend_on_the_shape_of_its_batches(
    texts, tokenizer, limit, rows, length, processes):
  hypothesis.assume(tokenizer.eod is not None or any(len(text) > 1 for text in texts))  # something is predicted
  source = Given(texts)
  opened = Corpus(source, tokenizer, eval_tokens=limit).open(seed=0)
  one_row = asked(opened.eval_batches(rows=1, sequence_length=limit))
  batches = list(opened.eval_batches(rows=rows, sequence_length=length))
  assert asked(batches) == one_row and len(one_row) <= limit
  assert all(batch['inputs_BT'].shape == (rows, length) for batch in batches)
  assert sum(int(batch['segments_BT'].any(1).sum()) for batch in batches) == opened.eval_rows(length)
  # The beginning of the held-out text, marks included where there are some.
  everything = asked(Corpus(source, tokenizer, eval_tokens=10**6).open(seed=0).eval_batches(rows=1, sequence_length=10**3))
  assert everything[:len(one_row)] == one_row
  assert tokenizer.bos is None or len(one_row) == min(limit, len(everything))
  # What is asked, document by document, is what the batches ask.
  documents = opened.eval_documents()
  assert opened.eval_bytes == sum(num_bytes for _, num_bytes in one_row)
  assert sum(d.is_ended for d in documents) == sum(num_bytes == 0 for _, num_bytes in one_row)
  # Several processes read the same rows, each its part of them.
  parts = [list(Corpus(source, tokenizer, eval_tokens=limit).open(seed=0, process_index=index, process_count=processes)
                .eval_batches(rows=rows * processes, sequence_length=length)) for index in range(processes)]
  whole = list(opened.eval_batches(rows=rows * processes, sequence_length=length))
  for step, batch in enumerate(whole):
    for name in batch: np.testing.assert_array_equal(np.concatenate([part[step][name] for part in parts]), batch[name])


def test_a_limited_evaluation_reads_the_beginning(folder):
  corpus = corpus_of(folder, eval_tokens=33).open(seed=0)
  read = b''.join(document.content for document in corpus.eval_documents())
  assert b''.join(d.content for d in corpus.text.heldout).startswith(read) and len(read) == 33
  assert corpus.eval_bytes == 33 and not corpus.eval_documents()[0].is_ended
  assert corpus.eval_rows(16) == 3 and len(list(corpus.eval_batches(rows=2, sequence_length=16))) == 2


def test_several_trainings_read_one_corpus_in_batches_of_their_own_shape(folder):
  corpus = corpus_of(folder).open(seed=3)
  for batch_size, length in ((4, 16), (2, 50)):
    batches = corpus.batches(batch_size=batch_size, sequence_length=length)
    assert batches[5]['inputs_BT'].shape == (batch_size, length)
    for name, array in next(batches.iterate(5)).items(): np.testing.assert_array_equal(array, batches[5][name])
    steps = -(-len(batches.rows) // batch_size)
    seen = {tuple(row) for step in range(steps) for row in batches[step]['inputs_BT'].tolist()}
    assert seen >= {tuple(row) for row in batches.rows[range(len(batches.rows))]['inputs_BT'].tolist()}


def test_batches_do_not_depend_on_the_cache(folder, tmp_path, monkeypatch):
  batch = lambda: corpus_of(folder).open(seed=0).batches(batch_size=4, sequence_length=16)[3]
  first = batch()
  monkeypatch.setenv('EFFICIENT_LM_CACHE', str(tmp_path / 'other'))
  for _ in range(2):  # built, then loaded
    for name, array in batch().items(): np.testing.assert_array_equal(array, first[name])


def test_a_tokenizer_that_is_given_is_used_as_it_is(folder, monkeypatch):
  """Such as that of a run whose folder got another file: the configured one, fitted anew, would have other ids."""
  pytest.importorskip('tokenizers')
  corpus = corpus_of(folder, BPE(300))
  before = corpus.open(seed=0)
  saved = before.tokenizer.to_json()
  (folder / 'new.txt').write_text('quite other words in one more file ' * 50)
  assert corpus.open(seed=0).tokenizer.key != before.tokenizer.key
  monkeypatch.setattr(BPE, '_learn', None)
  monkeypatch.setattr(BPE, 'fit', None)
  tokenizer = from_json(saved)
  again = corpus.open(seed=0, tokenizer=tokenizer)
  assert again.tokenizer is tokenizer and again.describe()['tokenizer_key'] == before.tokenizer.key
  for side in ('train', 'heldout'):
    contents = [document.content for document in getattr(again.text, side)]
    encoded = [index for ids in tokenizer.encode_all(contents) for index in [tokenizer.bos, *ids]]
    assert getattr(again, side).tokens.tolist() == [*encoded, tokenizer.eod]


def test_the_tokens_in_the_cache_are_those_of_the_tokenizer(folder):
  """Two that differ in nothing but their marks, or in the order of symbols, do not share tokens."""
  opened = [corpus_of(folder).open(seed=0, tokenizer=tokenizer) for tokenizer in (ByteTokenizer(), ByteTokenizer(None))]
  assert len(opened[0].train.tokens) == len(opened[1].train.tokens) + 1
  symbols = ''.join(sorted({chr(byte) for d in (*opened[0].text.train, *opened[0].text.heldout) for byte in d.content}))
  for each in (symbols, symbols[::-1]):
    corpus = corpus_of(folder).open(seed=0, tokenizer=SymbolTokenizer(each))
    assert corpus.tokenizer.decode_bytes(corpus.train.tokens) == b''.join(d.content for d in corpus.text.train)


def test_a_character_that_is_no_symbol_is_one_line(folder):
  with pytest.raises(ConfigError, match=r"data\.tokenizer = .*b'd' is not among 'xy'") as error:
    corpus_of(folder, SymbolTokenizer('xy')).open(seed=0)
  assert '\n' not in str(error.value)


def test_a_run_can_say_that_the_text_has_changed(folder):
  corpus = corpus_of(folder)
  before = corpus.open(seed=0).describe()
  assert before == corpus.open(seed=1).describe() == json.loads(json.dumps(before))
  assert before['name'] == 'TextFiles' and before['left_out'] == []
  assert before['train_files'] + before['heldout_files'] == 40
  assert before['train_tokens'] == before['train_bytes'] + before['train_files'] + 1
  size = before['train_bytes'] + before['heldout_bytes']
  (folder / '7.txt').write_text('changed')
  changed = corpus.open(seed=0).describe()
  assert changed['hash'] != before['hash'] and changed['train_bytes'] + changed['heldout_bytes'] < size
  (folder / 'more.txt').write_text('one more')
  more = corpus.open(seed=0).describe()
  assert more['hash'] not in (before['hash'], changed['hash']) and more['train_files'] + more['heldout_files'] == 41


def test_problems_carry_their_path():
  fields = lambda corpus: [field for field, _, _ in corpus.check()]
  assert not fields(Corpus()) and not fields(Corpus(Markov()))
  assert fields(Corpus(eval_tokens=0)) == ['eval_tokens']
  assert fields(Corpus(StandardLibrary(max_bytes=0))) == ['source.max_bytes']
  assert fields(Corpus(tokenizer=BPE(3))) == ['tokenizer.vocab_size']
  assert fields(Corpus(tokenizer=ByteTokenizer(3))) == ['tokenizer.bos']
  assert fields(Corpus(Markov(), ByteTokenizer())) == ['tokenizer']
  assert fields(Corpus(data.MarkovMixture(Markov(order=-1)))) == ['source.language.order']
  with pytest.raises(ConfigError) as error: Corpus(TextFiles(('no.txt',))).open(seed=0)
  assert str(error.value) == "data.source.train = 'no.txt': no such file"


def test_bad_arguments_are_named(folder):
  corpus = corpus_of(folder)
  with pytest.raises(ConfigError, match='seed = -1'): corpus.open(seed=-1)
  opened = corpus.open(seed=0, process_count=3)
  assert opened.entropy_nats_per_token is None
  for shape in ({'batch_size': 3, 'sequence_length': 0}, {'batch_size': 0, 'sequence_length': 1},
                {'batch_size': 4, 'sequence_length': 1}):
    with pytest.raises(ConfigError): opened.batches(**shape)
    shape['rows'] = shape.pop('batch_size')
    with pytest.raises(ConfigError): next(opened.eval_batches(**shape))


def test_an_empty_file_changes_nothing(tmp_path):
  (tmp_path / 'a.txt').write_text('line\n' * 100)
  (tmp_path / 'b.txt').write_text('')
  assert corpus_of(tmp_path).open(seed=0).describe()['train_bytes'] > 400


def test_an_empty_corpus_is_an_error(tmp_path):
  (tmp_path / 'empty.txt').write_text('')
  with pytest.raises(ConfigError, match='no training text'): corpus_of(tmp_path).open(seed=0)


def test_a_corpus_in_which_nothing_is_predicted_is_an_error():
  with pytest.raises(ConfigError, match='no held-out text'): Corpus(Given(['a', 'b']), SymbolTokenizer('ab')).open(seed=0)
  assert Corpus(Given(['a']), ByteTokenizer()).open(seed=0).eval_bytes == 1


def test_everything_a_config_names_is_plain():
  for kind in (Corpus, StandardLibrary, data.PythonPackages, TextFiles, data.HuggingFaceDataset, Markov,
               data.MarkovMixture, BPE, ByteTokenizer):
    fields = dataclasses.fields(kind)
    assert len(fields) <= 8
    assert kind() == kind()
    assert dataclasses.asdict(kind()).keys() == {field.name for field in fields}


def test_the_default_corpus_is_tokenized_once(tmp_path, monkeypatch):
  monkeypatch.setenv('EFFICIENT_LM_CACHE', str(tmp_path))
  corpus = Corpus(StandardLibrary(max_bytes=2_000_000))
  first = corpus.open(seed=0).describe()
  assert first['train_bytes'] > 1_000_000
  monkeypatch.setattr(ByteTokenizer, 'encode_all', None)
  assert corpus.open(seed=0).describe() == first
