import dataclasses
import gzip
import json
import os
import sys
import tempfile

import hypothesis
import pytest
from hypothesis import strategies as st

from efficient_lm import data
from efficient_lm.data import files, sources
from efficient_lm.errors import ConfigError


def problems(source):
  return [(field, value) for field, value, _ in source.check()]


@pytest.fixture(name='library')
def _library(tmp_path, monkeypatch):
  """A standard library, and installed packages, of our own making."""
  for name, content in {
      'a.py': b'a = 1\n', 'b.py': b'\xff\xfe broken', 'pkg/c.py': b'c = 1\n', 'pkg/same.py': b'c = 1\n',
      'pkg/e.py': b'',
      'pkg/d.txt': b'no', 'test/t.py': b't', 'pkg/tests/t.py': b'tt', 'site-packages/p.py': b'p'}.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
  (tmp_path / 'link.py').symlink_to('/etc/passwd')
  monkeypatch.setattr(sources.sysconfig, 'get_path', lambda _: str(tmp_path))
  return tmp_path


def test_the_library_is_its_python_files_without_tests_packages_links_and_repeats(library):
  del library
  text = data.StandardLibrary().read()
  both = text.train + text.heldout
  assert sorted(d.content for d in both) == [b'a = 1\n', b'c = 1\n', b'\xff\xfe broken']
  assert {d.name for d in both} < {'a.py', 'b.py', 'pkg/c.py', 'pkg/same.py'}


def test_the_real_library_is_enough_to_train_on():
  source = data.StandardLibrary(max_bytes=2_000_000)
  text = source.read()
  assert not problems(source)
  assert 1_900_000 < sum(len(d.content) for d in text.train + text.heldout) <= 2_000_000
  assert 0.005 < sum(len(d.content) for d in text.heldout) / 2_000_000 < 0.3
  assert text.hash == source.read().hash


def test_a_python_without_source_is_told_in_words(tmp_path, monkeypatch):
  monkeypatch.setattr(sources.sysconfig, 'get_path', lambda _: str(tmp_path / 'nowhere'))
  assert problems(data.StandardLibrary()) and problems(data.PythonPackages())
  with pytest.raises(ConfigError): data.Corpus().open(seed=0)


def test_packages_by_name(library):
  del library
  assert not problems(data.PythonPackages(('pkg', 'a')))
  text = data.PythonPackages(('pkg', 'a')).read()
  assert {d.content for d in text.train + text.heldout} == {b'a = 1\n', b'c = 1\n'}
  assert data.PythonPackages('pkg').read() == data.PythonPackages(('pkg',)).read()
  assert data.PythonPackages('pkg').read() == data.PythonPackages(('pkg',)).read()
  for bad in ('../x', '/etc', 'nothing', ''):
    assert problems(data.PythonPackages((bad,))) == [('names', bad)]


def test_the_names_of_a_library_are_paths_and_never_change(library):
  """A run resumes on the text it began with: names, order and sides are those of the first release."""
  for number in range(10): (library / f'more{number}.py').write_text(f'{number}\n')
  text = data.StandardLibrary(heldout_fraction=0.3).read()
  assert [d.name for d in text.train] == [
    'more8.py', 'more5.py', 'a.py', 'more2.py', 'more4.py', 'more7.py', 'more0.py', 'more3.py']
  assert [d.name for d in text.heldout] == ['more1.py', 'more9.py', 'b.py', 'pkg/c.py', 'more6.py']


@pytest.mark.parametrize('source', [data.StandardLibrary(), data.PythonPackages()])
def test_what_of_a_tree_cannot_be_read_is_recorded(library, monkeypatch, source):
  for number in range(9): (library / f'more{number}.py').write_text(f'file {number}')
  assert source.read().left_out == ()
  plain, scan = open, os.scandir

  def refuse(path, *args):
    if str(path).endswith('a.py'): raise PermissionError(13, 'Permission denied', path)
    return plain(path, *args)

  def refuse_folder(path):
    if str(path).endswith('pkg'): raise PermissionError(13, 'Permission denied', path)
    return scan(path)

  monkeypatch.setattr('builtins.open', refuse)  # a superuser, as in a container, may read anywhere
  monkeypatch.setattr(os, 'scandir', refuse_folder)
  opened = data.Corpus(source).open(seed=0)
  monkeypatch.undo()
  assert opened.describe()['left_out'] == ['a.py', 'pkg']
  assert {d.name for d in opened.text.train + opened.text.heldout} <= {'b.py', *(f'more{number}.py' for number in range(9))}


