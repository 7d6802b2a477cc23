import subprocess
import sys

import pytest
from absl import flags

from efficient_lm import commands
from efficient_lm.errors import CheckpointError, ConfigError, DeviceFault, NonFinite, Preempted


@pytest.fixture(autouse=True)
def words(monkeypatch):
  """A command with --config and --size, whatever other commands this process has imported."""
  own = flags.FlagValues()
  flags.DEFINE_string('config', None, '', flag_values=own)
  flags.DEFINE_integer('size', 3, '', flag_values=own)
  monkeypatch.setattr(commands, 'FLAGS', own)
  return own


@pytest.mark.parametrize('error, code', [
  (ConfigError('field', 1, 'fix'), 2), (CheckpointError('none'), 3), (NonFinite('nan'), 4), (DeviceFault('bit'), 7),
  (Preempted('saved'), 42), (KeyboardInterrupt(), 130),
])
def test_each_end_has_its_exit_code_and_one_line(error, code, capsys):
  def main(overrides): raise error
  assert commands.exit_code(main, ['command']) == code
  assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_line_stays_one_whatever_it_quotes(capsys):
  def main(overrides): raise CheckpointError('a\nb\n\n  c')
  commands.exit_code(main, ['command'])
  assert capsys.readouterr().err == 'a b c\n'


def test_a_bug_keeps_its_traceback():
  def main(overrides): raise RuntimeError('a bug')
  with pytest.raises(RuntimeError): commands.exit_code(main, ['command'])


def test_flags_are_set_and_overrides_handed_over_in_their_order(words):
  seen = []
  argv = ['command', '--config.b=1', '--size=4', '-config.a[0].c=x y', '--config=file.py']
  assert commands.exit_code(seen.extend, argv) == 0
  assert seen == ['--config.b=1', '--config.a[0].c=x y'] and words.size == 4 and words.config == 'file.py'


@pytest.mark.parametrize('argv, said', [
  (['--size=big'], '--size'), (['--sise=3'], 'did you mean --size'), (['size=3'], 'did you mean --size=3?'),
  (['word'], 'word'),
])
def test_a_word_that_is_neither_is_refused(argv, said, capsys):
  assert commands.exit_code(lambda overrides: None, ['command', *argv]) == 2
  message = capsys.readouterr().err
  assert said in message and len(message.splitlines()) == 1


@pytest.mark.parametrize('config, workdir', [
  ('configs/moe.py', 'runs/moe'), ('configs/moe.py:olmoe_1b_7b', 'runs/moe-olmoe_1b_7b'), ('/a/b.c.py', 'runs/b.c')])
def test_the_default_workdir_is_named_for_the_config(words, config, workdir):
  words(['command', f'--config={config}'])
  assert commands.default_workdir() == workdir


def test_a_reader_who_has_seen_enough_is_no_error():
  """As `head -c 3` is."""
  code = ("import sys; from efficient_lm import commands\n"
          "def main(overrides):\n"
          "  for _ in range(100_000): print('text', flush=True)\n"
          "sys.exit(commands.exit_code(main, ['command']))")
  writer = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert writer.stdout.read(3) == b'tex'
  writer.stdout.close()
  assert writer.wait() == 0 and writer.stderr.read() == b''
