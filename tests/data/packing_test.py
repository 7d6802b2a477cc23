import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_lm.data import ByteTokenizer, SymbolTokenizer
from efficient_lm.data.packing import Rows, pack
from efficient_lm.data.tokenizers import from_json
from efficient_lm.errors import ConfigError


class TwoMarks(ByteTokenizer):
  """One mark begins a document and another ends it."""
  vocab_size = 258
  bytes_V = np.append(np.ones(256, np.int32), [0, 0])


class Unended(TwoMarks):
  """A mark begins a document and none ends it."""
  eod = None


STORED = from_json('{"kind": "bytes"}')  # as it was written before documents began with a mark
TOKENIZERS = {'one mark': ByteTokenizer(), 'two marks': TwoMarks(257), 'begins': Unended(257), 'ends': STORED,
              'no marks': SymbolTokenizer(''.join(map(chr, range(128))))}
every_tokenizer = pytest.mark.parametrize('tokenizer', TOKENIZERS.values(), ids=TOKENIZERS)
document = st.text(st.characters(max_codepoint=127), min_size=1, max_size=30).map(str.encode)
corpora = st.lists(document, min_size=1, max_size=12)
lengths = st.integers(1, 20)


def rows_of(documents, length, tokenizer):
  return Rows(pack(tokenizer, documents), length)


def by_definition(documents, tokenizer):
  """The stream as a list of (token, document that it belongs to as an input, document that it is asked of)."""
  shared = tokenizer.bos is not None and tokenizer.bos == tokenizer.eod
  stream = []
  for number, document in enumerate(documents):
    if tokenizer.bos is not None: stream.append((tokenizer.bos, number, number - 1 if shared else number))
    stream += [(token, number, number) for token in document]
    if tokenizer.eod is not None and not shared: stream.append((tokenizer.eod, number, number))
  if shared: stream.append((tokenizer.eod, None, len(documents) - 1))  # begins none
  return stream


@every_tokenizer
@hypothesis.given(documents=corpora, length=lengths)
def test_rows_are_the_stream_cut_into_pieces(tokenizer, documents, length):
  stream = by_definition(documents, tokenizer)
  rows = rows_of(documents, length, tokenizer)
  assert rows.stream.tokens.tolist() == [token for token, _, _ in stream]
  # No row is without a target; with one token there is none at all.
  assert len(rows) == len(range(0, len(stream) - 1, length))
  batch = rows[range(len(rows))]
  for row in range(len(rows)):
    owners = [owner for _, owner, _ in stream[row * length:row * length + length]]
    for column in range(length):
      at = {name: array[row, column] for name, array in batch.items()}
      index = row * length + column
      if index >= len(stream) or stream[index][1] is None:
        assert not any(at.values())
        continue
      token, owner, _ = stream[index]
      assert at['inputs_BT'] == token
      assert at['segments_BT'] == owner - owners[0] + 1
      assert at['positions_BT'] == column - owners.index(owner)
      target, _, asked_of = stream[index + 1] if index + 1 < len(stream) else (0, None, None)
      counts = owner == asked_of
      assert at['targets_BT'] == target and at['weights_BT'] == counts
      assert at['bytes_BT'] == (tokenizer.bytes_V[target] if counts else 0)


@every_tokenizer
@hypothesis.given(documents=corpora, length=lengths)
def test_every_token_and_every_end_is_asked_once(tokenizer, documents, length):
  rows = rows_of(documents, length, tokenizer)
  batch = rows[range(len(rows))]
  end = [] if tokenizer.eod is None else [tokenizer.eod]
  first = 0 if tokenizer.bos is not None else 1  # nothing stands before the first token of a document without a bos
  asked = batch['targets_BT'][batch['weights_BT'] > 0].tolist()
  assert asked == [token for document in documents for token in [*document, *end][first:]]
  assert len(asked) == rows.stream.num_targets
  assert batch['bytes_BT'].sum() == sum(len(document) - first for document in documents)


@every_tokenizer
@hypothesis.given(documents=corpora, length=lengths)
def test_what_follows_is_asked_of_the_same_document(tokenizer, documents, length):
  """Of two neighbours in a row and in a document, the second is what the first is asked."""
  rows = rows_of(documents, length, tokenizer)
  batch = rows[range(len(rows))]
  same = (batch['segments_BT'][:, 1:] == batch['segments_BT'][:, :-1]) & (batch['segments_BT'][:, 1:] > 0)
  assert (batch['targets_BT'][:, :-1][same] == batch['inputs_BT'][:, 1:][same]).all()
  assert (batch['weights_BT'][:, :-1][same] == 1).all()


@hypothesis.given(corpora, lengths)
def test_with_one_mark_documents_begin_with_it_at_position_0(documents, length):
  rows = rows_of(documents, length, ByteTokenizer())
  batch = rows[range(len(rows))]
  marks = batch['inputs_BT'] == 256
  assert marks.sum() == len(documents) and (batch['positions_BT'][marks] == 0).all()
  assert batch['targets_BT'][marks].tolist() == [document[0] for document in documents]
  assert (batch['weights_BT'][marks] == 1).all()


@every_tokenizer
@hypothesis.given(documents=corpora, length=lengths, other=lengths, count=st.integers(1, 40))
def test_the_beginning_of_a_stream_asks_for_the_first_tokens_only(tokenizer, documents, length, other, count):
  stream = pack(tokenizer, documents)
  asked = []
  for size in (length, other, len(stream.tokens)):
    rows = Rows(stream.first(count), size)
    batch = rows[range(len(rows))]
    asked.append(batch['targets_BT'][batch['weights_BT'] > 0].tolist())
  whole = Rows(stream, len(stream.tokens))[[0]]
  first = {name: array[0, :count] for name, array in whole.items()}
  assert asked == [first['targets_BT'][first['weights_BT'] > 0].tolist()] * 3