def test_of_two_folders_of_packages_no_file_replaces_another_in_silence(tmp_path, monkeypatch):
  for place in ('lib', 'lib64'):
    (tmp_path / place).mkdir()
    (tmp_path / place / 'a.py').write_text(place)
    (tmp_path / place / f'{place}.py').write_text(f'only {place}')
  monkeypatch.setattr(sources.sysconfig, 'get_path', lambda name: str(tmp_path / {'purelib': 'lib'}.get(name, 'lib64')))
  text = data.PythonPackages().read()
  assert {d.content for d in text.train + text.heldout} == {b'lib', b'only lib', b'only lib64'}
  assert text.left_out == (str(tmp_path / 'lib64/a.py'),)


NAMES = st.text('ab/', min_size=1, max_size=5).filter(lambda name: '//' not in name and name.strip('/') == name)
PATTERNS = st.sampled_from([
  ('**/*.txt',), ('a/**/*.txt',), ('*/*.txt', '**/*.txt'), ('a/*.txt', 'b/**/*.txt'), ('a/**/*.txt', 'a/b/*.txt', '*.txt')])


def write(root, names):
  for name in names:
    path = os.path.join(root, name + '.txt')
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w') as file: file.write(f'content of {name}')


def names_by_side(root, patterns, heldout=()):
  absolute = lambda every: tuple(os.path.join(root, pattern) for pattern in every)
  text = data.TextFiles(absolute(patterns), absolute(heldout), heldout_fraction=0.4).read()
  return [[(d.content, d.name) for d in side] for side in (text.train, text.heldout)]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.sets(NAMES, min_size=4), st.sets(NAMES, min_size=1), PATTERNS)
def test_other_files_change_no_documents_name_order_or_side(names, others, patterns):
  with tempfile.TemporaryDirectory() as folder:
    root = os.path.join(folder, 'here')
    write(root, names - others)
    before = names_by_side(root, patterns)
    write(root, others)
    after = names_by_side(root, patterns)
    found = [document for side in after for document in side]
    assert len({name for _, name in found}) == len({content for content, _ in found}) == len(found)
    under = [files.place(name, 'heldout') < 0.4 for side in before for _, name in side]
    # Only where all would be on one side, a side changes by force, and a single document is cut.
    if any(under) and not all(under) and '#end' not in str(before):
      for earlier, later in zip(before, after): assert earlier == [document for document in later if document in earlier]
    os.rename(root, os.path.join(folder, 'moved'))
    assert names_by_side(os.path.join(folder, 'moved'), patterns) == after


def test_a_new_folder_inside_the_pattern_moves_no_heldout_document(tmp_path):
  """Once, names began at the folder common to all files, and one more folder renamed everything."""
  write(tmp_path / 'books/en', map(str, range(200)))
  before = names_by_side(tmp_path, ('books/**/*.txt',))
  write(tmp_path / 'books/de', ['one'])
  assert [name for _, name in before[1]] == [name for _, name in names_by_side(tmp_path, ('books/**/*.txt',))[1]
                                             if name != 'de/one.txt']


@pytest.mark.parametrize('patterns, heldout', [
  (('a/*.txt',), ('b/*.txt',)), (('**/*.txt',), ('b/*.txt',)), (('b/*.txt', 'a/*.txt'), ('a/*.txt',)),
  (('a/1.txt',), ('b/1.txt',))])
def test_files_of_the_two_sides_share_no_name(tmp_path, patterns, heldout):
  write(tmp_path, [f'{folder}/{number}' for folder in 'ab' for number in range(5)])
  sides = names_by_side(tmp_path, patterns, heldout)
  assert all(sides) and not {content for content, _ in sides[0]} & {content for content, _ in sides[1]}
  assert not {name for _, name in sides[0]} & {name for _, name in sides[1]}


