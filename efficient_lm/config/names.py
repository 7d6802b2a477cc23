"""Short names of the classes that a config holds: what `config.json` stores, so that moving a file never breaks a saved run.

A dataclass of this package is known by its own name ('Transformer', 'Gptq'); the modules below are where they are found. One
of a user's own config file is 'mine.py:Mine', and found only while that file is given by --config: a `config.json` makes no
module run.
"""
import dataclasses
import functools
import importlib
import os
import sys
from typing import Any

from efficient_lm.errors import ConfigError

PACKAGE = 'efficient_lm'
NAMESPACES = ('config', 'runs', 'data', 'formats', 'models.spec', 'models.rope', 'models.moe.routing', 'techniques',
              'training.optimizers', 'training.train', 'interop.huggingface',
              'interop.gguf.source', 'interop.export', 'interop.targets')
_outside: dict[str, type] = {}   # those of config files that have been read, by name


@dataclasses.dataclass(frozen=True)
class Unread:
  """A part of a saved config whose class is the user's own, while the file that has it is not at hand. It may be shown and
  compared; what needs it says how to bring it."""
  path: str
  name: str
  fields: Any

  def __getattr__(self, attribute: str):
    if attribute.startswith('_') or attribute in ('check', 'check_training', 'caveats'): raise AttributeError(attribute)
    raise ConfigError(self.path, self.name, 'is a class of your own: give --config=FILE.py, the file that has it')


@functools.cache
def own_classes() -> dict[str, type]:
  """All dataclasses of this package that a config can hold, by name."""
  modules = [importlib.import_module(f'{PACKAGE}.{name}') for name in NAMESPACES]
  return {cls.__name__: cls for module in modules for cls in vars(module).values() if _is_own(cls)}


def _is_own(cls) -> bool:
  return isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__.split('.')[0] == PACKAGE


def name_of(cls: type) -> str:
  """The name that a class is stored by."""
  if cls.__module__.split('.')[0] == PACKAGE: return cls.__name__
  file = getattr(sys.modules.get(cls.__module__), '__file__', None) or cls.__module__
  return f'{os.path.basename(file)}:{cls.__qualname__}'


def remember(classes) -> None:
  """Makes classes from outside this package findable by their names: those that a config file has or uses."""
  for cls in classes:
    if isinstance(cls, type) and dataclasses.is_dataclass(cls) and not _is_own(cls): _outside[name_of(cls)] = cls


def class_named(name: Any) -> type | None:
  """The class stored by this name, or None for one that is not at hand. Names of earlier versions, which were those of
  modules ('efficient_lm.models.spec.SwiGLU', 'config_mine.Mine'), are understood. ValueError if it is no name of a class."""
  if not isinstance(name, str) or not name: raise ValueError('is not the name of a class')
  module, _, last = name.rpartition('.')
  if ':' not in name and module.startswith('config_'): name = f'{module.removeprefix("config_")}.py:{last}'
  if ':' in name: return _outside.get(name)
  if module and module.split('.')[0] != PACKAGE: return None
  if last not in own_classes(): raise ValueError('is not a class that a config can hold')
  return own_classes()[last]
