"""Whatever happens to a file of a finished run: what reads the run tells of it in a line, or finds what was there before."""
import collections
import contextlib
import dataclasses
import itertools
import logging
import os
import shutil

import jax
import numpy as np
import pytest

from efficient_lm.config import experiment
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.formats import Int
from efficient_lm.runs import FromRun, monitor, results, run
from efficient_lm.techniques import Quantize, Rule
from tests import minute

# Orbax drops the tasks that read the other arrays when one is unreadable; only pytest makes something of it.
pytestmark = [pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning'),
              pytest.mark.filterwarnings('ignore:coroutine')]
STAGES = (Quantize(rules=(Rule(weights=Int()),)),)
MANY = 200   # flipped bits of each file that is read, with --long


def made():
  quick = minute.get_config('quick')
  return dataclasses.replace(quick, train=dataclasses.replace(quick.train, steps=2), stages=STAGES)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """The folder of a run of two stages that has come to its end, to be copied."""
  folder = tmp_path_factory.mktemp('finished') / 'run'
  run.run(made(), made(), folder)
  return folder


@pytest.fixture
def folder(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / 'run')


# ------------------------------------------------------------------ what reads a run

def generate(folder):
  """All that the command loads of a run: tokenizer and model; so does `evaluate`."""
  experiment.read(str(folder))
  source = FromRun(path=str(folder))
  leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(source.load())]
  return source.spec(), source.tokenizer().key, source.key(), leaves


def report(folder):
  """All that a report shows."""
  return results.load(folder)


def resume(folder):
  """The stages that the same command would perform."""
  experiment.validate(made(), str(folder))
  experiment.refuse_other(str(folder), made())
  taken_up = run.Run(made(), made(), folder)
  return [step.planned for step in taken_up.pending()], taken_up.record, taken_up.corpus.tokenizer.key


READERS = (generate, report, resume)


def outcome(reader, folder, caplog):
  """What the reader finds, and the lines that it says of damage."""
  caplog.clear()
  with caplog.at_level(logging.WARNING):
    try: found = reader(folder)
    except (ConfigError, CheckpointError) as error: found, said = None, [str(error)]
    else: said = []
  return found, said + [line.getMessage() for line in caplog.records if line.name.startswith('efficient_lm')]


def check(folder, file, expected, caplog) -> dict[str, str]:
  """Of each reader whether it noticed what has happened to a file, or found what was there before; one of both is so."""
  came = {}
  for reader in READERS:
    found, said = outcome(reader, folder, caplog)
    for line in said: assert '\n' not in line and len(line) < 600, line
    names = [file.name, *(str(parent) for parent in file.parents if folder in parent.parents)]
    told = [line for line in said if any(name in line for name in names)]
    assert told or (found == expected[reader] and not said), f'{reader.__name__} after damage to {file}: {said}'
    if reader is report and found is not None: check_shown(found, expected[report], folder)
    came[reader.__name__] = 'noticed' if told else 'equal'
  return came


def check_shown(found, before, folder):
  """What a report shows of a damaged run, beside its warnings, is true: it may lack something, and changes nothing. Where
  the record of the last stage is damaged, the newest file of samples stands for its sample."""
  assert found.rows == before.rows and found.config in (before.config, {})
  assert found.sample in (before.sample, '', *(path.read_text('utf-8', 'replace') for path in folder.glob('samples/*.txt')))
  assert all(row in before.metrics for row in found.metrics) and found.weights.items() <= before.weights.items()


@pytest.fixture
def expected(folder, caplog):
  """What each reader finds in the untouched folder, of which it has nothing to say."""
  found = {reader: outcome(reader, folder, caplog) for reader in READERS}
  assert [said for _, said in found.values()] == [[], [], []]
  return {reader: value for reader, (value, _) in found.items()}


# ------------------------------------------------------------------ kills

@pytest.mark.thinned
@pytest.mark.parametrize('begun', [False, True], ids=['a new run', 'a finished run'])
def test_a_kill_between_any_two_files_that_a_run_begins_with_leaves_a_run(folder, expected, begun, caplog, monkeypatch):
  class Killed(Exception): pass
  original, moments = os.replace, 0
  for moment in itertools.count():
    if not begun: shutil.rmtree(folder)
    taken_up, count = run.Run(made(), made(), folder), itertools.count()
    def counted(*arguments, moment=moment, count=count):
      if next(count) == moment: raise Killed
      return original(*arguments)
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
      patch.setattr(os, 'replace', counted)
      taken_up.write_beginning()
      break
    moments += 1
    for reader in READERS if begun else ():
      assert outcome(reader, folder, caplog) == (expected[reader], []), (moment, reader)
    assert outcome(resume, folder, caplog)[1] == [], 'the same command goes on'
  assert moments == 2 + (not begun), 'config.json, run.json, and the tokenizer where there is none'


# ------------------------------------------------------------------ links, and the lock