def test_one_more_pattern_renames_no_document(tmp_path):
  write(tmp_path, [f'{folder}/{number}' for folder in 'ab' for number in range(30)])
  one, two = (names_by_side(tmp_path, patterns) for patterns in (('a/*.txt',), ('a/*.txt', 'b/*.txt')))
  for fewer, more in zip(one, two): assert fewer == [document for document in more if document in fewer]


def test_a_heldout_file_is_never_trained_on(tmp_path):
  for name in 'abc': (tmp_path / name).write_text(name)
  (tmp_path / 'copy').write_text('b')
  text = data.TextFiles((str(tmp_path / '*'),), heldout=str(tmp_path / 'b')).read()
  assert [d.content for d in text.heldout] == [b'b']
  assert sorted(d.content for d in text.train) == [b'a', b'c']
  with pytest.raises(ConfigError, match='no training text'):
    data.Corpus(data.TextFiles(str(tmp_path / 'copy'), heldout=str(tmp_path / 'b'))).open(seed=0)


def test_a_heldout_file_is_not_trained_on_even_where_max_bytes_cuts_it(tmp_path):
  (tmp_path / 'a').write_text('a' * 100)
  (tmp_path / 'b').write_text(''.join(map(str, range(1000))))
  for max_bytes in (150, 500):
    text = data.TextFiles((str(tmp_path / '*'),), str(tmp_path / 'b'), max_bytes).read()
    assert [d.name for d in text.train] == ['a'] and [d.name for d in text.heldout] == ['b']


def test_one_file_is_cut_at_its_end(tmp_path):
  path = tmp_path / 'book [1].txt'  # brackets would be a pattern
  path.write_text(''.join(f'line {number}\n' for number in range(1000)))
  text = data.TextFiles((str(path),)).read()
  assert text.train[0].content + text.heldout[0].content == path.read_bytes()
  assert text.heldout[0].content.startswith(b'line ')
  assert 0.03 < len(text.heldout[0].content) / path.stat().st_size < 0.07


def test_missing_text_files_are_named(tmp_path):
  assert problems(data.TextFiles()) == [('train', ())]
  assert problems(data.TextFiles(('nope.txt',))) == [('train', 'nope.txt')]
  [(field, _, fix)] = data.TextFiles((str(tmp_path),)).check()
  assert field == 'train' and 'folder' in fix


@pytest.mark.parametrize('field', ['train', 'heldout'])
def test_a_named_file_that_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch, field):
  write(tmp_path, 'abc')
  (tmp_path / 'other').write_text('other')
  sides = {'train': str(tmp_path / 'other'), field: str(tmp_path / '*.txt')}
  monkeypatch.setattr(files, 'named', lambda pattern, named=files.named: [*named(pattern), str(tmp_path / 'vanished.txt')])
  with pytest.raises(ConfigError) as error: data.TextFiles(**sides).read()
  assert error.value.value == str(tmp_path / 'vanished.txt') and '\n' not in str(error.value)
  monkeypatch.undo()
  (tmp_path / 'link.txt').symlink_to(tmp_path / 'nowhere')
  assert problems(data.TextFiles(**sides)) == [(field, str(tmp_path / 'link.txt'))]
  with pytest.raises(ConfigError, match=f'data.source.{field} = .*link.txt'): data.TextFiles(**sides).read()


@pytest.mark.parametrize('source', [
    data.StandardLibrary(), data.PythonPackages(), data.TextFiles(__file__), data.HuggingFaceDataset('a/b')])
def test_every_bad_number_is_named(source):
  bad = {'max_bytes': (0, -1, None, 'x', 1.5), 'heldout_fraction': (0, 1, -1, None, float('nan'))}
  for field, values in bad.items():
    for value in values:
      [(found, shown)] = problems(dataclasses.replace(source, **{field: value}))
      assert found == field and (shown == value or value != value)


@pytest.fixture(name='rows')
def _rows(tmp_path):
  rows = [{'text': f'row {number} é', 'other': number} for number in range(50)] + [{'text': None, 'other': 0}]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(json.dumps(row) for row in rows))
  return tmp_path / 'rows.jsonl'


