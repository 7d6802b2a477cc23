"""Arrays on disk, memory-mapped: built once, verified at every use, rebuilt when damaged.

One entry is one folder: the arrays as .npy and a manifest with their sha256. It appears by a rename, complete
or not at all, so any number of processes may build the same entry at once. Keys are hexadecimal digests: no
name that a user or a data set chose becomes a path.
"""
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable

import numpy as np

from efficient_lm.errors import ConfigError

VERSION = 2  # of what is stored; raise it whenever tokenizing, cutting or the layout here changes


def folder() -> pathlib.Path:
  """$EFFICIENT_LM_CACHE, or efficient_lm under $XDG_CACHE_HOME, or ~/.cache/efficient_lm; may not exist."""
  chosen = os.environ.get('EFFICIENT_LM_CACHE')
  if chosen: return pathlib.Path(chosen).expanduser()
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'efficient_lm'


def digest(*parts) -> str:
  """The key of what depends on `parts` (strings and numbers) and on the version of the format."""
  return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()


def fetch(key: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """The arrays under `key`, read-only and memory-mapped; where missing, `build` makes them (none empty).

  Raises ConfigError when the folder cannot be written.
  """
  entry = folder() / key[:32]
  arrays = _load(entry)
  if arrays is not None: return arrays
  built = build()
  try:
    _store(entry, built)
  except OSError as error:
    fix = f'{error.strerror or error}; set it to a folder with room that you can write'
    raise ConfigError('EFFICIENT_LM_CACHE', str(folder()), fix) from error
  return _load(entry) or built


def _load(entry: pathlib.Path) -> dict[str, np.ndarray] | None:
  """None for an entry that is absent, incomplete or damaged: a flipped bit is another text."""
  try:
    manifest = json.loads((entry / 'manifest.json').read_text())
    for name, expected in manifest.items():
      with open(entry / f'{name}.npy', 'rb') as file:
        if hashlib.file_digest(file, 'sha256').hexdigest() != expected: return None
    return {name: np.load(entry / f'{name}.npy', mmap_mode='r', allow_pickle=False) for name in manifest}
  except (OSError, ValueError, AttributeError):
    return None


def _store(entry: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  entry.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=entry.parent, prefix='.partial-') as scratch:
    partial = pathlib.Path(scratch, 'new')
    partial.mkdir()
    manifest = {}
    for name, array in arrays.items():
      np.save(partial / f'{name}.npy', array, allow_pickle=False)
      with open(partial / f'{name}.npy', 'rb') as file:
        manifest[name] = hashlib.file_digest(file, 'sha256').hexdigest()
    (partial / 'manifest.json').write_text(json.dumps(manifest))
    _publish(partial, entry, pathlib.Path(scratch, 'old'))


def _publish(partial: pathlib.Path, entry: pathlib.Path, old: pathlib.Path) -> None:
  """Renames `partial` to `entry`. A damaged entry steps aside; another process's good one may stay."""
  for _ in range(2):
    try:
      return os.rename(partial, entry)
    except OSError:
      if not entry.exists(): raise
      if _load(entry) is not None: return None
      if entry.is_dir(): os.rename(entry, old)
      else: entry.unlink()
  raise OSError(f'cannot replace {entry}')