@pytest.mark.fault('links in the folder of a run, and a canary outside', 'refused, the canary as it was')
@pytest.mark.parametrize('name', ['samples/00000002.txt', 'checkpoints', 'stages/1_train', 'metrics.jsonl', 'tensorboard'])
def test_a_finished_run_with_a_link_in_it_is_read_but_not_taken_up(folder, tmp_path, expected, name, caplog):
  """Here what the link leads to is what was there before; the canary is that this stays."""
  (folder / name).rename(tmp_path / 'outside')
  (folder / name).symlink_to(tmp_path / 'outside')
  contents = lambda: {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
  before = contents()
  for reader in (generate, report): assert outcome(reader, folder, caplog) == (expected[reader], [])
  for take_up in (resume, lambda folder: run.Run(made(), made(), folder)):
    with pytest.raises(ConfigError, match='is a link') as caught: take_up(folder)
    assert caught.value.value == str(folder / name)
  assert contents() == before


def test_a_run_whose_lock_is_deleted_stops_before_its_next_write(tmp_path, monkeypatch):
  """TensorBoard's own file, which only this run writes, is closed."""
  folder, original, left = tmp_path / 'run', monitor.Monitor.log, {}
  contents = lambda: {path: path.read_bytes() for path in folder.rglob('*') if path.is_file() and 'events' not in path.name}
  def log(self, step, numbers):
    original(self, step, numbers)
    (folder / 'lock').unlink()
    left.update(contents())
  monkeypatch.setattr(monitor.Monitor, 'log', log)
  with pytest.raises(ConfigError, match='has lost its lock'): run.run(made(), made(), folder)
  assert left and contents() == left


# ------------------------------------------------------------------ what happens to files

@pytest.fixture
def files(folder, request):
  """Of those that nothing reads, such as what a training has saved once its stage is committed, some, or all with --long."""
  found = {str(file.relative_to(folder)): file for file in sorted(folder.rglob('*')) if file.is_file()}
  idle = [name for name in found if name not in NOTICED and not name.startswith(LAST)]
  left = [] if request.config.getoption('--long') else [name for i, name in enumerate(idle) if i % 5]
  return {name: file for name, file in found.items() if name not in left}


def truncate(file): file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
def empty(file): file.write_bytes(b'')
def delete(file): file.unlink()
def garble(file): file.write_bytes(bytes(reversed(file.read_bytes())))


# Of the files that a reader reads: what it must come to. All others are equal.
NOTICED = {
  'config.json': {generate: 'noticed', report: 'noticed', resume: 'noticed'},
  'run.json': {generate: 'noticed', report: 'noticed', resume: 'noticed'},
  'tokenizer.json': {generate: 'noticed', report: 'equal', resume: 'noticed'},
  'metrics.jsonl': {generate: 'equal', report: 'noticed', resume: 'equal'},
  'ledger.json': {generate: 'equal', report: 'noticed', resume: 'equal'},
  'stages/1_train/2/manifest/metadata': {generate: 'equal', report: 'noticed', resume: 'noticed'},
  'stages/2_quantize/2/manifest/metadata': {generate: 'noticed', report: 'noticed', resume: 'noticed'},
}
# Gone, these are made again as they were.
MADE_AGAIN = {('config.json', resume), ('tokenizer.json', resume)}
LAST = 'stages/2_quantize/2/'   # of whose files `generate` reads most


@pytest.mark.parametrize('damage', [truncate, empty, delete, garble])
def test_every_file_that_is_cut_emptied_gone_or_garbled_is_noticed_or_not_needed(
    folder, files, expected, caplog, damage, tried):
  counts = collections.Counter()
  for name, file in files.items():
    before = file.read_bytes()
    damage(file)
    came = check(folder, file, expected, caplog)
    counts['noticed' if 'noticed' in came.values() else 'harmless'] += 1
    file.write_bytes(before)
    if name in NOTICED:
      for reader, wanted in NOTICED[name].items():
        if damage is delete and (name, reader) in MADE_AGAIN: wanted = 'equal'
        assert came[reader.__name__] == wanted, (name, damage.__name__, came)
    elif not name.startswith(LAST): assert set(came.values()) == {'equal'}, (name, came)
  tried('a file of a finished run truncated, emptied, deleted, garbled', len(files), **counts)


def test_every_bit_that_flips_is_noticed_or_harmless(folder, files, expected, caplog, request, tried):
  rng, noticed, flips, long = np.random.default_rng(0), 0, 0, request.config.getoption('--long')
  for name, file in files.items():
    before = file.read_bytes()
    read = name in NOTICED or (long and name.startswith(LAST))
    count = min(8 * len(before), (MANY if long else 8) if read else 20 if long else 1)
    for bit in rng.choice(8 * len(before), count, replace=False):
      content = bytearray(before)
      content[bit // 8] ^= 1 << bit % 8
      file.write_bytes(content)
      noticed, flips = noticed + ('noticed' in check(folder, file, expected, caplog).values()), flips + 1
    file.write_bytes(before)
  assert noticed > 40, 'most of those in the files that are read'
  tried('bits of the files of a finished run flipped', flips, noticed=noticed, harmless=flips - noticed)
