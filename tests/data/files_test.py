import hashlib
import os
import tempfile

import hypothesis
import pytest
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


distinct_documents = documents.filter(lambda corpus: len({d.content for d in corpus} - {b''}) == len(corpus))


@hypothesis.given(distinct_documents)
def test_neither_side_is_empty(corpus):
  for fraction in (0.001, 0.999):
    text = files.divide(corpus, fraction)
    assert text.train and text.heldout


@hypothesis.given(distinct_documents, st.floats(0.01, 0.99))
def test_a_side_depends_on_the_name_alone_unless_a_side_would_be_empty(corpus, fraction):
  under = {d.name for d in corpus if files.place(d.name, 'heldout') < fraction}
  heldout = {d.name for d in files.divide(corpus, fraction).heldout}
  if under and len(under) < len(corpus): assert heldout == under
  else: assert len(heldout) == (len(corpus) - 1 if under else 1)


@hypothesis.given(st.text(alphabet='aé\n漢', min_size=20), st.floats(0.05, 0.5))
def test_one_document_is_cut_into_two_that_read(content, fraction):
  copies = [Document('book', content.encode())] * 2
  for book in (copies[:1], copies):
    text = files.divide(book, fraction)
    train, heldout = (b''.join(d.content for d in side) for side in (text.train, text.heldout))
    if train != heldout and heldout: assert (train + heldout).decode() == content
    train.decode(), heldout.decode()


def test_of_a_content_on_both_sides_the_heldout_copy_stays():
  train = [Document('a', b'x'), Document('b', b'y'), Document('c', b'y')]
  text = files.distinct(train, heldout=[Document('d', b'x')])
  assert text == files.Text(train=(Document('b', b'y'),), heldout=(Document('d', b'x'),))


@hypothesis.given(st.binary(min_size=2, max_size=20), st.data())
def test_what_is_left_of_a_document_is_not_on_both_sides(content, data):
  """A copy cut by max_bytes has another content than the whole one, and yet the same text."""
  part = Document('part', content[:data.draw(st.integers(1, len(content) - 1))], is_cut=True)
  whole, other = Document('whole', content), Document('other', b'other' + content)
  text = files.distinct([part, other], [whole])
  assert text == files.Text(train=(other,), heldout=(whole,))
  text = files.distinct([whole, other], [part])
  assert whole in text.train and not text.heldout
  assert files.distinct([part._replace(is_cut=False)], [whole]).train  # a short document is one in its own right


def test_the_hash_sees_names_contents_order_and_side():
  a, b = Document('a', b'1'), Document('b', b'2')
  texts = [files.Text((a,), (b,)), files.Text((b,), (a,)), files.Text((a, b), ()), files.Text((b, a), ()),
           files.Text((a,), (Document('c', b'2'),)), files.Text((a,), (Document('b', b'3'),)),
           files.Text((Document('a1', b''),), (b,))]
  assert len({text.hash for text in texts}) == len(texts)
  assert texts[0].hash == files.Text((a,), (b,)).hash
  assert len(texts[0].hash) == hashlib.sha256().digest_size * 2


def test_reading_stops_at_max_bytes_and_says_what_was_cut(tmp_path):
  for name in 'abc': (tmp_path / name).write_bytes(name.encode() * 10)
  found = {name: str(tmp_path / name) for name in 'abc'}
  read = files.read(found, 25)
  assert [d.name for d in read] == files.in_order('abc')
  assert [(len(d.content), d.is_cut) for d in read] == [(10, False), (10, False), (5, True)]
  assert not any(d.is_cut for d in files.read(found, 30))


def test_what_cannot_be_read_is_an_error_or_recorded(tmp_path):
  for name in 'abc': (tmp_path / name).write_bytes(name.encode() * 10)
  found = {name: str(tmp_path / name) for name in 'abcd'}
  with pytest.raises(OSError) as error: files.read(found, 10**6)
  assert error.value.filename == found['d']
  left_out = []
  assert [d.name for d in files.read(found, 10**6, left_out)] == [n for n in files.in_order('abcd') if n != 'd']
  assert left_out == ['d']


NAMES = st.lists(st.text('ab', min_size=1, max_size=2), min_size=1, max_size=3).map(lambda parts: '/'.join(parts) + '.txt')


def write(root, names):
  for name in names:
    path = os.path.join(root, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w') as file: file.write(name)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.sets(NAMES, min_size=1), st.sampled_from(['**/*.txt', '*.txt', 'a/**/*.txt', '*/*.txt', '[a]*/?.txt']))
def test_a_pattern_names_what_it_matches_and_begins_in_its_fixed_folder(names, pattern):
  with tempfile.TemporaryDirectory() as root:
    write(root, names)
    os.makedirs(os.path.join(root, 'folder.txt'))  # a folder is no document
    found = files.named(os.path.join(root, pattern))
    fixed = files.fixed_folder(os.path.join(root, pattern))
    assert fixed == os.path.join(root, 'a') if pattern.startswith('a/') else fixed == root
    assert found == sorted(found) and len(set(found)) == len(found)
    assert {os.path.relpath(path, root) for path in found} <= names
    if pattern == '**/*.txt': assert len(found) == len(names)


def test_a_name_that_exists_is_itself(tmp_path):
  (tmp_path / 'book [1].txt').write_text('brackets')
  (tmp_path / 'book 1.txt').write_text('what the pattern would match')
  path = str(tmp_path / 'book [1].txt')
  assert files.named(path) == [path] and files.fixed_folder(path) == str(tmp_path)


def test_what_a_pattern_covers_and_nobody_can_read_is_an_error(tmp_path, monkeypatch):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / 'one.txt').write_text('one')
  pattern = str(tmp_path / '**/*.txt')
  assert len(files.named(pattern)) == 1
  (tmp_path / 'gone.txt').symlink_to(tmp_path / 'nothing')
  with pytest.raises(OSError) as error: files.named(pattern)
  assert error.value.filename == str(tmp_path / 'gone.txt')
  (tmp_path / 'gone.txt').unlink()
  scan = os.scandir

  def refuse(folder='.'):
    if str(folder).rstrip('/').endswith('/a'): raise PermissionError(13, 'Permission denied', folder)
    return scan(folder)

  monkeypatch.setattr(os, 'scandir', refuse)  # a superuser, as in a container, may read anywhere
  for each in (pattern, str(tmp_path / '*/*.txt')):
    with pytest.raises(PermissionError, match='/a'): files.named(each)
