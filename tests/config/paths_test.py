"""What a folder cannot be is said of its name alone, or of what lies there, and nothing is written."""
import os
import pathlib
import types

import pytest

from efficient_lm.config import experiment, paths
from efficient_lm.errors import ConfigError


def refusal(path, monkeypatch=None) -> str:
  with pytest.raises(ConfigError) as error: experiment.refuse_other(str(path), None)
  assert error.value.exit_code == 2 and '\n' not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize('path, said', [
  ('a\0b', 'no path can have'), ('a' * 300, 'a name of 300 bytes'), ('ä' * 150, 'a name of 300 bytes'),
  ('/'.join(['a' * 250] * 16), 'is a path of'), ('http://x', 'an address'), ('a/s3://x', 'an address'),
  ('\ud800', 'no path'),
])
def test_a_name_that_no_folder_can_have(tmp_path, monkeypatch, path, said):
  monkeypatch.chdir(tmp_path)
  assert said in refusal(path) and not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', experiment.FILES)
def test_a_folder_where_a_file_is_to_be(tmp_path, name):
  (tmp_path / name).mkdir()
  assert f'{name} must be a file' in refusal(tmp_path) and [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize('name', experiment.FOLDERS)
def test_a_file_where_a_folder_is_to_be(tmp_path, name):
  (tmp_path / name).touch()
  assert f'{name} must be a folder' in refusal(tmp_path)


@pytest.mark.parametrize('name', ['lock', 'metrics.jsonl'])
def test_neither_pipes_nor_links_that_lead_nowhere_are_files(tmp_path, name):
  os.mkfifo(tmp_path / name)
  assert f'{name} must be a file' in refusal(tmp_path)
  (tmp_path / 'link').symlink_to(tmp_path / 'gone' / 'x')
  assert 'No such file' in refusal(tmp_path / 'link' / 'run')


@pytest.mark.parametrize('part', ['', 'samples', 'checkpoints/4', 'lock'])
def test_a_part_that_cannot_be_written_is_found_before_training(tmp_path, monkeypatch, part):
  """Whoever runs this may be allowed everything: so the answer of the system is another one."""
  for name in ('samples', 'checkpoints/4'): (tmp_path / name).mkdir(parents=True)
  (tmp_path / 'lock').touch()
  allowed = os.access
  monkeypatch.setattr(os, 'access', lambda path, mode: allowed(path, mode) and not (
    pathlib.Path(path) == tmp_path / part and mode & os.W_OK))
  assert f'{tmp_path / part} cannot be written'.removesuffix('/') in refusal(tmp_path)


def test_a_file_system_that_is_for_reading_only_is_found_too(tmp_path, monkeypatch):
  monkeypatch.setattr(os, 'statvfs', lambda path: types.SimpleNamespace(f_flag=os.ST_RDONLY))
  assert 'cannot be written' in refusal(tmp_path)


def test_what_a_run_has_left_is_no_obstacle(tmp_path):
  for name in (*experiment.FOLDERS, 'stages/1_train'): (tmp_path / name).mkdir()
  for name in set(experiment.FILES) - {experiment.CONFIG_JSON}: (tmp_path / name).touch()
  experiment.refuse_other(str(tmp_path), None)
  experiment.refuse_other(str(tmp_path / 'new' / 'folder'), None)


def test_home_is_written_out_as_a_shell_does(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  assert paths.expanded('--workdir', '~/x') == '/home/me/x' and paths.expanded('--workdir', 'a/~/x') == 'a/~/x'
  assert paths.expanded('--workdir', None) is None
  with pytest.raises(ConfigError, match='no such user'): paths.expanded('--workdir', '~nobody_of_that_name/x')
