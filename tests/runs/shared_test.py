"""A workdir that only one of the hosts sees is noticed before anything is written there."""
import pathlib

import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.parallel import processes
from efficient_lm.runs import shared


@pytest.fixture
def second(monkeypatch):
  """This is the second of two processes; second(folder): the first one writes there."""
  import contextlib
  def be(folder):
    monkeypatch.setattr(processes, 'several', lambda: True)
    monkeypatch.setattr(processes, 'is_first', lambda: False)
    def told(text):
      if folder: (folder / f'.efficient_lm-{text}').touch()
      return text
    monkeypatch.setattr(processes, 'told', told)
    monkeypatch.setattr(processes, 'together', contextlib.nullcontext)
    monkeypatch.setattr(shared, 'SECONDS', 0.2)
  return be


def test_what_the_first_writes_is_seen(second, tmp_path):
  second(tmp_path)
  shared.check(tmp_path)
  shared.check(tmp_path / 'not' / 'there' / 'yet')


def test_what_is_not_seen_is_refused(second, tmp_path):
  second(None)
  with pytest.raises(ConfigError, match='not one folder for all') as raised: shared.check(tmp_path / 'run')
  assert raised.value.field == '--workdir' and len(str(raised.value).splitlines()) == 1
  assert not list(tmp_path.iterdir())


def test_nothing_is_left_and_one_process_writes_nothing(monkeypatch, tmp_path):
  touched, touch = [], pathlib.Path.touch
  monkeypatch.setattr(pathlib.Path, 'touch', lambda path, *words: touched.append(path) or touch(path, *words))
  shared.check(tmp_path)
  assert not touched
  monkeypatch.setattr(processes, 'several', lambda: True)
  monkeypatch.setattr(processes, 'told', lambda text: text)
  monkeypatch.setattr(processes, 'gathered', lambda own: own[None])
  shared.check(tmp_path)
  assert touched and not list(tmp_path.iterdir())
