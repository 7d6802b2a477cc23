"""Folders that a user names: refused, before anything is written, where they cannot be what they are meant for."""
import os
import stat
from collections.abc import Iterable

from efficient_lm.errors import ConfigError

NAME, PATH = 255, 4096   # bytes, where the system does not say


def expanded(field: str, path: str | None) -> str | None:
  """The path with ~ and ~user as a shell writes them out, which it does not behind an equals sign. Raises ConfigError."""
  if not path or not path.startswith('~'): return path
  found = os.path.expanduser(path)
  if found.startswith('~'): raise ConfigError(field, path, 'there is no such user: write ./~ for a folder of that name')
  return found


def check_folder(field: str, path: str):
  """Raises ConfigError for a folder that is none and cannot become one, or into which nothing can be written."""
  if '\0' in path: raise ConfigError(field, path, 'holds a character that no path can have')
  if '://' in path:
    raise ConfigError(field, path, 'is an address: write into a folder, and copy that, as by gcloud storage rsync -r')
  found = os.path.abspath(path)
  _check_length(field, path, found)
  try:
    while not os.path.lexists(found): found = os.path.dirname(found)
    os.stat(found)
  except OSError as error: raise ConfigError(field, path, f'{found}: {error.strerror}: choose another {field}') from error
  if not os.path.isdir(found): raise ConfigError(field, path, f'{found} is a file: choose another {field}')
  if not _writable(found): raise ConfigError(field, path, f'{found} cannot be written: choose another {field}')


def _check_length(field: str, path: str, absolute: str):
  try: encoded = os.fsencode(absolute)
  except UnicodeEncodeError: raise ConfigError(field, path, 'holds a character that no path can have') from None
  longest = max(encoded.split(b'/'), key=len)
  room = PATH - 256   # for what is written below it
  if len(longest) > NAME: raise ConfigError(field, path, f'has a name of {len(longest)} bytes: at most {NAME} are possible')
  if len(encoded) > room: raise ConfigError(field, path, f'is a path of {len(encoded)} bytes: at most {room} are possible')


def check_parts(field: str, path: str, folders: Iterable[str], files: Iterable[str]):
  """Raises ConfigError where what lies in a folder has the name, but not the kind, of what is to be written there, or cannot
  be written."""
  kinds = [(name, stat.S_ISDIR, 'folder') for name in folders] + [(name, stat.S_ISREG, 'file') for name in files]
  for name, is_kind, kind in kinds:
    part = os.path.join(path, name)
    try: mode = os.stat(part).st_mode
    except FileNotFoundError: continue
    except OSError as error: raise ConfigError(field, path, f'{part}: {error.strerror}') from error
    if not is_kind(mode): raise ConfigError(field, path, f'{part} must be a {kind}: move it away, or choose another {field}')
    nested = [entry.path for entry in os.scandir(part) if entry.is_dir()] if kind == 'folder' and _readable(part) else []
    for one in (part, *nested):
      if not _writable(one): raise ConfigError(field, path, f'{one} cannot be written: give yourself the right to')


def _readable(path: str) -> bool: return os.access(path, os.R_OK | os.X_OK)


def _writable(path: str) -> bool:
  """By this user, in this file system."""
  needed = os.W_OK | (os.X_OK | os.R_OK if os.path.isdir(path) else 0)
  return os.access(path, needed) and not os.statvfs(path).f_flag & os.ST_RDONLY
