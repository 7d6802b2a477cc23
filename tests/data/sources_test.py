import dataclasses
import json
import sys

import pytest

from efficient_lm import data
from efficient_lm.data import sources
from efficient_lm.errors import ConfigError


def complaints(source):
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
  assert not complaints(source)
  assert 1_900_000 < sum(len(d.content) for d in text.train + text.heldout) <= 2_000_000
  assert 0.005 < sum(len(d.content) for d in text.heldout) / 2_000_000 < 0.3
  assert text.hash == source.read().hash


def test_a_python_without_source_is_told_in_words(tmp_path, monkeypatch):
  monkeypatch.setattr(sources.sysconfig, 'get_path', lambda _: str(tmp_path / 'nowhere'))
  assert complaints(data.StandardLibrary()) and complaints(data.PythonPackages())
  with pytest.raises(ConfigError): data.Corpus().open(sequence_length=8, batch_size=1, seed=0)


def test_packages_by_name(library):
  del library
  assert not complaints(data.PythonPackages(('pkg', 'a')))
  text = data.PythonPackages(('pkg', 'a')).read()
  assert {d.content for d in text.train + text.heldout} == {b'a = 1\n', b'c = 1\n'}
  assert data.PythonPackages('pkg').read() == data.PythonPackages(('pkg',)).read()
  assert data.PythonPackages('pkg').read() == data.PythonPackages(('pkg',)).read()
  for bad in ('../x', '/etc', 'nothing', ''):
    assert complaints(data.PythonPackages((bad,))) == [('names', bad)]


def test_text_files_by_pattern_do_not_depend_on_where_they_are(tmp_path):
  hashes = set()
  for place in ('x', 'y'):
    folder = tmp_path / place / 'sub'
    folder.mkdir(parents=True)
    for number in range(30): (folder / f'{number}.txt').write_text(f'text {number}')
    (folder.parent / 'top.txt').write_text('top')
    text = data.TextFiles((str(tmp_path / place / '**/*.txt'),)).read()
    assert len(text.train + text.heldout) == 31 and text.heldout
    hashes.add(text.hash)
  assert len(hashes) == 1


def test_a_heldout_file_is_never_trained_on(tmp_path):
  for name in 'abc': (tmp_path / name).write_text(name)
  (tmp_path / 'copy').write_text('b')
  text = data.TextFiles((str(tmp_path / '*'),), heldout=str(tmp_path / 'b')).read()
  assert [d.content for d in text.heldout] == [b'b']
  assert sorted(d.content for d in text.train) == [b'a', b'c']
  with pytest.raises(ConfigError, match='no training text'):
    data.Corpus(data.TextFiles(str(tmp_path / 'copy'), heldout=str(tmp_path / 'b'))).open(
        sequence_length=4, batch_size=1, seed=0)


def test_one_file_is_cut_at_its_end(tmp_path):
  path = tmp_path / 'book [1].txt'  # brackets would be a pattern
  path.write_text(''.join(f'line {number}\n' for number in range(1000)))
  text = data.TextFiles((str(path),)).read()
  assert text.train[0].content + text.heldout[0].content == path.read_bytes()
  assert text.heldout[0].content.startswith(b'line ')
  assert 0.03 < len(text.heldout[0].content) / path.stat().st_size < 0.07


def test_text_files_complain_of_what_is_missing(tmp_path):
  assert complaints(data.TextFiles()) == [('train', ())]
  assert complaints(data.TextFiles(('nope.txt',))) == [('train', 'nope.txt')]
  [(field, _, fix)] = data.TextFiles((str(tmp_path),)).check()
  assert field == 'train' and 'folder' in fix


@pytest.mark.parametrize('source', [
    data.StandardLibrary(), data.PythonPackages(), data.TextFiles(__file__), data.HuggingFaceDataset('a/b')])
def test_every_bad_number_is_named(source):
  bad = {'max_bytes': (0, -1, None, 'x', 1.5), 'heldout_fraction': (0, 1, -1, None, float('nan'))}
  for field, values in bad.items():
    for value in values:
      [(found, shown)] = complaints(dataclasses.replace(source, **{field: value}))
      assert found == field and (shown == value or value != value)


@pytest.fixture(name='rows')
def _rows(tmp_path):
  rows = [{'text': f'row {number} é', 'other': number} for number in range(50)] + [{'text': None, 'other': 0}]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(json.dumps(row) for row in rows))
  return tmp_path / 'rows.jsonl'


def test_local_files_through_datasets(rows):
  pytest.importorskip('datasets')
  source = data.HuggingFaceDataset(str(rows))
  assert not complaints(source)
  text = source.read()
  assert {d.content.decode() for d in text.train + text.heldout} == {f'row {row} é' for row in range(50)}
  assert text.heldout
  held = data.HuggingFaceDataset(str(rows), heldout=str(rows)).read()
  assert len(held.heldout) == 50 and not held.train
  short = data.HuggingFaceDataset(str(rows), max_bytes=30, heldout=str(rows)).read()
  assert sum(len(d.content) for d in short.heldout) == 30


def test_text_and_parquet_files_through_datasets(tmp_path):
  datasets = pytest.importorskip('datasets')
  for number in range(3): (tmp_path / f'{number}.txt').write_text(f'line\nand line {number}\n')
  text = data.HuggingFaceDataset(str(tmp_path / '*.txt')).read()
  assert {d.content for d in text.train + text.heldout} == {b'line\nand line %d\n' % n for n in range(3)}
  datasets.Dataset.from_dict({'body': ['a', 'b', 'c']}).to_parquet(str(tmp_path / 'x.parquet'))
  text = data.HuggingFaceDataset(str(tmp_path / 'x.parquet'), column='body').read()
  assert {d.content for d in text.train + text.heldout} == {b'a', b'b', b'c'}


def test_what_datasets_cannot_read_is_one_line(rows, tmp_path):
  pytest.importorskip('datasets')
  with pytest.raises(ConfigError, match='choose among text, other'):
    data.HuggingFaceDataset(str(rows), column='body').read()
  (tmp_path / 'bad.parquet').write_bytes(b'not parquet')
  with pytest.raises(ConfigError) as error: data.HuggingFaceDataset(str(tmp_path / 'bad.parquet')).read()
  assert '\n' not in str(error.value)


def test_no_code_comes_with_a_data_set(tmp_path):
  canary = tmp_path / 'canary'
  folder = tmp_path / 'evil'
  folder.mkdir()
  (folder / 'evil.py').write_text(f'open({str(canary)!r}, "w")\n')
  for path in (folder, folder / 'evil.py'):
    assert ('path', str(path)) in complaints(data.HuggingFaceDataset(str(path)))
    with pytest.raises(ConfigError): data.HuggingFaceDataset(str(path)).read()  # even without the check
  assert not canary.exists()


def test_without_the_package_the_complaint_says_what_to_install(monkeypatch, rows):
  monkeypatch.setattr(sources.importlib.util, 'find_spec', lambda _: None)
  [(field, _, fix)] = data.HuggingFaceDataset(str(rows)).check()
  assert field == 'path' and 'pip install datasets' in fix
  monkeypatch.setitem(sys.modules, 'datasets', None)  # what a missing package looks like to import
  with pytest.raises(ConfigError): data.HuggingFaceDataset(str(rows)).read()
