"""Imports that wait: configs, `--help` and error messages must not pay for packages they do not use."""
import importlib
import types


class _Lazy(types.ModuleType):

  def __getattr__(self, attribute: str):
    return getattr(importlib.import_module(self.__name__), attribute)


def lazy(name: str) -> types.ModuleType:
  """A stand-in for the module `name`, imported (or ImportError) at the first use of one of its attributes."""
  return _Lazy(name)
