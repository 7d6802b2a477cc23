"""A run whose workdir is an address, as gs://bucket/runs/moe: it is kept in a folder here, and copied there while it goes.

All that a run writes needs a file system (a step appears by a rename, a lock is the kernel's, links are refused), and a
bucket is none. So the run lies below `runs/mirrors`, and what is new in it is copied every COPY_EVERY seconds and at the
end. On a machine that has not seen it, it is fetched first, and goes on from there.

There its files have the names that they have here, so that TensorBoard and others read them, and there are two files more:

  mirror.json     the index, written last: each file, its bytes and checksum. A step of a checkpoint that it does not name
                  was still being copied when a machine went, and is none. All other files verify themselves
  mirror.owner    who writes (`lease`)

The libraries are fsspec and, for gs://, gcsfs (the extra gcs).
"""
import contextlib
import logging
import os
import re
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from efficient_lm.errors import CheckpointError, ConfigError, Preempted, WriteError
from efficient_lm.parallel import processes
from efficient_lm.runs import lease, writing
from efficient_lm.system import interruption, sealed
from efficient_lm.system import workdir as workdirs

log = logging.getLogger(__name__)
logging.getLogger('gcsfs').setLevel(logging.CRITICAL)   # what goes wrong there it raises, too
FOLDER = os.path.join('runs', 'mirrors')
INDEX, OWNER = 'mirror.json', 'mirror.owner'
COPY_EVERY = 60.0   # seconds
PIECE = 1 << 20     # bytes
LEFT_OUT = re.compile(r'(^|/)(lock|mirror)(\.|$)|\.partial$|\.orbax-checkpoint-tmp')   # of no use elsewhere
OF_STEP = re.compile(r'(checkpoints|stages/[^/]+)/(.+/)?\d+/')   # of a checkpoint's step, which never changes
EXTRAS = {'gs': 'gcs', 'gcs': 'gcs'}
OPTIONS = {'file': {'auto_mkdir': True}}   # of its library; buckets have no folders to be made


def is_address(path: str | None) -> bool:
  """Whether a path names no folder, but what a library has to be asked for."""
  return path is not None and '://' in path


def of(field: str, path: str | None) -> 'Mirror | None':
  """The mirror of an address; None of a folder. Raises ConfigError."""
  return Mirror(field, path) if is_address(path) else None


def local(field: str, path: str | None) -> str | None:
  """The path itself; of an address the folder into which the run there has been fetched. Raises ConfigError."""
  mirror = of(field, path)
  if mirror is None: return path
  mirror.fetch()
  return mirror.folder


