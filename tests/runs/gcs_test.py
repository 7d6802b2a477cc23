"""A run at gs://, against an emulator of Google's buckets: only where `make check-gcs` has installed it."""
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests import starting

pytest.importorskip('gcsfs', reason='needs gcsfs: make check-gcs')
pytest.importorskip('gcp_storage_emulator', reason='needs gcp-storage-emulator: make check-gcs')
WORDS = [f'--config={starting.ROOT}/tests/minute.py:quick', '--config.train.checkpoint_every=3', '--config.train.steps=12']


@pytest.fixture
def buckets(monkeypatch):
  """A server of buckets on the loopback, with one called mine. Its address is in the environment, as gcsfs takes it."""
  port = starting.free_port()
  words = [f'--port={port}', '--host=127.0.0.1', '--in-memory', '--default-bucket=mine']
  command = Path(sys.executable).parent / 'gcp-storage-emulator'
  server = subprocess.Popen([command, 'start', *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  monkeypatch.setenv('STORAGE_EMULATOR_HOST', f'http://127.0.0.1:{port}')
  monkeypatch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')   # asks for a login
  deadline = time.monotonic() + 60
  while not answers(port): assert time.monotonic() < deadline and server.poll() is None
  yield
  server.kill()
  server.wait()


def answers(port: int) -> bool:
  time.sleep(0.1)
  try: return bool(urllib.request.urlopen(f'http://127.0.0.1:{port}/storage/v1/b/mine/o'))
  except (urllib.error.URLError, ConnectionError): return False


def names(prefix: str) -> set[str]:
  """Of what lies in the bucket."""
  url = f'{os.environ["STORAGE_EMULATOR_HOST"]}/storage/v1/b/mine/o?prefix={prefix}'
  with urllib.request.urlopen(url) as answer: return {one['name'] for one in json.load(answer).get('items', [])}


def test_a_run_whose_machine_is_gone_goes_on_from_the_bucket(buckets, tmp_path):
  untouched = tmp_path / 'untouched'
  starting.finish(starting.start(untouched, WORDS))

  def on_machine(name: str, module: str = 'tests.runs.mirroring', words=WORDS):
    (tmp_path / name).mkdir()
    return starting.start('gs://mine/runs/one', words, module=module, cwd=tmp_path / name)
  first, deadline = on_machine('first'), time.monotonic() + starting.PATIENCE
  while not any(name.endswith('/_CHECKPOINT_METADATA') for name in names('runs/one/checkpoints')):
    assert time.monotonic() < deadline and first[0].poll() is None
  first[0].kill()
  starting.ends(first)
  codes, out, said = starting.ends(on_machine('second'))
  assert codes == [0] and 'fetched into' in out[0], said
  second = tmp_path / 'second' / 'runs' / 'mirrors' / 'gs' / 'mine' / 'runs' / 'one'
  assert starting.logged(second) == starting.logged(untouched)
  codes, out, said = starting.ends(on_machine('third', 'efficient_lm.main'))
  assert codes == [0] and 'all of them done' in out[0], said
  assert starting.logged(tmp_path / 'third' / second.relative_to(tmp_path / 'second')) == starting.logged(untouched)
