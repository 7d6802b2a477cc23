"""Files that cannot be written, in one line: which, why, and how much room there is.

A run cannot go on without its states, what its stages leave, and its ledger: where one of these cannot be written,
WriteError is raised. It can without metrics, TensorBoard, samples and reports: a warning says so once, and the run goes on.
"""
import contextlib
import errno
import logging
import os
import re
import resource
from pathlib import Path

from efficient_lm.errors import WriteError

log = logging.getLogger(__name__)
# How libraries beneath, which do not raise OSError, say the same.
SAID = re.compile(r'No space left on device|Disk quota exceeded|File too large|Read-only file system|Permission denied|'
                  r'Input/output error|Too many open files|No such file or directory|NOT_FOUND: Error (?:read|writ|open)ing')
OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)   # which no user can have meant
_said: set[str] = set()


def reason(error: Exception) -> str | None:
  """In a few words why something cannot be written; None for an error of another kind."""
  if isinstance(error, WriteError): return str(error)
  found = SAID.search(str(error))
  if isinstance(error, OSError): words = os.strerror(error.errno) if error.errno else (found[0] if found else str(error))
  elif found: words = found[0]
  else: return None
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
  if words == os.strerror(errno.EFBIG) and limit != resource.RLIM_INFINITY: words += f', the limit is {limit:,} bytes a file'
  path = getattr(error, 'filename', None)
  return f'{words} ({path})' if path else words


def free(path) -> str:
  """', 1,234 bytes free' of the file system that `path` is in, or would be, and its files, where none is left; '' if there
  is no telling."""
  try: found = os.statvfs(_existing(path))
  except OSError: return ''
  files = ', 0 files left' if found.f_files and not found.f_favail else ''
  return f', {found.f_bavail * found.f_frsize:,} bytes free{files}'


def _existing(path) -> Path:
  """The folder itself, or the one that it would be made in."""
  path = Path(path).absolute()
  while not path.exists() and path != path.parent: path = path.parent
  return path


def check_room(folder, needed: int, files: int = 1):
  """Raises OSError where `folder` is, or would be, in a file system without room for so many bytes in so many files, each of
  which takes a block more."""
  found = os.statvfs(_existing(folder))
  needed += files * found.f_frsize
  if needed > found.f_bavail * found.f_frsize: raise OSError(f'no room for {needed:,} bytes with all files')
  if found.f_files and files > found.f_favail: raise OSError(f'no room for {files} files, {found.f_favail} left')


@contextlib.contextmanager
def needed(path):
  """Around the writing of what a run needs. Raises WriteError."""
  try: yield
  except OSError as error: raise WriteError(f'{path} cannot be written: {reason(error)}{free(path)}') from error


@contextlib.contextmanager
def dispensable(path):
  """Around the writing of what a run can do without: that it cannot be written is said once a path."""
  try: yield
  except OSError as error:
    if str(path) in _said: return
    _said.add(str(path))
    log.warning('%s cannot be written: %s%s; the run goes on without it', path, reason(error), free(path))