@hypothesis.given(corpora, lengths, st.data())
def test_a_row_is_the_same_in_any_company(documents, length, data):
  rows = rows_of(documents, length, ByteTokenizer())
  chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
  for place, row in enumerate(chosen):
    for name, array in rows[chosen].items(): np.testing.assert_array_equal(array[place], rows[[row]][name][0])


A, B, C, D, E = b'abcde'


def test_shapes_types_and_padding():
  rows = rows_of([b'ab', b'cde'], 4, ByteTokenizer())
  batch = rows[[0, 1, 2, 99]]
  assert len(rows) == 2
  assert {name: array.dtype for name, array in batch.items()} == {
      'inputs_BT': np.int32, 'targets_BT': np.int32, 'segments_BT': np.int32, 'positions_BT': np.int32,
      'weights_BT': np.float32, 'bytes_BT': np.int32}
  assert all(array.shape == (4, 4) for array in batch.values())
  assert all(not array[2:].any() for array in batch.values())
  assert batch['inputs_BT'][:2].tolist() == [[256, A, B, 256], [C, D, E, 0]]
  assert batch['targets_BT'][:2].tolist() == [[A, B, 256, C], [D, E, 256, 0]]
  assert batch['segments_BT'][:2].tolist() == [[1, 1, 1, 2], [1, 1, 1, 0]]
  assert batch['positions_BT'][:2].tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
  assert batch['weights_BT'][:2].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
  assert batch['bytes_BT'][:2].tolist() == [[1, 1, 0, 1], [1, 1, 0, 0]]


def test_a_tokenizer_stored_without_a_bos_packs_as_it_did():
  batch = rows_of([b'ab', b'cde'], 4, STORED)[[0, 1]]
  assert batch['inputs_BT'].tolist() == [[A, B, 256, C], [D, E, 256, 0]]
  assert batch['targets_BT'].tolist() == [[B, 256, C, D], [E, 256, 0, 0]]
  assert batch['segments_BT'].tolist() == [[1, 1, 1, 2], [1, 1, 1, 0]]
  assert batch['positions_BT'].tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
  assert batch['weights_BT'].tolist() == [[1, 1, 0, 1], [1, 1, 0, 0]]
  assert batch['bytes_BT'].tolist() == [[1, 0, 0, 1], [1, 0, 0, 0]]


def test_two_marks_stand_side_by_side_and_the_second_is_not_asked():
  batch = rows_of([b'a', b'b'], 6, TOKENIZERS['two marks'])[[0]]
  assert batch['inputs_BT'].tolist() == [[257, A, 256, 257, B, 256]]
  assert batch['segments_BT'].tolist() == [[1, 1, 1, 2, 2, 2]]
  assert batch['weights_BT'].tolist() == [[1, 1, 0, 1, 1, 0]]


def test_without_an_end_mark_documents_are_still_apart():
  batch = rows_of([b'ab', b'ba'], 3, SymbolTokenizer('ab'))[[0]]
  assert batch['inputs_BT'].tolist() == [[0, 1, 1]] and batch['segments_BT'].tolist() == [[1, 1, 2]]
  assert batch['weights_BT'].tolist() == [[1, 0, 1]]


@pytest.mark.parametrize('size', [2, 256, 257, 65_536, 65_537])
def test_no_id_is_too_large_for_the_stream(size):
  class Last(SymbolTokenizer):
    vocab_size, bos, eod = size, 0, size - 1
    bytes_V = np.zeros(size, np.int32)
    def encode(self, text): return np.full(len(text), size - 1, np.int32)
  assert pack(Last(), [b'x']).tokens.tolist() == [0, size - 1, size - 1]


def test_a_row_without_room_is_refused():
  with pytest.raises(ConfigError, match=r'train\.sequence_length = 0'): rows_of([b'ab'], 0, ByteTokenizer())


@every_tokenizer
@hypothesis.given(documents=corpora, length=lengths, data=st.data())
def test_sliding_rows_ask_every_target_once_and_from_as_much_as_they_promise(tokenizer, documents, length, data):
  stride = data.draw(st.integers(1, length))
  stream = pack(tokenizer, documents)
  rows, whole = Rows(stream, length, stride), Rows(stream, len(stream.tokens))[[0]]
  batch, asked = rows[range(len(rows))], []
  for row, column in zip(*np.nonzero(batch['weights_BT'])):
    at = row * stride + column   # in the stream, of the input
    asked.append(at)
    assert batch['targets_BT'][row, column] == stream.tokens[at + 1]
    assert batch['bytes_BT'][row, column] == whole['bytes_BT'][0, at]
    context, least = batch['positions_BT'][row, column] + 1, 1 if row == 0 else length - stride + 1
    assert context >= min(least, whole['positions_BT'][0, at] + 1)
  assert asked == np.flatnonzero(whole['weights_BT'][0]).tolist()
  assert batch['bytes_BT'].sum() == whole['bytes_BT'].sum()


@hypothesis.given(documents=corpora, length=lengths)
def test_rows_a_whole_row_apart_are_rows_side_by_side(documents, length):
  stream = pack(ByteTokenizer(), documents)
  plain, sliding = Rows(stream, length), Rows(stream, length, length)
  assert len(plain) == len(sliding)
  for name, array in plain[range(len(plain))].items(): np.testing.assert_array_equal(array, sliding[range(len(plain))][name])


@pytest.mark.parametrize('stride', [0, -1, 5])
def test_a_stride_that_would_leave_targets_out_is_refused(stride):
  with pytest.raises(ConfigError, match='stride'): Rows(pack(ByteTokenizer(), [b'text']), 4, stride)
