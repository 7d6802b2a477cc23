"""Nested dataclasses as data: check them, find a field by its path, compare two of them, write them down and read them.

A path reads as it would in Python: 'model.stacks[0].mlp.hidden'. Nothing here knows what an experiment is, and nothing
here is heavy, so that a wrong config is refused before JAX is loaded.
"""
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from efficient_lm.config.names import Unread, class_named, name_of
from efficient_lm.errors import ConfigError
from efficient_lm.models.added import stored

PLAIN = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a text', types.NoneType: 'None'}
Problem = tuple[str, Any, str]   # path, value, what would be right
# What a field may say in its metadata: that a whole number may need 64 bits (bytes, tokens, seeds), that a number may be
# infinite. Programs count in 32 bits and compute in float32, in which larger numbers are infinite.
WIDE, INFINITE = {'wide': True}, {'infinite': True}
LARGEST_FLOAT = 3.4028234663852886e38


def is_config(value) -> bool:
  """Whether `value` is an instance of a dataclass (and not the class itself)."""
  return dataclasses.is_dataclass(value) and not isinstance(value, type)


def brief(value) -> str:
  """`value` as it would be written in a config, cut to what fits into a line."""
  text = f'{type(value).__name__}(…)' if is_config(value) else repr(value)
  return text if len(text) <= 60 else text[:57] + '…'


def join(path: str, name: str | int) -> str:
  """The path of a field, or of an element, of what lies at `path`."""
  if isinstance(name, int): return f'{path}[{name}]'
  return f'{path}.{name}' if path else name


def walk(value, path: str = '') -> Iterator[tuple[str, Any]]:
  """Every value in `value` with its path, itself first."""
  yield path, value
  if is_config(value):
    for field in dataclasses.fields(value): yield from walk(getattr(value, field.name), join(path, field.name))
  elif isinstance(value, tuple):
    for i, element in enumerate(value): yield from walk(element, join(path, i))


def check(config, path: str = 'config') -> None:
  """Raises ConfigError for the first value that is not of its field's type, else for the first of all `check()`s."""
  for where, value, fix in type_problems(config, type(config), path): raise ConfigError(where, value, fix)
  for where, node in walk(config, path):
    for field, value, fix in getattr(node, 'check', tuple)(): raise ConfigError(join(where, field), value, fix)


def type_problems(value, annotation, path: str) -> Iterator[Problem]:
  """Problems of the parts of `value` whose type is not what `annotation` says."""
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if isinstance(value, type): yield path, value.__name__, f'is a class: write {value.__name__}(…)'
  elif origin in (typing.Union, types.UnionType): yield from _type_problems_of_union(value, args, path)
  elif origin is tuple and not isinstance(value, tuple): yield path, value, 'must be a tuple, such as (a, b) or (a,)'
  elif origin is tuple:
    kinds = args[:1] * len(value) if args[1:] == (...,) else args
    if len(kinds) != len(value): yield path, value, f'must be a tuple of {len(kinds)}'
    for i, kind in enumerate(kinds[:len(value)]): yield from type_problems(value[i], kind, join(path, i))
  elif annotation in PLAIN:
    if not _is_plain(value, annotation): yield path, value, f'must be {PLAIN[annotation]}'
  elif not is_config(value) or not (annotation is Any or isinstance(value, annotation)):
    # Any stands for a part that has no base class on purpose: whatever dataclass can build it.
    kind = 'dataclass of efficient_lm, or one of yours' if annotation is Any else f'{annotation.__name__}(…)'
    yield path, value, f'must be a {kind}'
  else: yield from _type_problems_of_fields(value, path)


def _type_problems_of_fields(config, path: str) -> Iterator[Problem]:
  hints = typing.get_type_hints(type(config))
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if value is None and field.default is None and hints[field.name] is Any: continue
    where, kind = join(path, field.name), hints[field.name]
    problems = list(type_problems(value, kind, where))
    yield from problems
    if problems or not isinstance(value, int | float): continue
    for fix in _size_problems(value, float in (kind, *typing.get_args(kind)), field.metadata): yield where, value, fix


def _size_problems(value: int | float, real: bool, metadata) -> Iterator[str]:
  """What would be right for a number that no program here can hold; real: whether it stands for a float."""
  bits = 63 if metadata.get('wide') else 31
  if not real: found = abs(value) >= 2 ** bits and f'must be below 2^{bits} in size'
  elif isinstance(value, float) and math.isinf(value): found = not metadata.get('infinite') and 'must be finite'
  else: found = abs(value) > LARGEST_FLOAT and 'must be at most 3.4e38 in size, the largest number of float32'
  if found: yield found


