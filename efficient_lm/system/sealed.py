"""JSON that a run reads again later, with a hash of what it holds in it: a bit that flips is noticed, not served.

The hash is an entry of the file itself, `sha256`, so that both appear by one rename: there is no moment at which a kill
leaves a file without its hash, or with that of another, and a file that is copied takes it along. It is taken of the values,
not of how they are spelled. A file without that entry, as earlier versions wrote it, is taken as it is.
"""
import hashlib
import json
import os
import stat
from typing import Any

from efficient_lm.errors import CheckpointError
from efficient_lm.system import workdir as workdirs

ENTRY = 'sha256'
LARGEST = 256 << 20   # bytes; the largest tokenizers have 40 MB
DEEPEST = 100         # objects and lists in each other; structures of models have about 20


def write(workdir, name: str, data: dict[str, Any], indent: int | None = 2):
  """Whole or not at all."""
  workdirs.write(workdir, name, with_hash(data, indent))


def with_hash(data: dict[str, Any], indent: int | None = None) -> str:
  """The text of such a file."""
  data = json.loads(json.dumps(data, allow_nan=False))
  return json.dumps(data | {ENTRY: _hash(data)}, indent=indent) + '\n'


def read(path) -> dict[str, Any]:
  """What a file holds, without the hash. Raises CheckpointError, one line that names the file, for one that is missing, is
  no JSON object, or is not what was written."""
  data = load(path)
  try: return without_hash(data)
  except (ValueError, RecursionError) as error: raise damaged(path, error) from error


def without_hash(data: Any) -> dict[str, Any]:
  """What such a file holds. Raises ValueError for what is no JSON object, or is not what was written; RecursionError."""
  if not isinstance(data, dict): raise ValueError('it holds no JSON object')
  named = ENTRY in data
  name = ENTRY if named else next(reversed(data), None)   # an entry that is the hash of the others, by another name
  rest = {one: value for one, value in data.items() if one != name}
  if named != (name is not None and data[name] == _hash(rest)):
    raise ValueError(f'it holds something else than was written. If it was changed on purpose, remove its entry {ENTRY}')
  return rest if named else data


def is_sealed(path) -> bool:
  """Whether a file carries a hash. Raises CheckpointError as `load` does."""
  found = load(path)
  return isinstance(found, dict) and ENTRY in found


def load(path, strict: bool = True) -> Any:
  """Any JSON in a file. Raises CheckpointError as `read` does. strict: NaN and infinities are refused, as JSON has none."""
  try:
    there = os.stat(path)
    if not stat.S_ISREG(there.st_mode): raise CheckpointError(f'{path} is no file')   # a pipe would be waited for
    if there.st_size > LARGEST: raise ValueError(f'it has more than {LARGEST:,} bytes')
    with open(path, 'rb') as file: return parse(file.read(), strict)
  except FileNotFoundError as error: raise CheckpointError(f'{path} is missing') from error
  except OSError as error: raise CheckpointError(f'{path} cannot be read: {error.strerror}') from error
  except ValueError as error: raise damaged(path, error) from error


def parse(text: str | bytes, strict: bool = True) -> Any:
  """Raises ValueError for what is no JSON, is not UTF-8, says a name twice, or is nested without measure."""
  try:
    text = text.decode('utf-8') if isinstance(text, bytes) else text   # json would take UTF-16, too
    found = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse if strict else None)
    _check_depth(found)
    return found
  except RecursionError: raise ValueError('its JSON is nested too deeply') from None
  except UnicodeDecodeError: raise ValueError('its JSON is not UTF-8') from None


def damaged(path, reason) -> CheckpointError:
  """What is raised of a file that cannot be trusted; in one line."""
  text = str(reason) if isinstance(reason, ValueError) else f'{type(reason).__name__}: {reason}'
  return CheckpointError(' '.join(f'{path} is damaged: {text}'.split()))


def _hash(data) -> str:
  return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs): raise ValueError('it says a name twice')
  return found


def _check_depth(data):
  """Raises RecursionError where something that reads or writes it all, level by level, might not come to an end."""
  level = [data]
  for _ in range(DEEPEST):
    parts = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
    level = [inner for part in parts for inner in part]
    if not level: return
  raise RecursionError


def _refuse(constant: str):
  raise ValueError(f'it holds {constant}, which is no JSON')
