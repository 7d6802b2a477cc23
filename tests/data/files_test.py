import hashlib

import hypothesis
from hypothesis import strategies as st

from efficient_lm.data import files
from efficient_lm.data.files import Document

documents = st.dictionaries(st.text('abc/.é', min_size=1, max_size=6), st.binary(max_size=8), min_size=2,
                            max_size=40).map(lambda named: [Document(*item) for item in named.items()])


@hypothesis.given(documents, st.floats(0.01, 0.99))
def test_the_sides_share_no_name_and_no_content(corpus, fraction):
  text = files.divide(corpus, fraction)
  both = text.train + text.heldout
  assert len({d.name for d in both}) == len(both)
  assert len({d.content for d in both}) == len(both)
  if sum(bool(d.content) for d in corpus) > 1:  # a single one is cut in two
    assert {d.content for d in both} == {d.content for d in corpus} - {b''}


@hypothesis.given(documents, documents)
def test_adding_files_leaves_the_others_on_their_side(corpus, more):
  # Large enough that neither side is filled up by force.
  base = [Document(f'{number}', b'%d' % number) for number in range(40)]
  before = files.divide(base, 0.3)
  after = files.divide(base + [Document('new/' + d.name, b'new' + d.content) for d in corpus + more], 0.3)
  assert {d.name for d in before.heldout} <= {d.name for d in after.heldout}
  assert {d.name for d in before.train} <= {d.name for d in after.train}


@hypothesis.given(documents.filter(lambda corpus: len({d.content for d in corpus} - {b''}) == len(corpus)))
def test_neither_side_is_empty(corpus):
  for fraction in (0.001, 0.999):
    text = files.divide(corpus, fraction)
    assert text.train and text.heldout


@hypothesis.given(st.text(alphabet='aé\n漢', min_size=20), st.floats(0.05, 0.5))
def test_one_document_is_cut_into_two_that_read(content, fraction):
  text = files.divide([Document('book', content.encode())], fraction)
  train, heldout = (b''.join(d.content for d in side) for side in (text.train, text.heldout))
  if train != heldout and heldout: assert (train + heldout).decode() == content
  train.decode(), heldout.decode()


def test_of_a_content_on_both_sides_the_heldout_copy_stays():
  train = [Document('a', b'x'), Document('b', b'y'), Document('c', b'y')]
  text = files.distinct(train, heldout=[Document('d', b'x')])
  assert text == files.Text(train=(Document('b', b'y'),), heldout=(Document('d', b'x'),))


def test_the_hash_sees_names_contents_order_and_side():
  a, b = Document('a', b'1'), Document('b', b'2')
  texts = [files.Text((a,), (b,)), files.Text((b,), (a,)), files.Text((a, b), ()), files.Text((b, a), ()),
           files.Text((a,), (Document('c', b'2'),)), files.Text((a,), (Document('b', b'3'),)),
           files.Text((Document('a1', b''),), (b,))]
  assert len({text.hash for text in texts}) == len(texts)
  assert texts[0].hash == files.Text((a,), (b,)).hash
  assert len(texts[0].hash) == hashlib.sha256().digest_size * 2


def test_reading_stops_at_max_bytes_and_passes_over_what_is_gone(tmp_path):
  for name in 'abc': (tmp_path / name).write_bytes(name.encode() * 10)
  named = {name: str(tmp_path / name) for name in 'abcd'}
  assert sum(len(d.content) for d in files.read(named, 25)) == 25
  assert sorted(d.name for d in files.read(named, 10**6)) == ['a', 'b', 'c']
  assert [d.name for d in files.read(named, 10**6)] == [n for n in files.in_order('abcd') if n != 'd']