def _type_problems_of_union(value, kinds, path: str) -> Iterator[Problem]:
  found = [list(type_problems(value, kind, path)) for kind in kinds]
  if not all(found): return
  inner = [problems for problems in found if problems[0][0] != path]
  if inner: yield from inner[0]   # the right class, wrong inside
  else: yield path, value, ' or '.join([found[0][0][2], *(c[0][2].removeprefix('must be ') for c in found[1:])])


def _is_plain(value, kind: type) -> bool:
  if kind is float: return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value   # not NaN
  return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def lookup(config, path: str, given: str, root: str = 'config'):
  """The value at `path`. A path that leads nowhere raises ConfigError, which shows the text `given` for it, the field
  that was likely meant, and those that there are."""
  where, value = root, config
  if not re.fullmatch(r'\w+(\[\d+\])*(\.\w+(\[\d+\])*)*', path):
    raise ConfigError(join(root, path), given, f'is not a path: write {root}.field or {root}.field[0].field')
  for name, index in re.findall(r'(\w+)|\[(\d+)\]', path.replace('[', ' [')):
    if index: value, where = _element(value, int(index), where, given), join(where, int(index))
    else: value, where = _member(value, name, where, given), join(where, name)
  return value


def _element(value, index: int, where: str, given: str):
  if not isinstance(value, tuple): raise ConfigError(join(where, index), given, f'{where} is not a tuple')
  if index >= len(value):
    raise ConfigError(join(where, index), given, f'{where} has {len(value)} elements, numbered from 0')
  return value[index]


def _member(value, name: str, where: str, given: str):
  if isinstance(value, tuple):
    raise ConfigError(join(where, name), given, f'{where} is a tuple of {len(value)}: write {where}[0].{name}')
  if not is_config(value): raise ConfigError(join(where, name), given, f'{where} is {brief(value)} and has no fields')
  names = [field.name for field in dataclasses.fields(value)]
  if name in names: return getattr(value, name)
  close = difflib.get_close_matches(name, names, 1)
  hint = f'did you mean {close[0]}? ' if close else ''
  raise ConfigError(join(where, name), given, f'no such field; {hint}{type(value).__name__} has {", ".join(names)}')


def difference(old, new, path: str = 'config') -> list[tuple[str, Any, Any]]:
  """(path, old value, new value) of the smallest parts in which two configs differ."""
  if is_config(old) and type(old) is type(new):
    pairs = [(f.name, getattr(old, f.name), getattr(new, f.name)) for f in dataclasses.fields(old)]
  elif isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
    pairs = [(i, *pair) for i, pair in enumerate(zip(old, new, strict=True))]
  else:
    return [] if old == new else [(path, old, new)]
  return [line for name, a, b in pairs for line in difference(a, b, join(path, name))]


def to_json(value):
  """`value` as json.dumps takes it: a dataclass becomes {'class': its short name, field: value …}, a tuple a list. Fields
  that came later (`models.added`) are left out at their defaults."""
  if isinstance(value, tuple): return [to_json(element) for element in value]
  if isinstance(value, float) and not math.isfinite(value): return {'float': str(value)}   # JSON has no infinity
  if isinstance(value, Unread): return {'class': value.name, **value.fields}
  if not is_config(value): return value
  fields = {field.name: to_json(getattr(value, field.name)) for field in stored(value)}
  return {'class': name_of(type(value)), **fields}


def from_json(data, path: str = 'config'):
  """The inverse of `to_json`. A dataclass of a user's own file that is not at hand becomes an `Unread`. Raises
  ConfigError."""
  if isinstance(data, list): return tuple(from_json(element, join(path, i)) for i, element in enumerate(data))
  if not isinstance(data, dict): return data
  if set(data) == {'float'} and data['float'] in ('inf', '-inf'): return float(data['float'])
  try: cls = class_named(data.get('class'))
  except ValueError as error: raise ConfigError(path, data.get('class'), str(error)) from error
  given = {name: value for name, value in data.items() if name != 'class'}
  if cls is None: return Unread(path, data['class'], given)
  fields = {name: from_json(value, join(path, name)) for name, value in given.items()}
  unknown = set(fields) - {field.name for field in dataclasses.fields(cls)}
  for name in sorted(unknown): raise ConfigError(join(path, name), fields[name], f'{cls.__name__} has no such field')
  try:
    return cls(**fields)
  except TypeError as error:
    raise ConfigError(path, data['class'], f'cannot be read: {error}') from error
