"""SIGTERM in each phase of a run, to the only process or to one of two: all end within seconds, in a line each, and the same
command then leaves what a run leaves that nobody touched. Minutes: only with `--long`."""
import signal
import time

import pytest

from efficient_lm.errors import OtherProcess, Preempted
from tests import starting
from tests.faults.interrupting import PHASES
from tests.leaving import left, metrics

FAULT = 'SIGTERM in import, compiling, a step, an evaluation, a save, a stage, the report'
CONFIG = '''
import dataclasses
from efficient_lm.techniques import PruneOnce
from tests import minute

def get_config():
  quick = minute.get_config('quick')
  train = dataclasses.replace(quick.train, steps=6, eval_every=3)
  return dataclasses.replace(quick, train=train, stages=(PruneOnce(sparsity=0.5),))
'''
# Seconds from a signal to the end of all: the patience of a program, a step and a save, and what a busy machine adds.
ENDING = 60
TWO = ['--config.mesh.data=1', '--config.mesh.fsdp=2']
IN_TRAINING = ('step', 'evaluation', 'save')   # the state is saved then, and all processes know


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  """words(processes): those of the command."""
  file = tmp_path_factory.mktemp('config') / 'stages.py'
  file.write_text(CONFIG)
  return lambda processes: [f'--config={file}', *(TWO if processes == 2 else [])]


@pytest.fixture(scope='module')
def untouched(words, tmp_path_factory):
  """untouched(processes): what so many leave that nobody touches."""
  found = {}
  def of(processes):
    if processes not in found:
      workdir = tmp_path_factory.mktemp('untouched')
      starting.finish(starting.start(workdir, words(processes), processes))
      found[processes] = left(workdir), metrics(workdir)
    return found[processes]
  return of


def interrupted(workdir, words, processes: int, phase: str, note) -> str:
  """Starts so many, of which one sends itself SIGTERM in that phase: the last, or the first where only that comes to it.
  Returns whether a state was 'saved', or there was 'nothing to save'."""
  victim = 0 if phase == 'report' else processes - 1
  programs = starting.start(workdir, words, processes, module='tests.faults.interrupting',
                            variables={victim: {'FAULT_PHASE': phase, 'FAULT_NOTE': str(note)}})
  codes, _, said = starting.ends(programs)
  assert time.time() - float(note.read_text()) < ENDING
  assert codes[victim] == Preempted.exit_code, (codes, said)
  if phase in IN_TRAINING: assert set(codes) == {Preempted.exit_code}, (codes, said)
  # Who is asked to stop alone may leave the others in the midst of what they do together.
  assert set(codes) <= {Preempted.exit_code, OtherProcess.exit_code, -signal.SIGABRT}, (codes, said)
  line, = said[victim].splitlines()
  assert line.startswith('SIGTERM'), said
  return 'saved' if ': saved' in line else 'nothing to save'


@pytest.mark.parametrize('phase', PHASES)
@pytest.mark.parametrize('processes', [1, 2])
def test_a_signal_in_any_phase_ends_all_and_the_same_command_goes_on(words, untouched, tmp_path, processes, phase, request,
                                                                     tried):
  if not request.config.getoption('--long'): pytest.skip('needs --long')
  workdir = tmp_path / 'run'
  came = interrupted(workdir, words(processes), processes, phase, tmp_path / 'note')
  if phase in IN_TRAINING: assert came == 'saved' and starting.saved(workdir)
  starting.finish(starting.start(workdir, words(processes), processes))
  assert (left(workdir), metrics(workdir)) == untouched(processes)
  tried(FAULT, 1, **{f'{came}, resumed bit for bit': 1})
