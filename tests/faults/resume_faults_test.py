"""The whole program killed and taken up again by the same command: the losses are those of a run nobody touched."""
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.usefixtures('hears_hangup')
ROOT = pathlib.Path(__file__).parent.parent.parent
WORDS = ['--config=tests/minute.py:dense', '--config.train.checkpoint_every=4']
PATIENCE = 240   # seconds until a program that logs nothing counts as stuck, on a busy machine


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """start(workdir) -> the running program. Compiled programs are shared between the starts, to save time only."""
  compiled = tmp_path_factory.mktemp('compiled')
  environment = {**os.environ, 'XLA_FLAGS': '', 'JAX_COMPILATION_CACHE_DIR': str(compiled),
                 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  return lambda workdir, words=(), stdout=subprocess.DEVNULL, before=None: subprocess.Popen(
    [sys.executable, '-m', 'efficient_lm.main', *WORDS, f'--workdir={workdir}', *words], cwd=ROOT, env=environment,
    stdout=stdout, stderr=subprocess.PIPE, text=True, preexec_fn=before)


def rows(workdir, torn: bool = False) -> list[dict]:
  """The rows of metrics.jsonl; of a program still running the last one may be torn."""
  file = workdir / 'metrics.jsonl'
  lines = file.read_text().splitlines() if file.is_file() else []
  return [json.loads(line) for line in (lines[:-1] if torn else lines)]


def results(workdir) -> dict:
  """(step, name) -> value of all that must not depend on interruptions; losses are exact in JSON."""
  timings = ('steps_per_second', 'tokens_per_second', 'crc32')
  return {(row['step'], name): value for row in rows(workdir) for name, value in row.items() if name not in timings}


def wait_for_step(program, workdir, step: int):
  deadline = time.monotonic() + PATIENCE
  while not any(row['step'] >= step for row in rows(workdir, torn=True)):
    assert program.poll() is None, program.stderr.read()
    assert time.monotonic() < deadline, 'the program is stuck'
    time.sleep(0.01)


@pytest.fixture(scope='module')
def untouched(start, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('untouched')
  program = start(workdir)
  assert program.wait(PATIENCE) == 0, program.stderr.read()
  return results(workdir)


def test_two_runs_of_one_seed_log_identical_numbers(start, untouched, tmp_path):
  assert start(tmp_path).wait(PATIENCE) == 0
  assert results(tmp_path) == untouched


@pytest.mark.parametrize('step', [5, 14])
def test_killed_and_resumed_equals_untouched_bit_for_bit(start, untouched, tmp_path, step):
  program = start(tmp_path)
  wait_for_step(program, tmp_path, step)
  program.send_signal(signal.SIGKILL)
  program.wait()
  again = start(tmp_path)
  assert again.wait(PATIENCE) == 0, again.stderr.read()
  assert results(tmp_path) == untouched
  assert [row['step'] for row in rows(tmp_path) if 'loss' in row] == list(range(1, 25))


def test_sigterm_saves_and_exits_42_and_the_same_command_resumes(start, untouched, tmp_path):
  program = start(tmp_path)
  wait_for_step(program, tmp_path, 2)
  program.send_signal(signal.SIGTERM)
  assert program.wait(PATIENCE) == 42
  said = program.stderr.read().strip().splitlines()[-1]
  assert 'SIGTERM' in said and 'resumes' in said
  saved = max(int(path.name) for path in (tmp_path / 'checkpoints').iterdir() if path.name.isdecimal())
  assert saved == max(row['step'] for row in rows(tmp_path) if 'loss' in row)
  assert start(tmp_path).wait(PATIENCE) == 0
  assert results(tmp_path) == untouched


def test_a_signal_around_an_evaluation_and_a_reader_that_goes_away_change_nothing(start, untouched, tmp_path):
  """Step 12 is measured: the signal may come before, in the midst of it or after."""
  program = start(tmp_path)
  wait_for_step(program, tmp_path, 12)
  program.send_signal(signal.SIGHUP)
  assert program.wait(PATIENCE) == 42
  line, = program.stderr.read().splitlines()
  assert line.startswith('SIGHUP at step 1')
  again = start(tmp_path, stdout=subprocess.PIPE)
  again.stdout.readline()
  again.stdout.close()
  assert again.wait(PATIENCE) == 0 and again.stderr.read() == ''
  assert results(tmp_path) == untouched


def test_a_diverged_run_says_so_in_one_line_again_and_again(start, tmp_path):
  words = ['--config.train.optimizer.schedule.peak=1e30', '--config.train.eval_every=4']
  for _ in range(2):
    program = start(tmp_path, words=words)
    assert program.wait(PATIENCE) == 4
    line, = program.stderr.read().splitlines()
    assert 'no state was saved whose losses were better than those of a uniform guess' in line


def test_a_run_on_a_full_disk_keeps_what_it_has_and_goes_on_when_there_is_room(start, untouched, tmp_path):
  """A limit on the size of files, which that of TensorBoard reaches, and then each save, stands for the disk."""
  program = start(tmp_path, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_480, resource.RLIM_INFINITY)))
  assert program.wait(PATIENCE) == 5
  lines = [line for line in program.stderr.read().splitlines() if 'compilation cache' not in line and 'warn(' not in line]
  assert 2 <= len(lines) <= 4 and all('cannot be' in line and 'bytes free' in line for line in lines), lines
  assert re.match(r'step \d+, of ', lines[-1]) and not list((tmp_path / 'checkpoints').glob('*tmp*'))
  assert start(tmp_path).wait(PATIENCE) == 0
  assert results(tmp_path) == untouched
