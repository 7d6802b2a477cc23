"""Whatever cannot be written is one line with path, reason and room; what a run can do without does not end it."""
import errno
import os
import resource
import subprocess
import sys

import pytest

from efficient_lm.errors import WriteError
from efficient_lm.runs import writing

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.ENOENT, errno.EMFILE)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch): monkeypatch.setattr(writing, '_said', set())


@pytest.mark.parametrize('number', FULL)
def test_what_is_needed_is_one_line(tmp_path, number):
  with pytest.raises(WriteError) as error, writing.needed(tmp_path / 'file'): raise OSError(number, os.strerror(number))
  line = str(error.value)
  assert line.startswith(f'{tmp_path}/file cannot be written: {os.strerror(number)}') and line.endswith(' bytes free')
  assert '\n' not in line and error.value.exit_code == 5


def test_what_is_dispensable_is_said_once_a_path(tmp_path, caplog):
  for path in 'aab':
    with writing.dispensable(tmp_path / path): raise OSError(errno.ENOSPC, 'full')
  said = [record.getMessage().partition(':')[0] for record in caplog.records]
  assert said == [f'{tmp_path}/{path} cannot be written' for path in 'ab']
  with pytest.raises(ValueError), writing.dispensable(tmp_path): raise ValueError('a bug')


@pytest.mark.parametrize('number', FULL)
def test_libraries_that_raise_other_errors_are_understood(number):
  """As TensorStore does, with the words of the system in a ValueError."""
  words = os.strerror(number)
  assert writing.reason(ValueError(f'INTERNAL: failed [os_error_code={number}]: {words} [x]')).startswith(words)
  assert writing.reason(ValueError('shapes differ')) is None


def test_room_is_asked_for_before_it_is_used(tmp_path):
  writing.check_room(tmp_path, 1000, 2)
  with pytest.raises(OSError, match='no room for 1,000,000,000,00'): writing.check_room(tmp_path, 10 ** 18)


def test_free_room_of_a_folder_that_is_gone_is_that_of_the_one_it_was_in(tmp_path):
  assert writing.free(tmp_path / 'a' / 'b').endswith(' bytes free')


def test_a_limit_on_files_is_named(monkeypatch):
  monkeypatch.setattr(resource, 'getrlimit', lambda which: (1024, 1024))
  assert writing.reason(OSError(errno.EFBIG, 'x')) == 'File too large, the limit is 1,024 bytes a file'


@pytest.mark.parametrize('said', ["raise OSError(errno.ENOSPC, 'full')", ''], ids=['said', 'real'])
def test_any_command_ends_in_one_line_on_a_full_disk(tmp_path, said):
  program = f"""
import errno, resource, sys
from efficient_lm import commands
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
def main(overrides):
  {said}
  with open(sys.argv[1], 'wb', buffering=0) as file:
    while True: file.write(b'x' * 512)
sys.exit(commands.exit_code(main, ['command']))
"""
  done = subprocess.run([sys.executable, '-c', program, str(tmp_path / 'file')], capture_output=True, text=True, check=False)
  assert done.returncode == 5 and len(done.stderr.splitlines()) == 1 and 'bytes free' in done.stderr, done.stderr
