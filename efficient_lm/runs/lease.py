"""Who writes to an address: a file there that its writer renews as long as it lives.

A bucket has no lock that goes with its process, and clocks of machines differ. So nobody compares times: who comes looks
whether the file changes. While it does, it is refused; one at rest was left by a machine that is gone, and is taken over;
and who has been taken over from hears so before it writes again. (Two that come at one moment may both write theirs: the
second one stays, and the first one hears of it.)
"""
import json
import logging
import os
import secrets
import socket
import time

from efficient_lm.errors import ConfigError
from efficient_lm.system import interruption

log = logging.getLogger(__name__)
BEAT = 15.0   # seconds after which a writer shows that it lives
SILENCE = 4   # beats without which it has gone


class Lease:
  """The file `path` of `system` (fsspec's). `field`, `address`: what a ConfigError names."""

  def __init__(self, system, path: str, field: str, address: str):
    self.system, self.path, self.field, self.address = system, path, field, address
    self._own = {'host': socket.gethostname(), 'process': os.getpid(), 'token': secrets.token_hex(8), 'beats': 0}

  def claim(self):
    """Returns when nobody else writes. Raises ConfigError while another process does."""
    first = seen = self._read()
    deadline = time.monotonic() + SILENCE * BEAT
    if first: log.warning('%s was not given back by %s: waiting %.0f seconds for a sign that it still writes', self.address,
                          _name(first), SILENCE * BEAT)
    while seen and seen == first and time.monotonic() < deadline:
      interruption.check()
      time.sleep(min(1.0, BEAT))
      seen = self._read()
    if seen and seen != first:
      raise ConfigError(self.field, self.address, f'another process writes there ({_name(seen)}); wait or take another')
    self._write()

  def renew(self):
    """Shows that this process lives. Raises ConfigError as `check` does."""
    self.check()
    self._write()

  def check(self):
    """Raises ConfigError where another process has taken over."""
    found = self._read()
    if found is None or found.get('token') == self._own['token']: return
    raise ConfigError(self.field, self.address, f'was taken over by another process ({_name(found)}): this one writes there '
                      'no more')

  def give_back(self):
    """Lets others in at once."""
    self.check()
    self.system.rm_file(self.path)

  def _read(self) -> dict | None:
    try: found = json.loads(self.system.cat_file(self.path))
    except (FileNotFoundError, ValueError): return None
    return found if isinstance(found, dict) else None

  def _write(self):
    self._own['beats'] += 1
    self.system.pipe_file(self.path, json.dumps(self._own).encode())


def _name(owner: dict) -> str:   # in one line, whatever has been written there
  return f'host {owner.get("host")!a:.80}, process {owner.get("process")!a:.20}'