def test_the_rows_of_local_files(rows):
  source = data.HuggingFaceDataset(str(rows))
  assert not problems(source)
  text = source.read()
  assert {d.content.decode() for d in text.train + text.heldout} == {f'row {row} é' for row in range(50)}
  assert text.heldout and text.left_out == (f'1 rows of {rows} without text',)
  held = data.HuggingFaceDataset(str(rows), heldout=str(rows)).read()
  assert len(held.heldout) == 50 and not held.train
  short = data.HuggingFaceDataset(str(rows), max_bytes=30, heldout=str(rows)).read()
  assert sum(len(d.content) for d in short.heldout) == 30


def test_text_and_parquet_files(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  for number in range(3): (tmp_path / f'{number}.txt').write_text(f'line\nand line {number}\n')
  text = data.HuggingFaceDataset(str(tmp_path / '*.txt')).read()
  assert {d.content for d in text.train + text.heldout} == {b'line\nand line %d\n' % n for n in range(3)}
  parquet.write_table(pyarrow.table({'body': ['a', 'b', 'c']}), tmp_path / 'x.parquet')
  text = data.HuggingFaceDataset(str(tmp_path / 'x.parquet'), column='body').read()
  assert {d.content for d in text.train + text.heldout} == {b'a', b'b', b'c'}


def contents(path, **options):
  text = data.HuggingFaceDataset(str(path), **options).read()
  return sorted(d.content for d in text.train + text.heldout)


TEXTS = ['a\r\nb\rc\n', '2020-01-01T00:00:00Z', '2021-01-01', ' 7', '\ufeff', '\x00', '\u2028', '{"text": 1}', '\ud800']


@pytest.mark.parametrize('form', ['lines', 'array'])
@pytest.mark.parametrize('ending', ['', '.gz'])
def test_text_comes_out_of_json_as_it_is(tmp_path, form, ending):
  """A reader that guesses types makes dates of some of these, and one that reads lines of text changes others."""
  rows = [json.dumps({'text': text}) for text in TEXTS]
  written = '\n\n'.join(rows) if form == 'lines' else f'[{",".join(rows)}]'
  path = tmp_path / f'rows.json{ending}'
  path.write_bytes(gzip.compress(written.encode()) if ending else written.encode())
  assert contents(path) == sorted(text.encode('utf-8', 'surrogatepass') for text in TEXTS)


def test_text_comes_out_of_text_files_as_it_is(tmp_path):
  raw = [b'a\r\nb\rc\n', b'\xff\xfe broken', '\ufeffmark'.encode()]
  for number, content in enumerate(raw): (tmp_path / f'{number}.txt').write_bytes(content)
  assert contents(tmp_path / '*.txt') == sorted(raw)


def test_brackets_in_a_name_are_brackets(tmp_path):
  (tmp_path / 'rows [1].txt').write_text('first\nsecond\n')
  (tmp_path / 'rows 1.txt').write_text('what the brackets would match as a pattern')
  assert sorted(b''.join(contents(tmp_path / 'rows [1].txt'))) == sorted(b'first\nsecond\n')


def test_a_changed_file_is_read_anew_even_with_the_time_of_the_old_one(tmp_path):
  for word in ('old', 'new'):
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps({'text': f'{word} {number}'}) + '\n' for number in range(2)))
    os.utime(tmp_path / 'rows.jsonl', (10**9, 10**9))
    assert contents(tmp_path / 'rows.jsonl') == [f'{word} {number}'.encode() for number in range(2)]


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.lists(st.text(min_size=1), min_size=2, unique=True), st.lists(st.text(min_size=1)), st.randoms())
def test_rows_added_anywhere_change_no_rows_name_order_or_side(texts, more, random):
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'rows.jsonl')

    def sides(rows):
      with open(path, 'w') as file: file.writelines(json.dumps({'text': row}) + '\n' for row in rows)
      text = data.HuggingFaceDataset(path, heldout_fraction=0.4).read()
      return [[(d.content, d.name) for d in side] for side in (text.train, text.heldout)]

    before = sides(texts)
    added = list(texts)
    for row in set(more) - set(texts): added.insert(random.randint(0, len(added)), row)
    after = sides(added)
    under = [files.place(name, 'heldout') < 0.4 for side in before for _, name in side]
    if any(under) and not all(under):
      for earlier, later in zip(before, after): assert earlier == [row for row in later if row in earlier]


