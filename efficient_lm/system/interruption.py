"""Signals that ask a program to end: SIGTERM (the machine is taken away), SIGINT (a person), SIGHUP (the terminal is gone).

The first one raises Preempted wherever the program is: what is on disk is whole at any moment, and the same command goes on
from there. Where a stop would lose something the program is `holding` it. There a signal is only noted; who holds asks
`received` or calls `check` between two steps, saves, and stops. A second signal ends the program at once, with 128 and its
number as the exit code: 42 would say that what was being saved has been.

Python runs a handler between two of its own instructions, and a compilation is one, minutes long. So in a program of its own
(`begin`) a thread hears signals as they come. It ends a program that holds nothing and has not stopped by itself within
PATIENCE, and one that is sent a second signal, whatever the program is doing.

Of several processes none can go on without the others. Where they `share` their signals, one that is sent to any of them is
to the others as if it had been sent to them: those that hold nothing stop, those that hold something agree where (see
`parallel.processes.Agreement`), and they leave together. Whoever holds something that needs a process which has left can
save it no more, and leaves after ALONE seconds.
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
ALONE = 5.0      # seconds that one which holds something goes on after another process has left
POLL = 1.0       # seconds after which a process asks what the others were sent
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
    # Processes that share their signals; whether one of them was sent it; whether this one leaves with them.
    self.others, self.is_told, self.leaves = None, False, False
    self.wake, self.asked, self.alone_since = None, 0.0, None   # a file that wakes the thread; when it asked; one had left
    ignored = {number for number in SIGNALS if number != signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN}
    # `nohup` ignores SIGHUP for a program. A shell ignores SIGINT for all that it starts in the background: that is no wish.
    self.previous = {number: signal.signal(number, self._handle) for number in SIGNALS if number not in ignored}

  def restore(self):
    """The handlers that there were before."""
    for number, handler in self.previous.items():
      signal.signal(number, signal.SIG_DFL if handler is None else handler)   # None: of another language, out of reach

  def line(self) -> str:
    """What is said where nothing had to be saved."""
    return f'{self.name()}: stopped where there was nothing to save; the same command goes on from there'

  def name(self) -> str:
    """Of the signal that has come."""
    return signal.Signals(self.received or self.heard).name + ' to another process' * self.is_told

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
    while self.heard is None: self.heard = next(_numbers(pipe, POLL if self._asks() else None), None)
    first = self.free_since = time.monotonic()
    if self.others and not self.is_told: self.others.tell(self.heard)
    may_come = self.is_told   # a scheduler sends its signal to all processes, one after the other
    while True:
      again, now = next(_numbers(pipe, 0.1), None), time.monotonic()
      if again and self.echoes: again, self.echoes = None, self.echoes - 1
      if again and may_come: again, may_come, first = None, False, now
      if self.lost:
        number, self.received, self.lost, self.echoes = self.received, None, False, self.echoes + 1
        signal.pthread_kill(threading.main_thread().ident, number)
      if again and now - first > TWICE:
        _leave(128 + again, f'{signal.Signals(again).name}, a second signal: ended at once; what had been saved is kept')
      is_free = not self.holds and now - self.free_since > PATIENCE
      if not self.leaves and (is_free or self._is_alone(now)): _leave(self.code, '' if self.phase == ENDING else self.line())

  def _asks(self) -> bool:
    """Whether there are others to ask; what one of them was sent is sent to this process, for the handler and the thread."""
    if self.others is None or self.phase == ENDING: return False
    if number := self.others.told():
      self.is_told = True
      signal.pthread_kill(threading.main_thread().ident, number if number in self.previous else signal.SIGTERM)
      return False
    return True

  def _is_alone(self, now: float) -> bool:
    """Whether this process holds what another one that has left will never help to save."""
    if self.others is None or not self.holds or now - self.asked < POLL: return False
    self.asked = now
    if self.alone_since is None and self.others.left(): self.alone_since = now
    return self.alone_since is not None and now - self.alone_since > ALONE


def _numbers(pipe: socket.socket, seconds: float | None) -> Iterator[int]:
  """Of the signals that come within so many seconds."""
  if select.select([pipe], [], [], seconds)[0]: yield from (number for number in pipe.recv(64) if number in SIGNALS)


def _leave(code: int, line: str):
  """Ends the process without another word from Python: whoever is asked to let go may hold what that would wait for."""
  if line:
    with contextlib.suppress(OSError): os.write(2, f'{line}\n'.encode())
  if code != Preempted.exit_code or _now is None or _now.others is None: os._exit(code)
  threading.Thread(target=leave, args=(code,), daemon=True).start()   # the thread goes on to hear signals
  while not _now.leaves: time.sleep(0.01)


_now: _Noticed | None = None


def begin():
  """The first thing that a program does which is to end with 42 and not by the signal itself."""
  global _now
  _now = _Noticed(alone=True)
  ours, theirs = socket.socketpair()
  theirs.setblocking(False)
  _now.wake = theirs.fileno()
  signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)   # the thread inherits that: only the main one is to get them
  threading.Thread(target=_now.watch, args=(ours,), name='signals', daemon=True).start()
  signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
  sys.unraisablehook = _now.again
  let_through()


def share(others):
  """Has a signal to one of several processes be heard by all. others: `parallel.stopping.Others`. For a program that has
  begun with `begin`."""
  if _now is None or _now.wake is None: return
  _now.others = others
  os.write(_now.wake, b'\0')   # the thread waits for signals


def leave(code: int):
  """Ends the process at once; of several that share a signal, when all of them do. Whoever went first would end the others
  with an error of their own."""
  if code == Preempted.exit_code and _now is not None and _now.others is not None:
    wait_if_leaving()
    _now.leaves = True
    _now.others.leave()
  os._exit(code)


def wait_if_leaving():
  """Does not return where another thread has said its line and is about to end the process."""
  if _now is not None and _now.leaves: threading.Event().wait()


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
  finally:
    wait_if_leaving()
    _now.phase, _now.free_since = ENDING, time.monotonic()


def ends_with(code: int) -> int:
  """The exit code, once it is known: a signal that comes later does not change it. A program that was stopped does not
  return from here: libraries were left in the midst of what they did, and their own ends need not bear it."""
  if _now is None: return code
  _now.code = code
  if _now.alone and code == Preempted.exit_code:
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError, AttributeError): stream.flush()
    leave(code)
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
  return None if _now is None or _now.received is None else _now.name()


def said() -> str | None:
  """The line about it, where nothing had to be saved."""
  return _now.line() if received() else None


def check():
  """Raises Preempted if a signal has come, in a place where it was only noted."""
  if received(): raise Preempted(said())
