"""Two real processes on the loopback train as one: the same losses, one end, one resume. (More of them: `tests/faults`.)"""
import signal
import subprocess
import sys

import pytest

from efficient_lm.runs import ledger
from tests import starting

STEPS = 120
WORDS = ['--config=tests/minute.py:quick', f'--config.train.steps={STEPS}', '--config.train.checkpoint_every=50',
         f'--config.train.eval_every={STEPS}']

# What `python -m efficient_lm.main` does, and at its end the sockets that it has or had of the internet.
WATCHED = '''
import os, pathlib, sys
opened = []
sys.addaudithook(lambda event, words: event in ('socket.bind', 'socket.connect') and opened.append(event))
from efficient_lm import commands, main
code = commands.exit_code(main.main, sys.argv)
numbers = {line.split()[9] for name in ('tcp', 'tcp6', 'udp', 'udp6')
           for line in pathlib.Path('/proc/self/net', name).read_text().splitlines()[1:]}
links = [os.readlink(f'/proc/self/fd/{number}') for number in os.listdir('/proc/self/fd')
         if os.path.exists(f'/proc/self/fd/{number}')]
print([link for link in links if link.removeprefix('socket:[').rstrip(']') in numbers], opened, file=sys.stderr)
sys.exit(code)
'''


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """The workdir of one process, which nobody touched."""
  workdir = tmp_path_factory.mktemp('alone')
  program = subprocess.run([sys.executable, '-c', WATCHED, *WORDS, f'--workdir={workdir}'], cwd=starting.ROOT, text=True,
                           capture_output=True, timeout=starting.PATIENCE, check=False,
                           env=starting.environment())
  assert program.returncode == 0, program.stderr
  return workdir, program.stderr


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
  """The workdir of two processes, of which the second was sent SIGTERM, and how they ended."""
  workdir = tmp_path_factory.mktemp('two')
  programs = starting.start(workdir, WORDS, processes=2)
  starting.wait_for_step(programs, workdir, 20)
  programs[1].send_signal(signal.SIGTERM)
  return workdir, *starting.ends(programs)


@pytest.mark.fault('sockets of the internet opened by a training', 'none')
def test_one_process_opens_no_socket(alone):
  assert alone[1].splitlines()[-1] == '[] []'


def test_an_interruption_of_one_ends_both_at_one_step_and_the_state_is_saved(interrupted):
  workdir, codes, printed, said = interrupted
  assert codes == [42, 42], said
  last = max(row['step'] for row in starting.rows(workdir))
  assert starting.saved(workdir)[-1] == last < STEPS
  for line, what in zip(said, ('another process', 'SIGTERM')): assert what in line and f'at step {last}:' in line, said
  assert not any('not equal' in line for line in said), 'copies of parameters are compared, and equal'
  assert '2 processes' in printed[0] and not printed[1].strip(), 'the first one alone speaks'


def test_one_process_takes_up_what_two_began_with_the_losses_of_one(alone, interrupted):
  workdir = interrupted[0]
  starting.finish(starting.start(workdir, WORDS, devices=2))   # over another mesh, too
  found, expected = starting.logged(workdir), starting.logged(alone[0])
  assert found.keys() == expected.keys()
  hashes = [key for key in expected if key[1] == 'eval/parameters_hash']   # of sums that were made in another order
  assert hashes == [(STEPS, 'eval/parameters_hash')]
  for key in expected.keys() - hashes: assert found[key] == pytest.approx(expected[key], abs=1e-5, rel=1e-5), key
  rows = ledger.read(workdir / 'ledger.json')
  assert [row.stage for row in rows] == ['1 train'] and rows[0].effort.steps < STEPS
