"""The folder of a run as a place to write. A file that others read is there as a whole, the old one or the new one; nothing
outside the folder is written or deleted; and who has lost the folder's lock writes no more.

A run's folder may come from anybody. A link in it, where a run is about to write or delete, would lead out of it, and is
refused in a line before anything is written. The folder itself may be a link: that is its owner's choice. What is looked at
is the folder as it lies there, not what another program of the same user makes of it in the same instant.

`workdir` is the folder that a run was given, `name` a path relative to it.
"""
import contextlib
import fcntl
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from efficient_lm.errors import ConfigError

# The beginnings of all names that runs write into their folders, up to the first dot; others are the owner's own.
WRITTEN = ('config', 'run', 'tokenizer', 'ledger', 'metrics', 'report', 'lock', 'samples', 'stages', 'checkpoints',
           'tensorboard', 'mirror')
LOCK = 'lock'
_held: dict[Path, tuple[str, int]] = {}   # folders that this process holds: the path of the lock, and its open file


# ------------------------------------------------------------------ where may be written

def check(workdir):
  """Raises ConfigError for the first link, or anything else that is neither a file nor a folder, among what runs write."""
  if not os.path.isdir(workdir): return
  with os.scandir(workdir) as entries: check_all(entry for entry in entries if entry.name.split('.')[0] in WRITTEN)


def check_all(entries: Iterable[os.DirEntry]):
  """Raises ConfigError for the first link, or anything else that is neither a file nor a folder, among entries of a folder
  and all below them."""
  left = list(entries)
  while left:
    entry = left.pop()
    _refuse_odd(entry.path, entry.stat(follow_symlinks=False).st_mode)
    if not entry.is_dir(follow_symlinks=False): continue
    with os.scandir(entry.path) as inside: left += inside


def place(workdir, name: str) -> Path:
  """The path of `name`. Raises ConfigError where a link lies on the way to it, or there."""
  parts = Path(name).parts
  if os.path.isabs(name) or '..' in parts: raise ConfigError('workdir', name, f'must be inside {workdir}')
  path = Path(workdir)
  for part in parts:
    path = path / part
    try: _refuse_odd(path, path.lstat().st_mode)
    except FileNotFoundError: continue
    except NotADirectoryError as error:
      raise ConfigError('workdir', str(path), 'lies below a file: move that away') from error
  return path


def _refuse_odd(path, mode: int):
  if stat.S_ISREG(mode) or stat.S_ISDIR(mode): return
  kind = 'a link: what is written there would lie elsewhere' if stat.S_ISLNK(mode) else 'neither a file nor a folder'
  raise ConfigError('workdir', os.fspath(path), f'is {kind}; remove it')


# ------------------------------------------------------------------ writing and deleting

def folder(workdir, name: str = '') -> Path:
  """Makes a folder, unless it is there."""
  still_held(workdir)
  path = place(workdir, name)
  path.mkdir(parents=True, exist_ok=True)
  return path


def write(workdir, name: str, content: str | bytes) -> Path:
  """Writes a file beside its place, and renames it over what is there: what others read is whole, the old or the new."""
  folder(workdir, os.path.dirname(name))
  path, beside = place(workdir, name), place(workdir, f'{name}.partial')
  beside.unlink(missing_ok=True)   # what a killed run has left
  with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), 'wb') as file:
    file.write(content.encode('utf-8') if isinstance(content, str) else content)
    file.flush()
    os.fsync(file.fileno())   # or a rename could outlive, at a power cut, what it is the name of
  os.replace(beside, path)
  return path


def fill(workdir, name: str, filled: Callable[[str], None]):
  """As `write`, of a file that `filled` makes at the path that it is given."""
  folder(workdir, os.path.dirname(name))
  path, beside = place(workdir, name), place(workdir, f'{name}.partial')
  beside.unlink(missing_ok=True)
  filled(str(beside))
  os.replace(beside, path)


def append(workdir, name: str):
  """A binary file without a buffer, opened to be written on at its end. Raises ConfigError for one that has a second name
  elsewhere."""
  folder(workdir, os.path.dirname(name))
  descriptor = os.open(place(workdir, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
  return _own(open(descriptor, 'ab', buffering=0), workdir, name)


def _own(file, workdir, name: str):
  """The file, unless it is another one, too: what is written in place would be written there."""
  if os.fstat(file.fileno()).st_nlink <= 1: return file
  file.close()
  raise ConfigError('workdir', str(Path(workdir) / name), 'is a hard link, the file of another folder, too; remove it')


def remove(workdir, name: str):
  """Deletes a folder, if it is there, and all that is in it; links in it, not what they lead to."""
  still_held(workdir)
  path = place(workdir, name)
  if path.is_dir(): shutil.rmtree(path)


def delete(workdir, name: str):
  """Deletes a file, if it is there."""
  still_held(workdir)
  place(workdir, name).unlink(missing_ok=True)


def move(workdir, name: str, to: str):
  """Gives a folder another name, and deletes what had that."""
  remove(workdir, to)
  place(workdir, name).rename(place(workdir, to))


# ------------------------------------------------------------------ who may write

@contextlib.contextmanager
def lock(workdir) -> Iterator[None]:
  """Holds `workdir/lock`, which names the host and process. ConfigError when another process holds it.

  The kernel drops the lock when the process ends, however it ends: a file left behind locks nothing. Where the file is
  deleted meanwhile, so that another process may lock a new one, whatever writes here raises ConfigError (see `still_held`).
  """
  Path(workdir).mkdir(parents=True, exist_ok=True)
  path = place(workdir, LOCK)
  if path.is_dir(): raise ConfigError('workdir', str(path), 'is a folder, and must be the file that locks a run: remove it')
  descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
  with _own(open(descriptor, 'r+', encoding='utf-8', errors='replace'), workdir, LOCK) as file:
    try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      fix = f'another process uses it ({file.read(200).strip()}); wait or take another'
      raise ConfigError('workdir', str(workdir), fix) from error
    root = Path(workdir).resolve()
    _held[root] = os.path.abspath(path), file.fileno()
    try:
      still_held(workdir)
      file.truncate(0)
      file.write(f'host {socket.gethostname()}, process {os.getpid()}\n')
      file.flush()
      yield
    finally: _held.pop(root, None)


def still_held(path):
  """Raises ConfigError if this process has locked a folder in which `path` lies, or is, and the lock's file is not there any
  more: another process may have locked a new one, and write."""
  if not _held: return
  inside = Path(path).resolve()
  for root, (file, descriptor) in list(_held.items()):
    if root != inside and root not in inside.parents: continue
    try: there = os.stat(file, follow_symlinks=False)
    except OSError: there = None
    if there is None or not os.path.samestat(there, os.fstat(descriptor)):
      raise ConfigError('workdir', str(root), f'has lost its lock: {file} was removed or replaced, so that another process '
                        'may write here; this one writes no more. Run it again once no other does')
