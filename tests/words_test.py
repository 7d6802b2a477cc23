"""Odd words to every command: done, or one line and an exit code, whatever a flag is set to."""
import importlib
import os

import pytest
from absl import flags

from efficient_lm.commands import exit_code
from efficient_lm.runs import run
from tests import minute

pytestmark = pytest.mark.fault('odd words to every command', 'done, or refused in one line')
BASE = {'generate': ('--tokens=4',), 'evaluate': (), 'sensitivity': (), 'export': ('--format=hf', '--out=out')}
VALUES = ('', 'x', '-1', '0', '1', '1e30', 'nan', 'inf', '-inf', str(10 ** 18), str(10 ** 30), 'empty', 'bytes', 'empty.txt',
          'text.txt', '/nowhere/a/b', 'a\0b', 'x' * 300, 'http://x/y', '../..', '(', 'é😀', 'None', 'true', '[1]', '-')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  made = tmp_path_factory.mktemp('words')
  config = minute.over_bytes(made)
  run.run(config, config, made / 'run')
  (made / 'empty').mkdir()
  (made / 'bytes').write_bytes(bytes(range(128, 256)))
  (made / 'empty.txt').write_text('')
  (made / 'text.txt').write_text('some text. ' * 50)
  return made


@pytest.fixture
def called(folder, monkeypatch, capsys):
  """called(command, words): its exit code and the lines on standard error."""
  monkeypatch.chdir(folder)
  def call(name: str, words) -> tuple[int, list[str]]:
    command = importlib.import_module(f'efficient_lm.{name}')
    for flag in flags.FLAGS: flags.FLAGS[flag].unparse()
    try: code = exit_code(command.main, [name, *words])
    finally:
      for flag in flags.FLAGS: flags.FLAGS[flag].unparse()
    return code, capsys.readouterr().err.strip().splitlines()
  return call


def flags_of(name: str) -> list[str]:
  importlib.import_module(f'efficient_lm.{name}')
  doc = importlib.import_module(f'efficient_lm.{name}').__doc__
  return [flag for flag in flags.FLAGS if f'--{flag}=' in doc or f'--{flag} ' in doc]


@pytest.mark.thinned
@pytest.mark.parametrize('value', VALUES, ids=lambda value: ascii(value)[:20])
@pytest.mark.parametrize('name', BASE)
def test_a_flag_takes_any_value_or_says_in_a_line_why_not(name, value, called, folder):
  for flag in flags_of(name):
    before = set(os.listdir(folder))
    code, lines = called(name, [f'--run={folder}/run', *BASE[name], f'--{flag}={value}'])
    assert (code == 0 or len(lines) == 1) and code in (0, 2, 3), (flag, code, lines)
    if code: assert set(os.listdir(folder)) == before, flag


@pytest.mark.parametrize('words', [(), ('word',), ('--run',), ('--nope=1',), ('-',), ('--',), ('--run=nowhere', '--', 'x')])
@pytest.mark.parametrize('name', BASE)
def test_words_that_make_no_command_are_one_line(name, words, called):
  code, lines = called(name, words)
  assert code == 2 and len(lines) == 1
