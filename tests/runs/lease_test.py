"""Who may write to an address, in fsspec's memory."""
import json
import threading
import time

import fsspec
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.runs import lease

PATH = '/bucket/run/owner'


@pytest.fixture(autouse=True)
def system(monkeypatch):
  """An empty one, with writers that need not be waited for long."""
  monkeypatch.setattr(lease, 'BEAT', 0.05)
  found = fsspec.filesystem('memory')
  found.store.clear()
  return found


def one(system) -> lease.Lease:
  return lease.Lease(system, PATH, '--workdir', 'memory://bucket/run')


def test_one_who_writes_is_not_disturbed(system):
  own, ended = one(system), threading.Event()
  own.claim()
  def lives():
    while not ended.wait(lease.BEAT): own.renew()
  living = threading.Thread(target=lives)
  living.start()
  with pytest.raises(ConfigError, match=r'--workdir = .*another process writes there \(host .*, process \d+\); wait'):
    one(system).claim()
  ended.set()
  living.join()
  own.check()


def test_what_was_given_back_is_there_at_once_and_one_who_has_gone_is_waited_for_briefly(system, caplog):
  first, second, third = one(system), one(system), one(system)
  first.claim()
  first.give_back()
  second.claim()
  assert not caplog.records
  began = time.monotonic()
  third.claim()   # the second one says no more, as a machine that was taken away
  assert time.monotonic() - began >= lease.SILENCE * lease.BEAT and 'was not given back by host' in caplog.text


def test_one_who_was_taken_over_from_hears_of_it_before_it_writes(system):
  first, second = one(system), one(system)
  first.claim()
  second.claim()
  written = system.cat_file(PATH)
  for call in (first.check, first.renew, first.give_back):
    with pytest.raises(ConfigError, match='was taken over by another process') as raised: call()
    assert '\n' not in str(raised.value)
  assert system.cat_file(PATH) == written
  second.renew()


@pytest.mark.parametrize('content', [b'', b'{', b'3', b'[]', b'\xff', b'{"host": 5}'])
def test_what_is_no_lease_hinders_nobody_for_long(content, system):
  system.pipe_file(PATH, content)
  own = one(system)
  own.claim()
  assert json.loads(system.cat_file(PATH))['beats'] == 1
  system.rm_file(PATH)   # somebody has tidied up
  own.renew()
  own.give_back()


def test_whatever_stands_there_is_said_in_a_line(system, caplog):
  system.pipe_file(PATH, json.dumps({'host': 'a\n\x1b[2J' * 99, 'process': ['\n'] * 99}).encode())
  one(system).claim()
  assert 'was not given back by host' in caplog.text
  assert all(record.getMessage().isprintable() and len(record.getMessage()) < 300 for record in caplog.records)
