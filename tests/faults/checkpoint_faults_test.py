"""Damage to a checkpoint is always noticed: an older step is used with one line of warning, or the program stops."""
import contextlib
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

from efficient_lm.errors import CheckpointError, WriteError
from efficient_lm.runs.checkpoint import Checkpoints, lock

# Orbax drops the tasks that read the other arrays when one is unreadable; only pytest makes something of it.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')

FAULT, FLIPS = 'a file of a checkpoint truncated, zeroed, deleted; bits flipped', 200   # bits, with --long


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


def to_pipe(path):
  """Whoever opens it waits for a writer."""
  path.unlink()
  os.mkfifo(path)


def to_link(path):
  """To the same bytes, outside."""
  outside = next(one for one in path.parents if one.name == 'now').with_name(f'outside_{path.stat().st_ino}')
  path.rename(outside)
  path.symlink_to(outside)


DAMAGES = {'truncated': truncate, 'zeroed': zero, 'deleted': os.remove, 'a pipe': to_pipe, 'a link': to_link}


@pytest.mark.parametrize('damage', DAMAGES)
def test_no_damaged_file_ever_gives_wrong_bits(saved, tmp_path, damage, tried):
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
  assert 1 in used and (damage not in ('a pipe', 'a link') or 2 not in used)
  tried(FAULT, len(used), noticed=used.count(1), harmless=used.count(2))


def test_every_bit_flip_in_the_data_is_detected_or_harmless(saved, tmp_path, request, tried):
  rng, reader, caught = np.random.default_rng(0), Checkpoints(tmp_path / 'now'), 0
  flips = FLIPS if request.config.getoption('--long') else 24
  for path in rng.choice(files(saved), flips):
    shutil.rmtree(reader.folder, ignore_errors=True)
    shutil.copytree(saved, reader.folder)
    path = reader.folder / path.relative_to(saved)
    if path.stat().st_size: flip(path, int(rng.integers(8 * path.stat().st_size)))
    restored = reader.restore(ABSTRACT)
    caught += int(restored['step']) == 1
    assert same(restored, state(int(restored['step']))), path
  reader.close()
  assert caught
  tried(FAULT, flips, noticed=caught, harmless=flips - caught)


def test_every_bit_flip_in_the_array_bytes_is_detected(saved, tmp_path, tried):
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
  tried(FAULT, 24, noticed=24)


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


@pytest.fixture
def room(monkeypatch):
  """room(f_bavail=…): from now on every file system has that."""
  real = os.statvfs
  def has(**changes):
    def found(path):
      names = [name for name in dir(real(path)) if name.startswith('f_')]
      return types.SimpleNamespace(**{name: getattr(real(path), name) for name in names} | changes)
    monkeypatch.setattr(os, 'statvfs', found)
  return has


def test_a_disk_without_room_for_files_is_one_line(checkpoints, room):
  room(f_files=1000, f_favail=3)
  with pytest.raises(WriteError, match=r'no room for 64 files, 3 left, [0-9,]+ bytes free'): checkpoints.save(3, state(3))
  assert checkpoints.latest() == 2


def test_a_folder_that_is_gone_is_one_line(checkpoints, folder):
  """The run's own, too: it is not made anew for this."""
  shutil.rmtree(folder.parent)
  with pytest.raises(WriteError, match=r'step 3, .* be saved .*No such file'): checkpoints.save(3, state(3), wait=True)
  assert not folder.parent.exists()


def test_a_folder_that_goes_while_it_is_written_is_one_line(checkpoints, folder):
  checkpoints.save(3, state(3))
  folder.parent.rename(folder.parent.with_name('elsewhere'))
  with contextlib.suppress(WriteError): checkpoints.wait()   # it may have been quicker
  with pytest.raises(WriteError): checkpoints.save(4, state(4), wait=True)


def test_the_newest_sane_step_is_kept_apart(checkpoints, folder):
  for step, sane in enumerate((None, None, (4, 1.5), None, None), 3): checkpoints.save(step, state(step), sane=sane)
  checkpoints.wait()
  assert checkpoints.steps() == [4, 6, 7] and (checkpoints.sane_step(), checkpoints.sane_loss()) == (4, 1.5)
  assert same(checkpoints.restore(ABSTRACT, 4), state(4))
  for step in (8, 9): checkpoints.save(step, state(step), sane=(step - 1, 1.0), spared=6)
  checkpoints.wait()
  assert checkpoints.steps() == [6, 8, 9] and checkpoints.sane_step() == 8, 'it is one of the newest again'
  checkpoints.save(10, state(10), sane=(7, 0.5), wait=True)
  assert checkpoints.sane_step() == 8, 'of a step that is gone nothing is noted'


@pytest.mark.parametrize('text', ['', '{', '[1]', '{"step": "4", "loss": 1.0}', '{"step": 99, "loss": 1.0}'])
def test_a_note_of_a_sane_step_that_is_damaged_counts_for_nothing(checkpoints, folder, text):
  (folder / 'sane.json').write_text(text)
  assert checkpoints.sane_step() is None
  checkpoints.save(3, state(3), wait=True)


def test_a_full_disk_is_one_line_with_path_and_bytes(checkpoints, folder, room, monkeypatch):
  room(f_bavail=1000, f_frsize=1)
  with pytest.raises(WriteError, match=r'of 16,516 bytes, cannot be saved in .*: no room .*, 1,000 bytes free') as refusal:
    checkpoints.save(3, state(3))
  assert str(folder) in str(refusal.value) and '\n' not in str(refusal.value) and refusal.value.exit_code == 5
  monkeypatch.undo()
  assert checkpoints.latest() == 2
  checkpoints.save(3, state(3), wait=True)
  assert checkpoints.latest() == 3


def test_a_disk_that_fills_up_while_writing_leaves_earlier_steps_and_no_debris(tmp_path):
  """A limit on file size stands for the full disk; it holds for a whole process, so this runs in one of its own."""
  program = '''
import resource, sys
import jax.numpy as jnp, jax
from efficient_lm.runs.checkpoint import Checkpoints
from efficient_lm.errors import WriteError
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {'w': jnp.arange(9.0)}, wait=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try: checkpoints.save(2, {'w': jax.random.normal(jax.random.key(0), (1000, 1000))}, wait=True)
except WriteError as error: print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(checkpoints.latest(), sorted(entry.name for entry in checkpoints.folder.iterdir()))
'''
  done = subprocess.run([sys.executable, '-c', program, str(tmp_path)], capture_output=True, text=True, timeout=120)
  first, last = done.stdout.splitlines()
  said = f'step 2, of 4,000,000 bytes, cannot be saved in {tmp_path}: File too large, the limit is 100,000 bytes a file'
  assert first.startswith(said) and done.stderr == '', done.stderr
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
