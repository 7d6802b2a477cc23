"""A disk that fills up at any moment of a run: it ends in one line with what it has, or goes on without what it can do
without; and once there is room the same command leaves what a run leaves that never saw a full disk, bit for bit.

Full is a small file system of memory, which only root can mount (with `--long`); everywhere a limit on the size of
files, at the same moments, does without that.
"""
import collections
import contextlib
import dataclasses
import os
import resource
import shutil
import subprocess
import sys

import pytest

from efficient_lm.config import experiment
from efficient_lm.errors import WriteError
from efficient_lm.runs import commits, report_page, run, tracking, writing
from efficient_lm.runs.checkpoint import Checkpoints
from efficient_lm.system import output
from efficient_lm.techniques import PruneOnce
from tests import minute
from tests.leaving import left, metrics

SIZE, INODES = 8 << 20, 600   # of the file system: a run takes a quarter of either
FAULT = 'disk full, no inodes, a limit on file size, at five moments each'
# The function with whose call each moment begins, and which call of it that is.
MOMENTS = {'the start': (run.Run, 'write_beginning', 1), 'logging': (tracking.Tracker, 'scalars', 3),
           'the first save': (Checkpoints, 'save', 1), 'a commit': (commits, 'commit', 2),
           'the report': (report_page, 'write_report', 1)}


pytestmark = pytest.mark.usefixtures('one_device', 'quick_compilation')


def perform(workdir):
  """What the command does with a config of two stages."""
  quick = minute.get_config('quick')
  made = dataclasses.replace(quick, train=dataclasses.replace(quick.train, steps=4), stages=(PruneOnce(sparsity=0.5),))
  experiment.validate(made, str(workdir))
  experiment.refuse_other(str(workdir), made)
  run.run(made, made, workdir)


@pytest.fixture(scope='module')
def untouched(tmp_path_factory):
  folder = tmp_path_factory.mktemp('untouched')
  perform(folder)
  return left(folder), metrics(folder)


@pytest.fixture
def disk(tmp_path, request):
  """The folder of a small file system, which is gone afterwards."""
  if not request.config.getoption('--long'): pytest.skip('needs --long')
  folder = tmp_path / 'disk'
  folder.mkdir()
  words = ['mount', '-t', 'tmpfs', '-o', f'size={SIZE},nr_inodes={INODES}', 'tmpfs', str(folder)]
  try: subprocess.run(words, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError): pytest.skip('needs the right to mount a file system')
  yield folder
  subprocess.run(['umount', '-l', str(folder)], check=True)


@contextlib.contextmanager
def no_bytes(folder):
  """All room of the file system taken by one file."""
  with open(folder / 'ballast', 'wb', buffering=0) as file, contextlib.suppress(OSError):
    for size in (1 << 16, 1 << 12):
      with contextlib.suppress(OSError):
        while True: file.write(bytes(size))
  yield
  (folder / 'ballast').unlink()


@contextlib.contextmanager
def no_inodes(folder):
  """As many empty files as there can be."""
  (folder / 'many').mkdir()
  with contextlib.suppress(OSError):
    for i in range(INODES): (folder / 'many' / str(i)).touch()
  yield
  shutil.rmtree(folder / 'many')


@contextlib.contextmanager
def short_files(folder):
  """No file may grow beyond a kilobyte."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
  try: yield
  finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


FULL = {'bytes': no_bytes, 'inodes': no_inodes, 'limit': short_files}


@contextlib.contextmanager
def from_moment_on(moment: str, fault, folder):
  """Inside, the fault begins with that moment; afterwards it is over."""
  owner, name, which = MOMENTS[moment]
  original, calls = getattr(owner, name), []
  with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as begun:
    def called(*arguments, **words):
      calls.append(name)
      if len(calls) == which: begun.enter_context(fault(folder))
      return original(*arguments, **words)
    patch.setattr(owner, name, called)
    yield
  assert len(calls) >= which, f'{moment} was not reached'


def full_at(moment: str, fault, folder, caplog) -> str:
  """What came of a run on a disk that is full from a moment on: 'stopped', or 'went on' without what it can do without."""
  workdir = folder / 'run'
  writing._said.clear()
  caplog.clear()
  with from_moment_on(moment, fault, folder):
    try: perform(workdir)
    except WriteError as error: came, said = 'stopped', [str(error)]
    else: came, said = 'went on', [line.getMessage() for line in caplog.records if line.name.startswith('efficient_lm')]
  assert said, 'either way it is said'
  for line in said: assert '\n' not in line and str(workdir) in line and 'bytes free' in line, line
  return came


def check(fault: str, moments, folder, untouched, caplog) -> collections.Counter:
  """Of each moment in turn what came of it; each time the same command then leaves what an untouched run does."""
  came = collections.Counter()
  for moment in moments:
    came[full_at(moment, FULL[fault], folder, caplog)] += 1
    perform(folder / 'run')
    assert left(folder / 'run') == untouched[0], (fault, moment)
    # A row that could not be written while the run went on is missing; none is another.
    rows = metrics(folder / 'run')
    assert all(row in untouched[1] for row in rows) and (rows == untouched[1] or moment in ('logging', 'the start')), moment
    # What threads of Orbax still made when another one had failed is no step, and the next save has removed it.
    assert not list((folder / 'run').rglob('*.orbax-checkpoint-tmp*')), moment
    shutil.rmtree(folder / 'run')
  return came


def recorded(tried, came: collections.Counter):
  tried(FAULT, sum(came.values()), **{
    'stopped in one line and was resumed': came['stopped'], 'went on without what it can do without': came['went on']})


@pytest.mark.parametrize('fault', ['bytes', 'inodes'])
def test_a_full_disk_loses_nothing(fault, disk, untouched, caplog, tried):
  recorded(tried, check(fault, list(MOMENTS), disk, untouched, caplog))


def test_a_limit_on_the_size_of_files_loses_nothing(tmp_path, untouched, caplog, request, tried, monkeypatch):
  for name in ('stdout', 'stderr'): monkeypatch.setattr(sys, name, getattr(sys, name))
  output.outlive()   # as the program does: what it prints goes to a file, too
  moments = list(MOMENTS) if request.config.getoption('--long') else ['a commit']
  recorded(tried, check('limit', moments, tmp_path, untouched, caplog))


def test_the_small_file_system_has_room_for_a_run(disk, untouched):
  """Else what is above would be tried from the beginning on."""
  perform(disk / 'run')
  assert (left(disk / 'run'), metrics(disk / 'run')) == untouched
  found = os.statvfs(disk)
  assert found.f_bavail > found.f_blocks / 2 and found.f_favail > found.f_files / 2
