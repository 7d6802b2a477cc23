"""A signal ends a program within seconds, wherever it is, with one line; what it holds is saved first."""
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from efficient_lm.errors import Preempted
from efficient_lm.system import interruption

pytestmark = pytest.mark.usefixtures('hears_hangup')
ROOT = pathlib.Path(__file__).parent.parent.parent
BEGIN = '''
import os, signal, sys, time
from efficient_lm.system import interruption
interruption.begin()
def command(main):
  """What the commands do."""
  try:
    with interruption.caught(): main()
    code = 0
  except BaseException as error:
    print(error, file=sys.stderr)
    code = getattr(error, 'exit_code', 1)
  return interruption.ends_with(code)
def ready():
  print('ready', flush=True)
def busy(seconds):
  """One instruction of Python's, which lets other threads run, as a compilation is: a handler has to wait for its end."""
  import ctypes, threading
  signal.pthread_sigmask(signal.SIG_BLOCK, interruption.SIGNALS)
  def interrupted_in_its_place():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, interruption.SIGNALS)
    time.sleep(0.2)
    ready()
    time.sleep(60)
  threading.Thread(target=interrupted_in_its_place, daemon=True).start()
  ctypes.CDLL(None).usleep(int(seconds * 1e6))
'''
QUICK = 10.0   # seconds that any of these takes to end on a busy machine, beside the patience; all would go on for a minute


def start(body: str) -> subprocess.Popen:
  program = subprocess.Popen([sys.executable, '-c', BEGIN + body], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
  assert program.stdout.readline() == 'ready\n', program.stderr.read()
  return program


def ended(program, *numbers, pause=0.0) -> tuple[int, list[str], float]:
  """Exit code, lines on standard error, and seconds that it took, of a program that was sent these signals."""
  for i, number in enumerate(numbers):
    if i: time.sleep(pause)
    program.send_signal(number)
  began = time.monotonic()
  code = program.wait(30)
  return code, program.stderr.read().splitlines(), time.monotonic() - began


@pytest.mark.parametrize('number', interruption.SIGNALS)
@pytest.mark.parametrize('body', [
  'ready(); time.sleep(60)',                                             # while it loads
  'sys.exit(command(lambda: ready() or time.sleep(60)))',                # in any stage
  'def main():\n  try: ready(); time.sleep(60)\n  except Exception: time.sleep(60)\nsys.exit(command(main))',
], ids=['begun', 'caught', 'swallowed as an error'])
def test_where_nothing_is_held_it_stops_at_once(body, number):
  code, lines, seconds = ended(start(body), number)
  assert code == 42 and seconds < QUICK
  assert lines == [f'{number.name}: stopped where there was nothing to save; the same command goes on from there']


def test_what_cannot_be_interrupted_is_ended_after_a_while():
  code, lines, seconds = ended(start('sys.exit(command(lambda: busy(60)))'), signal.SIGTERM)
  assert code == 42 and len(lines) == 1 and interruption.PATIENCE <= seconds < interruption.PATIENCE + QUICK


HELD = '''
def main():
  with interruption.holding():
    ready()
    while not interruption.received(): time.sleep(0.01)
    time.sleep({saving})
    print('saved', file=sys.stderr)
sys.exit(command(main))
'''


def test_what_is_held_is_saved_first_however_long_that_takes():
  code, (saved, line), _ = ended(start(HELD.format(saving=interruption.PATIENCE + 1)), signal.SIGTERM)
  assert (code, saved) == (42, 'saved') and line.startswith('SIGTERM: stopped')


@pytest.mark.parametrize('second', [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize('body', [HELD.format(saving=60), 'sys.exit(command(lambda: busy(60)))'])
def test_a_second_signal_ends_it_at_once(body, second):
  code, lines, seconds = ended(start(body), signal.SIGTERM, second, pause=2 * interruption.TWICE)
  assert code == 128 + second and seconds < QUICK
  assert len(lines) == 1 and lines[0].startswith(f'{second.name}, a second signal')


def test_one_request_that_is_sent_twice_is_one():
  """As `timeout` does."""
  code, lines, _ = ended(start(HELD.format(saving=0.5)), signal.SIGTERM, signal.SIGTERM)
  assert code == 42 and lines[0] == 'saved' and len(lines) == 2


def test_what_is_raised_in_a_callback_of_the_garbage_collector_is_raised_again():
  """It would be ignored there, with a traceback."""
  body = """
import gc
def collected(phase, info):
  if phase == 'start':
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(100): pass
def main():
  ready()
  gc.callbacks.append(collected)
  gc.collect()
  del gc.callbacks[:]
  time.sleep(60)
sys.exit(command(main))
"""
  program = start(body)
  code, lines, seconds = ended(program)
  assert code == 42 and len(lines) == 1 and seconds < QUICK


def test_a_signal_after_the_end_does_not_change_it():
  body = 'code = command(lambda: None)\nready()\ntime.sleep(1)\nsys.exit(code)'
  assert ended(start(body), signal.SIGTERM)[:2] == (0, [])


def test_a_program_under_nohup_does_not_hear_that_the_terminal_is_gone():
  signal_ignored = 'import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n'
  body = signal_ignored + BEGIN + 'ready()\ntime.sleep(1)\nprint("done")'
  program = subprocess.Popen([sys.executable, '-c', body], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  assert program.stdout.readline() == 'ready\n'
  program.send_signal(signal.SIGHUP)
  assert program.wait(30) == 0 and program.stdout.read() == 'done\n'


def test_a_signal_between_two_programs_of_one_process_reaches_the_second():
  """As the commands start themselves anew."""
  body = '''
interruption.keep_back()
ready()
time.sleep(0.5)
second = 'from efficient_lm.system import interruption\\ninterruption.begin()\\nprint("deaf")'
os.execv(sys.executable, [sys.executable, '-c', second])
'''
  program = start(body)
  code, lines, _ = ended(program, signal.SIGTERM)
  assert code == 42 and lines[0].startswith('SIGTERM: stopped') and 'deaf' not in program.stdout.read()


# ------------------------------------------------------------------ in a program that has not begun with it

def test_handlers_are_those_of_before_again():
  before = [signal.getsignal(number) for number in interruption.SIGNALS]
  with interruption.noticed(): assert interruption.received() is None
  assert [signal.getsignal(number) for number in interruption.SIGNALS] == before
  with pytest.raises(Preempted, match='SIGTERM'), interruption.noticed():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
  assert [signal.getsignal(number) for number in interruption.SIGNALS] == before


def test_a_hold_is_the_outermost_one_and_an_error_inside_comes_first():
  with pytest.raises(Preempted), interruption.noticed(), interruption.holding():
    with pytest.raises(Preempted), interruption.holding(): os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.received() == 'SIGTERM'
  with pytest.raises(RuntimeError), interruption.noticed(), interruption.holding():
    os.kill(os.getpid(), signal.SIGTERM)
    raise RuntimeError


def test_outside_of_it_there_is_nothing_to_notice():
  with interruption.holding(): interruption.check()
  assert interruption.received() is None


def test_in_a_thread_nothing_is_noticed():
  seen = []
  def body():
    with interruption.noticed(): seen.append(interruption.received())
  thread = threading.Thread(target=body)
  thread.start()
  thread.join()
  assert seen == [None]
