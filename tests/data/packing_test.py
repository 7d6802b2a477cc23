import hypothesis
import numpy as np
from hypothesis import strategies as st

from efficient_lm.data import ByteTokenizer, SymbolTokenizer
from efficient_lm.data.packing import Rows, concatenate

corpora = st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=12)
lengths = st.integers(1, 20)


def pack(documents, length, tokenizer=ByteTokenizer()):
  tokens, starts = concatenate(tokenizer, documents)
  return Rows(tokens, starts, tokenizer.bytes_V, length)


@hypothesis.given(corpora)
def test_the_stream_is_the_documents_each_with_its_end(documents):
  tokens, starts = concatenate(ByteTokenizer(), documents)
  assert tokens.tolist() == [token for document in documents for token in [*document, 256]]
  assert starts.tolist() == np.cumsum([0] + [len(document) + 1 for document in documents])[:-1].tolist()


@hypothesis.given(corpora, lengths)
def test_no_token_is_lost_or_doubled(documents, length):
  rows = pack(documents, length)
  batch = rows[range(len(rows))]
  real = batch['segments_BT'] > 0
  inputs = batch['inputs_BT'][real].tolist()
  stream = rows.tokens.tolist()
  # The very last token is no input when it ends the last row exactly; as a target it is there in any case.
  assert inputs == stream[:len(inputs)] and len(inputs) >= len(stream) - 1
  assert (len(rows) - 1) * length + 1 < len(stream) <= len(rows) * length + 1  # no row without a target
  # Asked for are all tokens but the first of each document, once each and in order.
  asked = batch['targets_BT'][batch['weights_BT'] > 0].tolist()
  assert asked == [token for document in documents for token in [*document, 256][1:]]


@hypothesis.given(corpora, lengths)
def test_within_a_document_targets_are_the_next_inputs(documents, length):
  rows = pack(documents, length)
  batch = rows[range(len(rows))]
  same = batch['segments_BT'][:, 1:] == batch['segments_BT'][:, :-1]
  same &= batch['segments_BT'][:, 1:] > 0
  assert (batch['targets_BT'][:, :-1][same] == batch['inputs_BT'][:, 1:][same]).all()
  assert (batch['weights_BT'][:, :-1][same] == 1).all()
  # And across a boundary within the row nothing is asked: the input there is the end of its document.
  last = ~same & (batch['segments_BT'][:, 1:] > 0)
  assert (batch['inputs_BT'][:, :-1][last] == 256).all() and (batch['weights_BT'][:, :-1][last] == 0).all()


@hypothesis.given(corpora, lengths)
def test_segments_count_documents_and_positions_count_within_them(documents, length):
  rows = pack(documents, length)
  for segments, positions in zip(*(rows[range(len(rows))][name] for name in ('segments_BT', 'positions_BT'))):
    real = segments[segments > 0]
    assert real[0] == 1 and set(np.diff(real)) <= {0, 1} and (segments[len(real):] == 0).all()
    for segment in np.unique(real):
      part = positions[segments == segment]
      assert part.tolist() == list(range(len(part)))


@hypothesis.given(corpora, lengths)
def test_bytes_are_those_of_the_targets_that_count(documents, length):
  rows = pack(documents, length)
  batch = rows[range(len(rows))]
  assert batch['bytes_BT'].sum() == sum(len(document) - 1 for document in documents)
  expected = np.where(batch['weights_BT'] > 0, ByteTokenizer().bytes_V[batch['targets_BT']], 0)
  np.testing.assert_array_equal(batch['bytes_BT'], expected)


@hypothesis.given(corpora, lengths, st.data())
def test_a_row_is_the_same_in_any_company(documents, length, data):
  rows = pack(documents, length)
  chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
  for place, row in enumerate(chosen):
    for name, array in rows[chosen].items(): np.testing.assert_array_equal(array[place], rows[[row]][name][0])


def test_shapes_types_and_padding():
  rows = pack([b'ab', b'cde'], 4)
  batch = rows[[0, 1, 2, 99]]
  assert len(rows) == 2
  assert {name: array.dtype for name, array in batch.items()} == {
      'inputs_BT': np.int32, 'targets_BT': np.int32, 'segments_BT': np.int32, 'positions_BT': np.int32,
      'weights_BT': np.float32, 'bytes_BT': np.int32}
  assert all(array.shape == (4, 4) for array in batch.values())
  assert all(not array[2:].any() for array in batch.values())
  a, b, c, d, e = b'abcde'
  assert batch['inputs_BT'][:2].tolist() == [[a, b, 256, c], [d, e, 256, 0]]
  assert batch['targets_BT'][:2].tolist() == [[b, 256, c, d], [e, 256, 0, 0]]
  assert batch['segments_BT'][:2].tolist() == [[1, 1, 1, 2], [1, 1, 1, 0]]
  assert batch['positions_BT'][:2].tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
  assert batch['weights_BT'][:2].tolist() == [[1, 1, 0, 1], [1, 1, 0, 0]]
  assert batch['bytes_BT'][:2].tolist() == [[1, 0, 0, 1], [1, 0, 0, 0]]


def test_without_an_end_mark_documents_are_still_apart():
  batch = pack([b'ab', b'ba'], 3, SymbolTokenizer('ab'))[[0]]
  assert batch['inputs_BT'].tolist() == [[0, 1, 1]] and batch['segments_BT'].tolist() == [[1, 1, 2]]
  assert batch['weights_BT'].tolist() == [[1, 0, 1]]
