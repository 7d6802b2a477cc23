"""Runs whose workdir is an address: against fsspec's memory, a folder behind file://, and a file system that fails at any
moment. That of Google's buckets is what `make check-gcs` tries."""
import contextlib
import os
import random
import signal
import time
from pathlib import Path

import fsspec
import pytest

from efficient_lm.errors import CheckpointError, ConfigError, Preempted, WriteError
from efficient_lm.runs import lease, mirror
from efficient_lm.system import workdir as workdirs
from tests import starting

ADDRESS = 'memory://bucket/runs/one'
MESHES = {1: [], 2: ['--config.mesh.data=1', '--config.mesh.fsdp=2']}
OTHERS = {'owner.txt': b'mine', 'notes/a.txt': b'also mine'}   # that no run has written


@pytest.fixture(autouse=True)
def bucket(tmp_path, monkeypatch):
  """An empty one, a machine that has not seen it, and writers that need not be waited for long."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(lease, 'BEAT', 0.05)
  system = fsspec.filesystem('memory')
  system.store.clear()
  system.pseudo_dirs[:] = ['']
  return system


def here(folder) -> dict[str, bytes]:
  """Files of a folder that are copied, by their names."""
  files = [path for path in Path(folder).rglob('*') if path.is_file()]
  found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
  return {name: content for name, content in found.items() if mirror._is_copied(name)}


def another_machine(monkeypatch, path) -> mirror.Mirror:
  """That has only what is at the address, fetched."""
  path.mkdir()
  monkeypatch.chdir(path)
  made = mirror.Mirror('--workdir', ADDRESS)
  made.fetch()
  return made


def begun(files: dict[str, bytes]) -> mirror.Mirror:
  """A run with these files, copied and given back."""
  made = mirror.Mirror('--workdir', ADDRESS)
  made.fetch()
  with made.kept():
    for name, content in files.items(): workdirs.write(made.folder, name, content)
  return made


FILES = {'config.json': b'{}', 'metrics.jsonl': b'{"step": 1}\n', 'checkpoints/5/model/d/0': bytes(range(256)) * 9,
         'checkpoints/5/manifest/metadata': b'{"leaves": {}}', 'stages/1_train/begun.json': b'{}',
         'stages/1_train/5/model/x': b'y', 'tensorboard/events.1': b'e'}


def test_what_one_machine_writes_another_has(bucket, monkeypatch, tmp_path):
  left = {'checkpoints/7.orbax-checkpoint-tmp-1/d': b'torn', 'lock': b'', 'config.json.partial': b''}
  made = begun({**FILES, **OTHERS, **left})
  assert here(made.folder) == FILES
  names = {name.removeprefix('/bucket/runs/one/') for name in bucket.find('/bucket/runs/one')}
  assert names == {*FILES, mirror.INDEX}, 'under the same names, and nothing else'
  other = another_machine(monkeypatch, tmp_path / 'other')
  assert here(other.folder) == FILES


def test_what_is_gone_here_goes_there_and_elsewhere(bucket, monkeypatch, tmp_path):
  begun(FILES)
  made = mirror.Mirror('--workdir', ADDRESS)
  made.fetch()
  with made.kept():
    workdirs.remove(made.folder, 'checkpoints/5')
    workdirs.write(made.folder, 'checkpoints/9/d', b'new')
    workdirs.write(made.folder, 'metrics.jsonl', b'another')
  expected = here(made.folder)
  assert 'checkpoints/9/d' in expected and 'checkpoints/5/model/d/0' not in expected
  assert here(another_machine(monkeypatch, tmp_path / 'other').folder) == expected


def test_nothing_is_fetched_that_is_here_and_nothing_copied_that_is_there(bucket, monkeypatch):
  begun(FILES)
  moved = []
  for name in ('get_file', 'put_file', 'pipe_file'):
    def counted(*arguments, original=getattr(type(bucket), name), **words):
      moved.append(arguments[1])
      return original(*arguments, **words)
    monkeypatch.setattr(type(bucket), name, counted)
  made = mirror.Mirror('--workdir', ADDRESS)
  made.fetch()
  with made.kept(): pass
  assert {os.path.basename(path) for path in moved} == {mirror.OWNER}
  workdirs.write(made.folder, 'ledger.json', b'[]')   # a kill leaves what has not been copied: it is not lost
  again = mirror.Mirror('--workdir', ADDRESS)
  again.fetch()
  assert here(again.folder) == {**FILES, 'ledger.json': b'[]'}


def test_a_reader_has_it_while_a_run_goes_on(monkeypatch, tmp_path):
  made = mirror.Mirror('--workdir', ADDRESS)
  with made.kept():
    for name, content in FILES.items(): workdirs.write(made.folder, name, content)
    made.copy()
    other = tmp_path / 'other'
    other.mkdir()
    with contextlib.chdir(other): folder = str(other / mirror.local('--run', ADDRESS))
    assert here(folder) == FILES
  assert mirror.local('--run', 'runs/moe') == 'runs/moe' and mirror.local('--run', None) is None


class Fails(Exception): pass


@pytest.mark.parametrize('seed', range(12))
def test_a_machine_that_goes_at_any_moment_leaves_whole_steps(seed, bucket, monkeypatch, tmp_path):
  """Of steps that never change, another machine has each whole or not at all, whatever call of the library was the last one;
  of all others a state that the file has had; and the first machine loses nothing."""
  random.seed(seed)
  had, steps, left = {}, {}, [None]
  for name in ('put_file', 'pipe_file', 'rm_file'):
    def counted(*arguments, original=getattr(type(bucket), name), **words):
      if left[0] is not None: left[0] -= 1
      if left[0] is not None and left[0] < 0: raise Fails('the machine is gone')
      return original(*arguments, **words)
    monkeypatch.setattr(type(bucket), name, counted)

  def change(folder):
    name = random.choice(['metrics.jsonl', 'ledger.json', 'samples/1.txt'])
    content = random.randbytes(random.randrange(1, 50))
    workdirs.write(folder, name, content)
    had.setdefault(name, set()).add(content)
    step = str(len(steps) + 1)
    steps[step] = {f'checkpoints/{step}/{part}': random.randbytes(20) for part in ('model/d', 'rest/d', 'manifest/metadata')}
    for name, content in steps[step].items(): workdirs.write(folder, name, content)
    if len(steps) > 2 and os.path.isdir(f'{folder}/checkpoints/{len(steps) - 2}'):
      workdirs.remove(folder, f'checkpoints/{len(steps) - 2}')

  made = mirror.Mirror('--workdir', ADDRESS)
  for round in range(6):
    made.fetch()
    change(made.folder)
    left[0] = random.randrange(0, 14)
    with contextlib.suppress(Fails): made.copy()
    left[0] = None
    own = here(made.folder)
    with monkeypatch.context() as patch:
      found = here(another_machine(patch, tmp_path / f'{seed}_{round}').folder)
    for name, content in found.items():
      if not mirror.OF_STEP.match(name): assert content in had[name], name
    for step in {name.split('/')[1] for name in found if mirror.OF_STEP.match(name)}:
      whole = {name: content for name, content in found.items() if name.startswith(f'checkpoints/{step}/')}
      assert whole == steps[step], (seed, round, step)
    made = mirror.Mirror('--workdir', ADDRESS)   # the first machine, started again
    made.fetch()
    assert here(made.folder) == own
  made.copy()
  assert here(another_machine(monkeypatch, tmp_path / 'last').folder) == here(made.folder)


def test_one_who_has_been_taken_over_from_stops_and_writes_no_more(bucket, monkeypatch):
  stopped = []
  monkeypatch.setattr(mirror.os, 'kill', lambda process, number: stopped.append((process, number)))
  made = mirror.Mirror('--workdir', ADDRESS)
  with pytest.raises(ConfigError, match='taken over by another process'), made.kept():
    workdirs.write(made.folder, 'config.json', b'{}')
    mirror.Mirror('--workdir', ADDRESS)._lease._write()
    deadline = time.monotonic() + 10
    while not stopped and time.monotonic() < deadline: time.sleep(0.01)
    assert stopped == [(os.getpid(), signal.SIGTERM)]
    raise Preempted('as the signal has it')
  assert not bucket.exists('/bucket/runs/one/config.json')


def test_what_cannot_be_copied_is_tried_again_and_is_an_error_at_the_end(bucket, monkeypatch, caplog):
  monkeypatch.setattr(mirror, 'COPY_EVERY', 0.02)
  original, fails = type(bucket).pipe_file, [True]
  def piped(self, path, *arguments, **words):
    if fails[0] and not path.endswith(mirror.OWNER): raise OSError('no network')
    return original(self, path, *arguments, **words)
  monkeypatch.setattr(type(bucket), 'pipe_file', piped)
  made = mirror.Mirror('--workdir', ADDRESS)
  with pytest.raises(WriteError, match='no network; the run is whole in runs/mirrors/memory/bucket/runs/one') as raised:
    with made.kept():
      workdirs.write(made.folder, 'config.json', b'{}')
      deadline = time.monotonic() + 10
      while not caplog.records and time.monotonic() < deadline: time.sleep(0.01)
  assert '\n' not in str(raised.value) and 'it is tried again' in caplog.text
  with pytest.raises(Preempted), mirror.Mirror('--workdir', ADDRESS).kept(): raise Preempted('the first word stands')
  fails[0] = False
  with mirror.Mirror('--workdir', ADDRESS).kept(): pass   # the same command, given here, copies it
  assert bucket.cat_file('/bucket/runs/one/config.json') == b'{}'


@pytest.mark.parametrize('index', [b'', b'{', b'[]', b'{"files": 3}', b'{"files": {"a": 1}}', b'{"files": {}, "sha256": 1}'])
def test_a_damaged_index_is_one_line(index, bucket):
  begun(FILES)
  bucket.pipe_file(f'/bucket/runs/one/{mirror.INDEX}', index)
  with pytest.raises((CheckpointError, ConfigError), match=r'mirror\.json is damaged') as raised:
    mirror.Mirror('--run', ADDRESS).fetch()
  assert '\n' not in str(raised.value)


def test_what_was_copied_by_another_program_is_taken_as_it_is(bucket):
  for name, content in {**FILES, **OTHERS}.items(): bucket.pipe_file(f'/bucket/runs/one/{name}', content)
  made = mirror.Mirror('--run', ADDRESS)
  made.fetch()
  assert here(made.folder) == FILES and not (Path(made.folder) / 'owner.txt').exists()


def test_no_name_there_leads_out_of_the_folder_here(bucket, tmp_path):
  begun(FILES)
  made = mirror.Mirror('--run', ADDRESS)
  for name in ('checkpoints/../../../../../out', 'config/../../out'):
    made.system.find = lambda root, name=name: [f'{root}/{name}']
    with pytest.raises(ConfigError, match='remove that'): made.fetch()
  (Path(made.folder) / 'samples').symlink_to(tmp_path)
  bucket.pipe_file('/bucket/runs/one/samples/1', b'canary')
  os.unlink(Path(made.folder) / mirror.INDEX)
  with pytest.raises(ConfigError, match='a link'): mirror.Mirror('--run', ADDRESS).fetch()
  assert not (tmp_path / '1').exists()


@pytest.mark.parametrize('address', ['gs://', 'memory://', 'memory://bucket', 'memory://bucket/../x', 'memory://bucket//x',
                                     'memory://bucket/x?y', 'memory://bucket/*', 'nope://bucket/x', 'gs://bucket/x'])
def test_an_address_that_is_none_is_one_line(address):
  with pytest.raises(ConfigError) as raised: mirror.Mirror('--workdir', address)
  assert '\n' not in str(raised.value) and address in str(raised.value)


@pytest.mark.thinned
@pytest.mark.parametrize('processes', [1, 2])
def test_a_run_that_is_killed_goes_on_from_the_address_on_another_machine(processes, tmp_path):
  """The program itself, killed in the middle, its machine gone: with the losses of one that nobody touched."""
  config = f'--config={starting.ROOT}/tests/minute.py:quick'
  words = [config, '--config.train.checkpoint_every=3', '--config.train.steps=12', *MESHES[processes]]
  untouched, there = tmp_path / 'untouched', tmp_path / 'bucket' / 'run'
  starting.finish(starting.start(untouched, words, processes))

  def on_machine(name: str):
    (tmp_path / name).mkdir()
    return starting.start(f'file://{there}', words, processes, module='tests.runs.mirroring', cwd=tmp_path / name)
  first, deadline = on_machine('first'), time.monotonic() + starting.PATIENCE
  while not list(there.glob('checkpoints/*/_CHECKPOINT_METADATA')):
    assert time.monotonic() < deadline and first[0].poll() is None
    time.sleep(0.01)
  for program in first: program.kill()
  starting.ends(first)
  codes, out, said = starting.ends(on_machine('second'))
  assert set(codes) == {0} and 'fetched into' in out[0], said
  assert starting.logged(there) == starting.logged(untouched)
