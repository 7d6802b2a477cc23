"""A recipe of five stages on the tiny model, killed again and again: at any time, inside saves, between stages. What it
leaves is what a run leaves that nobody touched, bit for bit: ledger, notes, models, metrics."""
import itertools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from efficient_lm.runs import ledger
from tests.leaving import left, metrics

ROOT = pathlib.Path(__file__).parent.parent.parent
SMALL = ['--config.data.eval_tokens=2048', '--config.train.batch_size=4', '--config.train.sequence_length=64',
         '--config.train.checkpoint_every=2']
RECIPE = [*SMALL, '--config.train.steps=6', *(f'--config.stages[1].training.{word}' for word in (
  'steps=4', 'batch_size=4', 'sequence_length=64', 'checkpoint_every=1'))]
FAULT = 'kill -9 of a recipe of five stages: anywhere, in saves, between stages'
PATIENCE = 600   # seconds until a program counts as stuck, on a busy machine


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """start(config, workdir, words) -> the running program, in a folder in which runs/baseline is. Compiled programs are
  shared between the starts, to save time only."""
  folder = tmp_path_factory.mktemp('recipe')
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': '',
                 'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  def call(config, workdir, words):
    words = [f'--config={ROOT}/configs/{config}.py', f'--workdir={workdir}', *words]
    return subprocess.Popen([sys.executable, '-m', 'efficient_lm.main', *words], cwd=folder, env=environment,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  call.folder = folder
  finish(call('baseline', 'runs/baseline', [*SMALL, '--config.train.steps=2']))
  return call


def finish(program) -> float:
  """Seconds until the program has come to its end."""
  began = time.monotonic()
  assert program.wait(PATIENCE) == 0, program.stderr.read()
  return time.monotonic() - began


@pytest.fixture(scope='module')
def untouched(start):
  """The folder of a run that nobody touched, and the seconds that it took once everything had been compiled."""
  for name in ('first', 'untouched'): seconds = finish(start('recipe', name, RECIPE))
  return start.folder / 'untouched', seconds


def folders(workdir):
  """All, relative to `workdir`, while a program adds and removes some."""
  return [os.path.relpath(os.path.join(place, name), workdir) for place, names, _ in os.walk(workdir) for name in names]


def saves(workdir) -> int:
  """How many saves are under way: folders that Orbax has not renamed yet."""
  return sum('.orbax-checkpoint-tmp' in name for name in folders(workdir))


def commits(workdir) -> int:
  """How many stages have left something."""
  return sum(bool(re.fullmatch(r'stages/[^/.]+/\d+', name)) for name in folders(workdir))


def kill_inside_a_save(program, workdir, rng, seconds):
  """One of the next three."""
  for _ in range(rng.integers(0, 3)):
    while program.poll() is None and not saves(workdir): time.sleep(1e-4)
    while program.poll() is None and saves(workdir): time.sleep(1e-4)
  while program.poll() is None and not saves(workdir): time.sleep(1e-4)
  time.sleep(rng.uniform(0, 0.01))


def kill_between_stages(program, workdir, rng, seconds):
  """Right after a commit, before or after the ledger is written."""
  before = commits(workdir)
  while program.poll() is None and commits(workdir) <= before: time.sleep(1e-4)
  time.sleep(rng.uniform(0, 0.02))


def kill_at_any_time(program, workdir, rng, seconds):
  """Of a whole run; starting the program is part of it."""
  limit = time.monotonic() + rng.uniform(0.1, 1) * seconds
  while program.poll() is None and time.monotonic() < limit: time.sleep(1e-3)


MOMENTS = (kill_inside_a_save, kill_between_stages, kill_inside_a_save, kill_at_any_time)   # half of them in saves


def test_a_killed_recipe_leaves_what_an_untouched_one_does(start, untouched, request, tried):
  (reference, seconds), rng = untouched, np.random.default_rng(0)
  moments, killed, inside, finished = itertools.cycle(MOMENTS), 0, 0, 0
  workdir = start.folder / 'killed'
  while killed < request.config.getoption('--kills') or not finished:
    program = start('recipe', workdir, RECIPE)
    if killed < request.config.getoption('--kills'): next(moments)(program, workdir, rng, seconds)
    else: program.wait(PATIENCE)
    if program.poll() is None:
      program.send_signal(signal.SIGKILL)
      program.wait()
      killed, inside = killed + 1, inside + bool(saves(workdir))
      continue
    assert program.returncode == 0, program.stderr.read()
    assert left(workdir) == left(reference)
    assert metrics(workdir) == metrics(reference)
    assert [row.stage for row in ledger.read(workdir / 'ledger.json')] == [
      '1 train', '2 pruneonce', '3 train', '4 convert', '5 quantize']
    shutil.rmtree(workdir)
    finished += 1
  print(f'{killed} kills, {inside} of them inside saves; {finished} runs that came to their end')
  tried(FAULT, killed, **{'inside a save': inside, 'elsewhere': killed - inside,
                          'runs that came to their end, each bit for bit': finished})


def test_two_untouched_runs_leave_the_same(start, untouched):
  reference, _ = untouched
  assert left(start.folder / 'first') == left(reference) and metrics(start.folder / 'first') == metrics(reference)
