"""Signals that ask a program to end: SIGTERM (the machine is taken away), SIGINT (a person), SIGHUP (the terminal is gone).

The first one raises Preempted wherever the program is: what is on disk is whole at any moment, and the same command goes on
from there. Where a stop would lose something the program is `holding` it. There a signal is only noted; who holds asks
`received` or calls `check` between two steps, saves, and stops. A second signal ends the program at once, with 128 and its
number as the exit code: 42 would say that what was being saved has been.

Python runs a handler between two of its own instructions, and a compilation is one, minutes long. So in a program of its own
(`begin`) a thread hears signals as they come. It ends a program that holds nothing and has not stopped by itself within
PATIENCE, and one that is sent a second signal, whatever the program is doing.
"""
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

from efficient_lm.errors import Preempted

SIGNALS = tuple(getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP') if hasattr(signal, name))
PATIENCE = 3.0   # seconds that a program which holds nothing is given to stop by itself
TWICE = 0.25     # seconds within which signals are one request: `timeout` sends its own to the program and to its group
BEGUN, CAUGHT, ENDING = 'begun', 'caught', 'ending'


class _Noticed:
  """What is known of signals. alone: in a program of its own. phase: BEGUN, while nobody would catch an exception; CAUGHT;
  ENDING, once the exit code is known."""

  def __init__(self, alone: bool):
    self.alone, self.phase, self.code = alone, BEGUN if alone else CAUGHT, Preempted.exit_code
    self.received = self.heard = None   # by the handler, which may come late, and by the thread
    self.holds, self.free_since = 0, time.monotonic()
    self.lost, self.echoes = False, 0   # whether what was raised has got lost; how many signals were sent by this program
    ignored = {number for number in SIGNALS if number != signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN}
    # `nohup` ignores SIGHUP for a program. A shell ignores SIGINT for all that it starts in the background: that is no wish.
    self.previous = {number: signal.signal(number, self._handle) for number in SIGNALS if number not in ignored}

  def restore(self):
    """The handlers that there were before."""
    for number, handler in self.previous.items():
      signal.signal(number, signal.SIG_DFL if handler is None else handler)   # None: of another language, out of reach

  def line(self) -> str:
    """What is said where nothing had to be saved."""
    name = signal.Signals(self.received or self.heard).name
    return f'{name}: stopped where there was nothing to save; the same command goes on from there'

  def _handle(self, number, frame):
    if self.received is not None: return
    self.received = number
    if not self.alone: self.restore()   # a second one does what it did before
    if self.holds or self.phase == ENDING: return
    if self.phase == BEGUN: _leave(self.code, self.line())
    raise Preempted(self.line())

  def again(self, lost):
    """For `sys.unraisablehook`: what is raised in a callback, as the garbage collector has some, goes no further. So the
    thread has it raised once more, a moment later."""
    if isinstance(lost.exc_value, Preempted): self.lost = True
    else: sys.__unraisablehook__(lost)

  def watch(self, pipe: socket.socket):
    """What the thread does with the numbers of signals, which come through `pipe`."""
    while self.heard is None: self.heard = next(_numbers(pipe, None), None)
    first = self.free_since = time.monotonic()
    while True:
      again, now = next(_numbers(pipe, 0.1), None), time.monotonic()
      if again and self.echoes: again, self.echoes = None, self.echoes - 1
      if self.lost:
        number, self.received, self.lost, self.echoes = self.received, None, False, self.echoes + 1
        signal.pthread_kill(threading.main_thread().ident, number)
      if again and now - first > TWICE:
        _leave(128 + again, f'{signal.Signals(again).name}, a second signal: ended at once; what had been saved is kept')
      if not self.holds and now - self.free_since > PATIENCE: _leave(self.code, '' if self.phase == ENDING else self.line())


def _numbers(pipe: socket.socket, seconds: float | None) -> Iterator[int]:
  """Of the signals that come within so many seconds."""
  if select.select([pipe], [], [], seconds)[0]: yield from (number for number in pipe.recv(64) if number in SIGNALS)


def _leave(code: int, line: str):
  """Ends the process without another word from Python: whoever is asked to let go may hold what that would wait for."""
  if line:
    with contextlib.suppress(OSError): os.write(2, f'{line}\n'.encode())
  os._exit(code)


_now: _Noticed | None = None


def begin():
  """The first thing that a program does which is to end with 42 and not by the signal itself."""
  global _now
  _now = _Noticed(alone=True)
  ours, theirs = socket.socketpair()
  theirs.setblocking(False)
  signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)   # the thread inherits that: only the main one is to get them
  threading.Thread(target=_now.watch, args=(ours,), name='signals', daemon=True).start()
  signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
  sys.unraisablehook = _now.again
  let_through()


def keep_back():
  """Has signals wait until `let_through`, also if the program is replaced in between (`exec`)."""
  signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def let_through():
  """The inverse of `keep_back`."""
  signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def caught():
  """Inside, Preempted is caught by someone; after it, the program is ending."""
  if _now is None:
    yield
    return
  _now.phase = CAUGHT
  try: yield
  finally: _now.phase, _now.free_since = ENDING, time.monotonic()


def ends_with(code: int) -> int:
  """The exit code, once it is known: a signal that comes later does not change it. A program that was stopped does not
  return from here: libraries were left in the midst of what they did, and their own ends need not bear it."""
  if _now is None: return code
  _now.code = code
  if _now.alone and code == Preempted.exit_code:
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError, AttributeError): stream.flush()
    os._exit(code)
  return code


@contextlib.contextmanager
def noticed():
  """Has signals noticed in a program that has not begun with it: by the handlers alone, which are restored after the first
  signal. Nothing is done in a thread, which cannot have handlers."""
  global _now
  if _now is not None or threading.current_thread() is not threading.main_thread():
    yield
    return
  _now = _Noticed(alone=False)
  try: yield
  finally:
    _now.restore()
    _now = None


@contextlib.contextmanager
def holding():
  """Inside, a signal is only noted. Raises Preempted at its end for one that was."""
  if _now is None:
    yield
    return
  now = _now
  now.holds += 1
  try: yield
  finally: now.holds, now.free_since = now.holds - 1, time.monotonic()
  check()


def received() -> str | None:
  """The name of the signal that has come, if one has."""
  return None if _now is None or _now.received is None else signal.Signals(_now.received).name


def check():
  """Raises Preempted if a signal has come, in a place where it was only noted."""
  if received(): raise Preempted(_now.line())