class Mirror:
  """`folder` here, `address` there; field: the word of a command that names it. Raises ConfigError for an address that is
  none, or whose library is not installed."""

  def __init__(self, field: str, address: str):
    import fsspec
    self.field, self.address = field, address.rstrip('/')
    kind, _, rest = self.address.partition('://')
    parts = rest.removeprefix('/').split('/')   # file:///mnt has three
    if len(parts) < 2 or any(part in ('', '.', '..') or set(part) & set('\0\\?#*[]') for part in parts):
      raise ConfigError(field, address, 'is no address of a folder: write gs://BUCKET/FOLDER')
    options = {'use_listings_cache': False, 'skip_instance_cache': True, **OPTIONS.get(kind, {})}
    try: self.system, root = fsspec.url_to_fs(self.address, **options)
    except ImportError as error:
      fix = f"pip install 'efficient_lm[{EXTRAS[kind]}]'" if kind in EXTRAS else f'install it ({error})'
      raise ConfigError(field, address, f'needs a library that is not here: {fix}') from error
    except Exception as error: raise self._unusable(error) from error
    self.root = root.rstrip('/')
    self.folder = os.path.join(FOLDER, kind, *parts)
    self._lease = lease.Lease(self.system, f'{self.root}/{OWNER}', field, self.address)
    self._sums: dict[str, tuple] = {}   # of files here: what they looked like, their bytes and checksum
    self._index: dict[str, list[int]] | None = None   # what is there, by the index there
    self._whole: set[str] = set()   # files there that can be used
    self._stray: set[str] = set()   # and all others
    self._taken: ConfigError | None = None

  def _unusable(self, error: Exception) -> ConfigError:
    return ConfigError(self.field, self.address, f'cannot be used: {_said(error)}')

  # ---------------------------------------------------------------- from there

  def fetch(self):
    """Makes the folder here what is there, unless it is that already or has gone on from it. Raises ConfigError where it
    cannot be read, CheckpointError where the index is damaged."""
    try: there = self._names()
    except ConfigError: raise
    except Exception as error: raise self._unusable(error) from error
    self._index = self._read_index() if INDEX in there else None
    wanted = self._whole = {name for name in there if _is_copied(name) and self._is_whole(name)}
    self._stray = {name for name in there - wanted if _is_copied(name)}
    if not wanted or self._is_known(): return
    with workdirs.lock(self.folder):
      workdirs.delete(self.folder, INDEX)   # until all is here, this is not what is there
      kept = {name for name in wanted if self._index and self._index.get(name, 0) == self._sum(name)}
      for name in self._files() - wanted: workdirs.delete(self.folder, name)
      for name in sorted(wanted - kept): self._fetch(name)
      if self._index is not None: self._note_index()
    print(f'{self.address}: {len(wanted - kept):,} files fetched into {self.folder}', flush=True)

  def _names(self) -> set[str]:
    """Of the files there. Raises ConfigError for one that would lie elsewhere here."""
    if not self.system.exists(self.root): return set()
    found = {name[len(self.root):].lstrip('/') for name in self.system.find(self.root)}
    for name in found:
      if '\0' in name or '..' in name.split('/'): raise ConfigError(self.field, self.address, f'holds {name!r}: remove that')
    return found

  def _read_index(self) -> dict[str, list[int]]:
    try:
      found = sealed.without_hash(sealed.parse(self.system.cat_file(f'{self.root}/{INDEX}')))['files']
      return {name: [int(size), int(crc)] for name, (size, crc) in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
      fix = 'remove it there, and the files beside it are taken as they are'
      raise CheckpointError(f'{self.address}/{INDEX} is damaged: {_said(error)}; {fix}') from error
    except Exception as error: raise self._unusable(error) from error

  def _is_whole(self, name: str) -> bool:
    """Whether a file there can be used: one of a step can where all of the step has been copied."""
    return self._index is None or not OF_STEP.match(name) or name in self._index

  def _is_known(self) -> bool:
    """Whether the folder here has been copied, or fetched, when the index there was written."""
    path = Path(self.folder) / INDEX
    return self._index is not None and path.is_file() and sealed.read(path).get('files') == self._index

  def _fetch(self, name: str):
    interruption.check()
    path = Path(self.folder) / name
    try: workdirs.fill(self.folder, name, lambda beside: self.system.get_file(f'{self.root}/{name}', beside))
    except ConfigError: raise
    except FileNotFoundError: return log.warning('%s/%s is missing, though the index there names it', self.address, name)
    except OSError as error:
      if not writing.reason(error): raise self._unusable(error) from error
      raise WriteError(f'{path} cannot be written: {writing.reason(error)}{writing.free(path)}') from error
    except Exception as error: raise self._unusable(error) from error

  def _note_index(self):
    sealed.write(self.folder, INDEX, {'files': self._index})

  # ---------------------------------------------------------------- to there

  @contextlib.contextmanager
  def kept(self) -> Iterator[None]:
    """While it is open, what is new in the folder is copied; at its end all of it. Of several processes the first one
    copies. Raises ConfigError where another process writes there, also when one takes over meanwhile: the run ends then as
    by a signal; WriteError where the end cannot be copied."""
    processes.on_first(self._claim)
    with self._copied() if processes.is_first() else contextlib.nullcontext(): yield

  def _claim(self):
    try: self._lease.claim()
    except (ConfigError, Preempted): raise
    except Exception as error: raise self._unusable(error) from error
    self.fetch()   # where another one has written since

  @contextlib.contextmanager
  def _copied(self):
    ended = threading.Event()
    copying = threading.Thread(target=self._copy_on, args=(ended,), name='mirror', daemon=True)
    copying.start()
    try: yield
    except BaseException:
      self._end(ended, copying)
      try: self._copy_last()
      except WriteError as error: log.warning('%s', error)
      raise
    self._end(ended, copying)
    self._copy_last()

  def _end(self, ended: threading.Event, copying: threading.Thread):
    with contextlib.suppress(Preempted), interruption.holding():
      ended.set()
      copying.join()
    if self._taken: raise self._taken

  def _copy_last(self):
    """A signal does not end it: it is what a signal gives time for."""
    with contextlib.suppress(Preempted), interruption.holding():
      try:
        if os.path.isdir(self.folder): self.copy()
        self._lease.give_back()
      except ConfigError: raise
      except Exception as error:
        raise WriteError(f'{self.address} cannot be written: {_said(error)}; the run is whole in {self.folder}, and the '
                         'same command, given here, copies it') from error

  def _copy_on(self, ended: threading.Event):
    """What the thread does."""
    due = time.monotonic() + COPY_EVERY
    while not ended.wait(min(lease.BEAT, COPY_EVERY)):
      try:
        self._lease.renew()
        if time.monotonic() < due: continue
        self.copy()
      except ConfigError as error:
        self._taken = error
        os.kill(os.getpid(), signal.SIGTERM)
        return
      except Exception as error: log.warning('%s cannot be written: %s; it is tried again', self.address, _said(error))
      due = time.monotonic() + COPY_EVERY

  def copy(self):
    """What is new here, then the index; then deletes there what is gone here."""
    if self._index is None:   # from now on there is one: or what is copied first would be taken as whole
      self._write_index({name: found for name in self._whole if (found := self._sum(name))})
    before, sums = self._index, {}
    for name in sorted(self._files(), key=lambda name: (not OF_STEP.match(name), name)):
      found = self._copy_one(name, before.get(name))
      if found is not None: sums[name] = found
    self._lease.check()
    if sums != before: self._write_index(sums)
    for name in (self._stray | set(before)) - set(sums):
      with contextlib.suppress(FileNotFoundError): self.system.rm_file(f'{self.root}/{name}')
    self._stray = set()

  def _write_index(self, sums: dict[str, list[int]]):
    self.system.pipe_file(f'{self.root}/{INDEX}', sealed.with_hash({'files': sums}).encode())
    self._index = sums
    self._note_index()

  def _copy_one(self, name: str, there: list[int] | None) -> list[int] | None:
    """Its bytes and checksum; None where it has gone meanwhile."""
    path, target = Path(self.folder) / name, f'{self.root}/{name}'
    try:
      found = self._sum(name)
      if found == there: return found
      if OF_STEP.match(name):
        self.system.put_file(str(path), target)
        return found
      content = path.read_bytes()   # it may be written while it is copied
    except FileNotFoundError: return None
    self.system.pipe_file(target, content)
    return [len(content), zlib.crc32(content)]

  # ---------------------------------------------------------------- here

  def _files(self) -> set[str]:
    """Names of those that are copied."""
    found = [os.path.join(top, name) for top, _, names in os.walk(self.folder) for name in names]
    return {name for path in found if _is_copied(name := os.path.relpath(path, self.folder))}

  def _sum(self, name: str) -> list[int] | None:
    """Bytes and checksum; None where there is no such file."""
    path = workdirs.place(self.folder, name)
    if not path.is_file(): return None
    there = path.stat()
    looks = there.st_mtime_ns, there.st_size, there.st_ino
    if self._sums.get(name, (None,))[0] != looks:
      crc, size = 0, 0
      with open(path, 'rb') as file:
        for piece in iter(lambda: file.read(PIECE), b''): crc, size = zlib.crc32(piece, crc), size + len(piece)
      self._sums[name] = looks, [size, crc]
    return self._sums[name][1]


def _is_copied(name: str) -> bool:
  """Whether a run writes the file, and it is of use elsewhere."""
  return name.split('/')[0].split('.')[0] in workdirs.WRITTEN and not LEFT_OUT.search(name)


def _said(error: Exception) -> str:
  """In one line, whatever library it is from."""
  return f'{type(error).__name__}: {" ".join(str(error).split())}'[:300]