@pytest.mark.parametrize('row, kind', [('7', 'int'), ('["a", "b"]', 'list'), ('{}', 'dict'), ('true', 'bool')])
def test_what_is_no_text_is_not_made_into_text(tmp_path, row, kind):
  (tmp_path / 'rows.jsonl').write_text(f'{{"text": "a"}}\n{{"text": {row}}}\n')
  with pytest.raises(ConfigError, match=f'data.source.column = .*row 2 of .*rows.jsonl has a {kind}'):
    contents(tmp_path / 'rows.jsonl')


def test_what_cannot_be_read_is_one_line(rows, tmp_path):
  with pytest.raises(ConfigError, match='choose among text, other'): contents(rows, column='body')
  bad = {'bad.jsonl': b'{"text": "a"}\n{"text": "b', 'rows.json': b'[1, 2]', 'none.jsonl': b'7',
         'bad.jsonl.gz': gzip.compress(rows.read_bytes())[:-9]}
  if sources.importlib.util.find_spec('pyarrow'): bad['bad.parquet'] = b'not parquet'
  for name, content in bad.items():
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error: contents(tmp_path / name)
    assert error.value.value == str(tmp_path / name) and '\n' not in str(error.value)
  (tmp_path / 'link.jsonl').symlink_to(tmp_path / 'nowhere')
  assert problems(data.HuggingFaceDataset(str(tmp_path / '*.jsonl'))) == [('path', str(tmp_path / 'link.jsonl'))]
  with pytest.raises(ConfigError, match=r'data\.source\.heldout = .*link\.jsonl'):
    contents(rows, heldout=str(tmp_path / 'link.jsonl'))


def test_a_data_set_of_the_hub_is_read_through_datasets(monkeypatch):
  """With a stand-in for the package: no test needs the network."""
  class Rows(list):
    column_names = ('text', 'other')
    def select_columns(self, names): return [{name: row[name] for name in names} for row in self]

  asked = []
  splits = {'train': ['a', None, 'b', 'c'], 'test': ['b', 'd']}
  def load_dataset(*args, split, revision):
    asked.append((*args, split, revision))
    return Rows({'text': text, 'other': 0} for text in splits[split])

  monkeypatch.setattr(sources.datasets, 'load_dataset', load_dataset, raising=False)
  source = data.HuggingFaceDataset('owner/name', name='small', heldout='test', revision='v1')
  text = source.read()
  assert [d.content for d in text.train] == [b'a', b'c'] and [d.content for d in text.heldout] == [b'b', b'd']
  assert text.left_out == ('1 rows of train without text',)
  assert asked == [('owner/name', 'small', 'train', 'v1'), ('owner/name', 'small', 'test', 'v1')]
  with pytest.raises(ConfigError, match='choose among text, other'): dataclasses.replace(source, column='body').read()
  with pytest.raises(ConfigError, match='row 0 of train has a int'): dataclasses.replace(source, column='other').read()
  with pytest.raises(ConfigError, match=r'owner/name.*cannot be read'): dataclasses.replace(source, heldout='gone').read()


def test_no_code_comes_with_a_data_set(tmp_path):
  canary = tmp_path / 'canary'
  folder = tmp_path / 'evil'
  folder.mkdir()
  (folder / 'evil.py').write_text(f'open({str(canary)!r}, "w")\n')
  for path in (folder, folder / 'evil.py'):
    assert ('path', str(path)) in problems(data.HuggingFaceDataset(str(path)))
    with pytest.raises(ConfigError): data.HuggingFaceDataset(str(path)).read()  # even without the check
  assert not canary.exists()


def test_without_its_package_a_source_says_what_to_install(monkeypatch, rows):
  monkeypatch.setattr(sources.importlib.util, 'find_spec', lambda _: None)
  assert not problems(data.HuggingFaceDataset(str(rows)))  # plain files need none
  [(field, _, fix)] = data.HuggingFaceDataset('owner/name').check()
  assert field == 'path' and 'pip install datasets' in fix
  monkeypatch.setitem(sys.modules, 'datasets', None)  # what a missing package looks like to import
  with pytest.raises(ConfigError): data.HuggingFaceDataset('owner/name').read()
