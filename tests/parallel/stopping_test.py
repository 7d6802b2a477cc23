"""A signal to one of two processes ends both with 42, a line each, wherever they are. (One of them is what `make test`
starts; the others are for `--long`.)"""
import signal
import subprocess
import sys

import pytest

from efficient_lm.parallel.stopping import LEFT, TOLD, Others
from efficient_lm.system import interruption
from tests import starting

PROGRAM = '''
import sys, time
from efficient_lm.system import interruption
interruption.begin()
from efficient_lm import commands
from efficient_lm.parallel import processes
address, number, victim, place = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]

def compiling():
  """One instruction of Python's, as a compilation is."""
  import ctypes
  ctypes.CDLL(None).sleep(100)

def meeting():
  with processes.together(): pass

def saving():
  with interruption.holding():
    print('ready', flush=True)
    while not interruption.received(): time.sleep(0.01)
    time.sleep(interruption.PATIENCE + 1)
    print('saved')

def in_parts():
  with interruption.holding():
    check = processes.checking()
    print('ready', flush=True)
    for part in range(10 ** 6):
      try: check()
      except BaseException: print(part); raise
      time.sleep(0.02 * (number + 1))

def holding(work):
  with interruption.holding(): work()

OTHERS = {'asleep': lambda: time.sleep(100), 'compiling': compiling, 'waiting': meeting, 'holding': lambda: holding(meeting)}

def main(overrides):
  processes.join(processes.Group(address, number, 2), 200)
  import jax
  jax.devices()
  meeting()
  with processes.ending_together():
    if place in ('saving', 'in parts'): (saving if place == 'saving' else in_parts)()
    print('ready', flush=True)
    if number == victim: time.sleep(100)
    else: OTHERS[place]()

interruption.let_through()
sys.exit(interruption.ends_with(commands.exit_code(main, ['main'])))
'''
PLACES = ['waiting', 'asleep', 'compiling', 'holding', 'saving', 'in parts']


def ended(place: str, victim: int, number: int = signal.SIGTERM):
  """Exit codes, what is printed after 'ready', and what is said, of two programs one of which is sent a signal."""
  address = f'127.0.0.1:{starting.free_port()}'
  programs = [subprocess.Popen([sys.executable, '-c', PROGRAM, address, str(i), str(victim), place], cwd=starting.ROOT,
                               text=True, env=starting.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
              for i in range(2)]
  for program in programs: assert 'ready\n' in iter(program.stdout.readline, ''), starting.ends(programs)   # after Gloo's
  programs[victim].send_signal(number)
  return starting.ends(programs)


@pytest.mark.thinned
@pytest.mark.parametrize('victim', [0, 1])
@pytest.mark.parametrize('place', PLACES)
def test_a_signal_to_one_ends_both_with_its_code_and_a_line(request, place, victim):
  """Process 0 has the coordinator, without which JAX aborts the others."""
  if (place, victim) != ('waiting', 0) and not request.config.getoption('--long'): pytest.skip('needs --long')
  codes, printed, said = ended(place, victim)
  assert codes == [42, 42], said
  for i, text in enumerate(said):
    line, = text.splitlines()
    assert ('another process' in line) == (i != victim) and 'goes on from there' in line, said
  if place == 'saving': assert printed == ['saved', 'saved']
  if place == 'in parts': assert printed[0] == printed[1] != ''


class Client:
  """The coordinator of one process, or one that has gone."""
  def __init__(self, gone=False): self.kept, self.gone, self.waited = {}, gone, []

  def key_value_set(self, name, text, allow_overwrite):
    if self.gone: raise RuntimeError('UNAVAILABLE')
    self.kept[name] = text

  def key_value_try_get(self, name):
    if self.gone or name not in self.kept: raise RuntimeError('NOT_FOUND')
    return self.kept[name]

  def wait_at_barrier(self, name, milliseconds):
    self.waited.append(name)
    if self.gone: raise RuntimeError('DEADLINE_EXCEEDED')


def test_what_is_told_is_heard_and_who_has_left_is_known():
  client = Client()
  one, other = Others(client, False), Others(client, False)
  assert other.told() is None and not other.left()
  one.tell(signal.SIGINT)
  assert other.told() == signal.SIGINT and not other.left()
  one.leave()
  assert other.left() and len(client.waited) == 1 and set(client.kept) == {TOLD, LEFT}


def test_a_coordinator_that_has_gone_is_of_no_use_and_no_error():
  others = Others(Client(gone=True), False)
  others.tell(signal.SIGTERM), others.leave()
  assert others.told() is None and not others.left()


def test_nothing_is_shared_by_a_program_that_has_not_begun_with_it():
  interruption.share(Others(Client(), False))
  assert interruption.received() is None
