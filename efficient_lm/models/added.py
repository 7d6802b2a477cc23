"""Fields that descriptions have got since runs were stored.

A run's config, and the keys of its stages, are made of the fields of its descriptions. So a field that came later is not
written where it has its default: what a run of an earlier version has made is not made again for a field that it never had.
"""
import dataclasses
from typing import Any


def added(default: Any = None, *, make: Any = None):
  """A field that came later: with this default, or the one that `make` returns."""
  kind = dict(default=default) if make is None else dict(default_factory=make)
  return dataclasses.field(**kind, metadata={'added': True})


def stored(config) -> list[dataclasses.Field]:
  """The fields of a dataclass that are written down."""
  return [field for field in dataclasses.fields(config)
          if not field.metadata.get('added') or getattr(config, field.name) != _default(field)]


def _default(field):
  return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
