import os
import pathlib
import threading

import numpy as np
import pytest

from efficient_lm.data import cache
from efficient_lm.errors import ConfigError

KEY = cache.digest('test')


class Builder:
  """Counts how often it had to build."""

  def __init__(self):
    self.calls = 0

  def __call__(self):
    self.calls += 1
    return {'a': np.arange(1000, dtype=np.uint16), 'b': np.array([7])}


@pytest.fixture(name='home')
def _home(tmp_path, monkeypatch):
  monkeypatch.setenv('EFFICIENT_LM_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


def test_the_second_time_nothing_is_built_and_arrays_are_mapped_read_only(home):
  build = Builder()
  first, second = cache.fetch(KEY, build), cache.fetch(KEY, build)
  assert build.calls == 1
  assert isinstance(second['a'], np.memmap) and not second['a'].flags.writeable
  np.testing.assert_array_equal(first['a'], np.arange(1000))
  assert [path.name for path in home.iterdir()] == [KEY[:32]]  # nothing partial stays


@pytest.mark.parametrize('file', ['a.npy', 'b.npy', 'manifest.json'])
@pytest.mark.parametrize('damage', ['delete', 'truncate', 'empty', 'flip'])
def test_a_damaged_entry_is_rebuilt(home, file, damage):
  build = Builder()
  cache.fetch(KEY, build)
  path = home / KEY[:32] / file
  raw = bytearray(path.read_bytes())
  if damage == 'delete': path.unlink()
  if damage == 'truncate': path.write_bytes(raw[:-1])
  if damage == 'empty': path.write_bytes(b'')
  if damage == 'flip':
    raw[-3] ^= 1
    path.write_bytes(raw)
  again = cache.fetch(KEY, build)
  assert build.calls == 2
  np.testing.assert_array_equal(again['a'], np.arange(1000))
  cache.fetch(KEY, build)
  assert build.calls == 2


def test_many_may_build_the_same_entry_at_once(home):
  results = []
  work = [threading.Thread(target=lambda: results.append(cache.fetch(KEY, Builder()))) for _ in range(8)]
  for thread in work: thread.start()
  for thread in work: thread.join()
  assert len(results) == 8 and all((result['a'] == np.arange(1000)).all() for result in results)
  assert len(list(home.iterdir())) == 1


def test_an_object_array_is_neither_written_nor_unpickled(home):
  with pytest.raises(ValueError): cache.fetch(KEY, lambda: {'a': np.array([object()])})
  assert not (home / KEY[:32]).exists()
  cache.fetch(KEY, Builder())
  canary = home / 'canary'

  class Evil:
    def __reduce__(self):
      return pathlib.Path.touch, (canary,)

  np.save(home / KEY[:32] / 'a.npy', np.array([Evil()]), allow_pickle=True)
  assert cache.fetch(KEY, Builder())['a'].dtype == np.uint16
  assert not canary.exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('EFFICIENT_LM_CACHE', str(tmp_path / 'file'))
  with pytest.raises(ConfigError, match='EFFICIENT_LM_CACHE = ') as error: cache.fetch(KEY, Builder())
  assert '\n' not in str(error.value)


def test_where_the_cache_is(monkeypatch):
  monkeypatch.setenv('EFFICIENT_LM_CACHE', '/a/b')
  assert cache.folder() == pathlib.Path('/a/b')
  monkeypatch.delenv('EFFICIENT_LM_CACHE')
  monkeypatch.setenv('XDG_CACHE_HOME', '/x')
  assert cache.folder() == pathlib.Path('/x/efficient_lm')
  monkeypatch.delenv('XDG_CACHE_HOME')
  assert cache.folder() == pathlib.Path(os.path.expanduser('~/.cache/efficient_lm'))


def test_keys_differ_when_any_part_does():
  parts = [('a', 'b'), ('ab',), ('a', 'c'), ('a', 'b', 1)]
  assert len({cache.digest(*each) for each in parts}) == len(parts)
