"""Damage to a checkpoint is always noticed: an older step is used with one line of warning, or the program stops."""
import logging
import os
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import CheckpointError
from efficient_lm.runs.checkpoint import Checkpoints, lock

# Orbax drops the tasks that read the other arrays when one is unreadable; only pytest makes something of it.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')

def state(seed):
  return {'step': jnp.int32(seed), 'model': {'w': jax.random.normal(jax.random.key(seed), (64, 32)),
                                             'codes': jnp.arange(-64, 64, dtype=jnp.int8)},
          'opt_state': jax.random.normal(jax.random.key(seed + 1), (64, 32))}


ABSTRACT = jax.eval_shape(lambda: state(0))


def same(a, b) -> bool:
  return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A folder with steps 1 and 2, to be copied."""
  folder = tmp_path_factory.mktemp('saved')
  checkpoints = Checkpoints(folder)
  for step in (1, 2): checkpoints.save(step, state(step))
  checkpoints.close()
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  shutil.copytree(saved, tmp_path / 'checkpoints')
  return tmp_path / 'checkpoints'


@pytest.fixture
def checkpoints(folder):
  opened = Checkpoints(folder)
  yield opened
  opened.close()


def files(folder, step=2):
  return sorted(path for path in (folder / str(step)).rglob('*') if path.is_file())


def flip(path, bit):
  data = bytearray(path.read_bytes())
  data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(bytes(data))


def truncate(path): path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
def zero(path): path.write_bytes(bytes(path.stat().st_size))


DAMAGES = {'truncated': truncate, 'zeroed': zero, 'deleted': os.remove}


@pytest.mark.parametrize('damage', DAMAGES)
def test_no_damaged_file_ever_gives_wrong_bits(saved, tmp_path, damage):
  """Some files of a step are never read; damage to those is harmless. Any other makes step 1 the newest."""
  reader, used = Checkpoints(tmp_path / 'now'), []
  for path in files(saved):
    shutil.rmtree(reader.folder, ignore_errors=True)
    shutil.copytree(saved, reader.folder)
    DAMAGES[damage](reader.folder / path.relative_to(saved))
    restored = reader.restore(ABSTRACT)
    used.append(int(restored['step']))
    assert same(restored, state(used[-1])), path
  reader.close()
  assert 1 in used


def test_every_bit_flip_in_the_data_is_detected_or_harmless(saved, tmp_path):
  rng, reader, caught = np.random.default_rng(0), Checkpoints(tmp_path / 'now'), 0
  for path in rng.choice(files(saved), 24):
    shutil.rmtree(reader.folder, ignore_errors=True)
    shutil.copytree(saved, reader.folder)
    path = reader.folder / path.relative_to(saved)
    if path.stat().st_size: flip(path, int(rng.integers(8 * path.stat().st_size)))
    restored = reader.restore(ABSTRACT)
    caught += int(restored['step']) == 1
    assert same(restored, state(int(restored['step']))), path
  reader.close()
  assert caught


def test_every_bit_flip_in_the_array_bytes_is_detected(saved, tmp_path):
  """The largest files hold the arrays themselves, which zstd leaves as they are: nothing but a checksum can tell."""
  largest = max(files(saved), key=lambda path: path.stat().st_size)
  rng, reader = np.random.default_rng(1), Checkpoints(tmp_path / 'now')
  for bit in rng.integers(8 * 256, 8 * (largest.stat().st_size - 256), 24):   # inside, away from head and foot
    shutil.rmtree(reader.folder, ignore_errors=True)
    shutil.copytree(saved, reader.folder)
    flip(reader.folder / largest.relative_to(saved), int(bit))
    restored = reader.restore(ABSTRACT)
    assert int(restored['step']) == 1 and same(restored, state(1)), bit
  reader.close()


def test_what_other_threads_still_read_when_an_array_is_damaged_prints_nothing(checkpoints, folder, monkeypatch):
  """Python hands to this hook what a thread of TensorStore cannot raise anywhere, say that nobody waits for it."""
  told = []
  monkeypatch.setattr(sys, 'unraisablehook', lambda late: told.append(str(late.exc_value)))
  break_step(folder, 2)
  assert checkpoints.latest() == 1
  for text in ('Event loop is closed', 'another'): sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))
  assert 'another' in told and 'Event loop is closed' not in told


def break_step(folder, step):
  for path in files(folder, step): zero(path)


def test_falling_back_takes_one_line_of_warning(checkpoints, folder, caplog):
  break_step(folder, 2)
  with caplog.at_level(logging.WARNING): assert checkpoints.latest() == 1
  lines = [record.getMessage() for record in caplog.records if record.name == 'efficient_lm.runs.checkpoint']
  assert len(lines) == 1 and str(folder / '2') in lines[0] and '\n' not in lines[0]
  assert same(checkpoints.restore(ABSTRACT), state(1))


def test_with_all_steps_corrupt_it_refuses_to_start_anew(checkpoints, folder):
  break_step(folder, 1), break_step(folder, 2)
  for load in (checkpoints.latest, lambda: checkpoints.restore(ABSTRACT)):
    with pytest.raises(CheckpointError, match='none of the checkpoints') as refusal: load()
    assert refusal.value.exit_code == 3


def test_a_step_asked_for_by_number_is_never_replaced_by_another(checkpoints, folder):
  break_step(folder, 2)
  with pytest.raises(CheckpointError, match='corrupt'): checkpoints.restore(ABSTRACT, 2)
  assert same(checkpoints.restore(ABSTRACT, 1), state(1))


def test_after_a_fall_back_the_corrupt_step_neither_blocks_nor_outlives_new_ones(checkpoints, folder):
  break_step(folder, 2)
  assert checkpoints.latest() == 1
  checkpoints.save(2, state(2), wait=True)
  assert checkpoints.steps() == [1, 2] and (folder / '2.corrupt').is_dir()
  assert same(checkpoints.restore(ABSTRACT), state(2))


def test_temporary_empty_and_foreign_folders_are_no_checkpoints(checkpoints, folder):
  for name in ('99', '7.orbax-checkpoint-tmp', '7.orbax-checkpoint-tmp-123', 'notes', '007', '-3'): (folder / name).mkdir()
  (folder / '7.orbax-checkpoint-tmp' / 'x').write_text('torn')
  (folder / '1000').write_text('a file')
  assert checkpoints.steps() == [1, 2] and checkpoints.latest() == 2
  (folder / '1000').unlink()
  checkpoints.save(3, state(3), wait=True)
  assert not list(folder.glob('*tmp*')) and (folder / 'notes').is_dir()   # torn saves are cleared, nothing else


def test_a_folder_that_orbax_would_take_for_a_checkpoint_is_passed_over(checkpoints, folder):
  (folder / '50').mkdir()
  (folder / '50' / 'commit_success.txt').write_text('')
  assert checkpoints.latest() == 2


def test_a_full_disk_is_one_line_with_path_and_bytes(checkpoints, folder, monkeypatch):
  usage = shutil.disk_usage(folder)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=1000))
  with pytest.raises(CheckpointError, match=r'disk full: .*1,000 bytes free') as refusal:
    checkpoints.save(3, state(3))
  assert str(folder) in str(refusal.value) and '\n' not in str(refusal.value)
  monkeypatch.undo()
  assert checkpoints.latest() == 2
  checkpoints.save(3, state(3), wait=True)
  assert checkpoints.latest() == 3


def test_a_disk_that_fills_up_while_writing_leaves_earlier_steps_and_no_debris(tmp_path):
  """A limit on file size stands for the full disk; it holds for a whole process, so this runs in one of its own."""
  program = '''
import resource, signal, sys
import jax.numpy as jnp, jax
from efficient_lm.runs.checkpoint import Checkpoints
from efficient_lm.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {'w': jnp.arange(9.0)}, wait=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try: checkpoints.save(2, {'w': jax.random.normal(jax.random.key(0), (1000, 1000))}, wait=True)
except CheckpointError as error: print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(checkpoints.latest(), sorted(entry.name for entry in checkpoints.folder.iterdir()))
'''
  done = subprocess.run([sys.executable, '-c', program, str(tmp_path)], capture_output=True, text=True, timeout=120)
  first, last = done.stdout.splitlines()
  assert first.startswith('disk full: no room for step 2') and str(tmp_path) in first, done.stderr
  assert last == "1 ['1']"


def test_the_lock_of_a_killed_process_is_free(tmp_path):
  program = '''
import os, sys
from efficient_lm.runs.checkpoint import lock
with lock(sys.argv[1]):
  print('held', flush=True)
  sys.stdin.read()
'''
  holder = subprocess.Popen([sys.executable, '-c', program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  assert holder.stdout.readline() == b'held\n'
  with pytest.raises(ValueError, match=f'process {holder.pid}'):
    with lock(tmp_path): pass
  holder.kill()
  holder.wait()
  with lock(tmp_path): assert str(os.getpid()) in (tmp_path / 'lock').read_text()
