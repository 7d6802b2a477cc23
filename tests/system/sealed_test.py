"""What was written is read, or one line says what is wrong with the file."""
import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.errors import CheckpointError
from efficient_lm.system import sealed

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
DATA = {'theta': 10000.0, 'names': ['a', 'ü', '\udc80'], 'nested': {'none': None, 'large': 2 ** 70, 'yes': True}}


@settings(max_examples=30)   # each is brought to the disk
@given(st.dictionaries(st.text(), JSON).filter(lambda data: sealed.ENTRY not in data))
def test_reading_is_the_inverse_of_writing(tmp_path_factory, data):
  folder = tmp_path_factory.getbasetemp()
  sealed.write(folder, 'file.json', data)
  assert sealed.read(folder / 'file.json') == data


def test_every_bit_that_flips_is_noticed_or_changes_nothing(tmp_path):
  sealed.write(tmp_path, 'file.json', DATA)
  path, noticed = tmp_path / 'file.json', 0
  before = path.read_bytes()
  for bit in range(8 * len(before)):
    content = bytearray(before)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    try: found = sealed.read(path)
    except CheckpointError as error:
      assert str(path) in str(error) and '\n' not in str(error) and error.exit_code == 3
      noticed += 1
    else: assert found == DATA
  assert noticed > 7 * len(before)


@pytest.mark.parametrize('length', range(0, 200, 7))
def test_one_that_breaks_off_is_noticed(tmp_path, length):
  sealed.write(tmp_path, 'file.json', DATA)
  path = tmp_path / 'file.json'
  path.write_bytes(path.read_bytes()[:length])
  with pytest.raises(CheckpointError, match=r'file\.json is damaged'): sealed.read(path)


@pytest.mark.parametrize('content, said', [
  ('{"a": 1, "a": 2}', 'a name twice'), ('{"a": NaN}', 'NaN'), ('{"a": -Infinity}', '-Infinity'), ('[1]', 'no JSON object'),
  ('null', 'no JSON object'), ('', 'damaged'), ('[' * 10_000, 'too deeply'), ('{"a":' * 10_000, 'too deeply'),
  (b'\xff\xfe\xfa{', 'damaged'), (b'{"a": "\xff"}', 'not UTF-8'), ('{"a": ' + '1' * 5000 + '}', 'damaged'),
  ('{"a": 1, "sha256": null}', 'something else'), ('{"a": 1, "sha256": 3}', 'something else'),
  ('{"a": 1, "sha256": ["x"]}', 'something else')],
  ids=['twice', 'nan', 'infinity', 'list', 'null', 'empty', 'deep lists', 'deep objects', 'utf-16', 'bytes', 'digits',
       'no hash', 'a number', 'a list'])
def test_what_is_odd_is_one_line_that_names_the_file(tmp_path, content, said):
  path = tmp_path / 'file.json'
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(CheckpointError, match=said) as caught: sealed.read(path)
  assert str(path) in str(caught.value) and '\n' not in str(caught.value) and len(str(caught.value)) < 300


def test_a_file_without_end_is_not_read(tmp_path):
  path = tmp_path / 'file.json'
  with open(path, 'wb') as file: file.truncate(sealed.LARGEST + 1)   # takes no room on the disk
  with pytest.raises(CheckpointError, match='more than 268,435,456 bytes'): sealed.read(path)


def test_what_is_not_there_or_no_file_is_one_line(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  for path, said in ((tmp_path / 'gone', 'is missing'), (tmp_path, 'is no file'), (tmp_path / 'pipe', 'is no file'),
                     (tmp_path / ('x' * 300), 'cannot be read: File name too long')):
    with pytest.raises(CheckpointError, match=said): sealed.read(path)


def test_a_file_of_an_earlier_version_has_no_hash_and_is_read(tmp_path):
  (tmp_path / 'file.json').write_text(json.dumps(DATA))
  assert sealed.read(tmp_path / 'file.json') == DATA and not sealed.is_sealed(tmp_path / 'file.json')
  sealed.write(tmp_path, 'file.json', DATA)
  assert sealed.is_sealed(tmp_path / 'file.json')


def test_the_hash_is_of_the_values_not_of_their_spelling(tmp_path):
  sealed.write(tmp_path, 'file.json', DATA)
  spelled = json.loads((tmp_path / 'file.json').read_text())
  (tmp_path / 'file.json').write_text(json.dumps(dict(reversed(spelled.items())), separators=(',', ':')))
  assert sealed.read(tmp_path / 'file.json') == DATA
  (tmp_path / 'file.json').write_text(json.dumps(spelled | {'theta': 10000.2}))
  with pytest.raises(CheckpointError, match='If it was changed on purpose, remove its entry sha256'):
    sealed.read(tmp_path / 'file.json')


def test_what_json_cannot_hold_is_not_written(tmp_path):
  with pytest.raises(ValueError): sealed.write(tmp_path, 'file.json', {'a': math.nan})
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('call', ['replace', 'fsync', 'open'])
def test_a_kill_at_any_moment_leaves_a_file_that_is_read(tmp_path, monkeypatch, call):
  """There is no moment between a file and its hash."""
  sealed.write(tmp_path, 'file.json', DATA)
  class Killed(Exception): pass
  def killed(*arguments, **words): raise Killed
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(os, call, killed)
    sealed.write(tmp_path, 'file.json', {'other': 1})
  assert sealed.read(tmp_path / 'file.json') == DATA
  sealed.write(tmp_path, 'file.json', {'other': 1})
  assert sealed.read(tmp_path / 'file.json') == {'other': 1}
