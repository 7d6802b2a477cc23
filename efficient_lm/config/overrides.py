"""Overrides of a config's fields from the command line: '--config.model.stacks[0].mlp.hidden=64'.

`ml_collections.config_flags` takes the dataclasses, reads the values by their fields' types and sets them. What it says
to a user who errs is a traceback, so the path is looked up here first and its errors become ConfigErrors.
Of its `DEFINE_config_file` this is the half without the file: a file that fails there fails late and says where not.
"""
import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from efficient_lm.config import fields
from efficient_lm.errors import ConfigError

NAME = 'config'
PREFIX = f'--{NAME}.'
_BOOLEANS = {'true': True, 'True': True, '1': True, 'false': False, 'False': False, '0': False}


def whole(text: str) -> int:
  """An int; a float that is one, such as 1e6, will do."""
  try:
    return int(text)
  except ValueError:
    number = float(text)
    if number != int(number): raise
    return int(number)


READERS = {int: whole, float: float, bool: _BOOLEANS.__getitem__, str: str}


class Leaf(flags.ArgumentParser):
  """Reads one value of type `kind`, or None; whether None is allowed there is the validation's business."""

  def __init__(self, kind):
    self.kind = kind

  def parse(self, argument):
    if not isinstance(argument, str) or argument == 'None': return _none_or(argument)
    if self.kind is Any: raise ValueError('is set in the config file; from here only its fields can be, or None')
    try:
      return READERS[self.kind](argument)
    except (ValueError, KeyError, OverflowError):
      raise ValueError(f'must be {fields.PLAIN[self.kind]}') from None


def _none_or(argument):
  return None if argument == 'None' else argument   # absl passes the present value, of any type, through its parser


def apply(config, words: Sequence[str]):
  """A copy of `config` with the overrides in `words` applied, in their order. Raises ConfigError."""
  for word in words: _check(config, word)
  for node in {type(node) for _, node in fields.walk(config) if fields.is_config(node)}: _resolve_annotations(node)
  for kind in (int, float, bool, str, Any): config_flags.register_flag_parser_for_type(kind, Leaf(kind))
  values = flags.FlagValues()
  argv = ['', *words]
  try:
    holder = config_flags.DEFINE_config_dataclass(NAME, config, flag_values=values, sys_argv=argv)
    values(argv)
  except flags.IllegalFlagValueError as error:   # 'flag --config.seed=x: must be a whole number'
    field, _, rest = str(error).removeprefix('flag --').partition('=')
    value, _, fix = rest.rpartition(': ')
    raise ConfigError(field, value, fix) from error
  except (flags.Error, ValueError, TypeError, LookupError, AttributeError) as error:
    raise ConfigError('--' + NAME, ' '.join(words), str(error)) from error
  return holder.value


def _check(config, word: str):
  path, given, text = word.removeprefix(PREFIX).partition('=')
  if not given: raise ConfigError(f'{NAME}.{path}', '', f'has no value: write {PREFIX}{path}=VALUE')
  present = fields.lookup(config, path, text, NAME)
  if path.endswith(']') and not fields.is_config(present):
    raise ConfigError(f'{NAME}.{path}', text, 'is an element of a tuple: write the whole tuple')
  if fields.is_config(present) and text != 'None':
    names = ', '.join(field.name for field in dataclasses.fields(present))
    raise ConfigError(f'{NAME}.{path}', text, f'is a {type(present).__name__}(…): override its fields {names}')
  if present is None and text != 'None' and (kind := _only_class(config, path)):
    raise ConfigError(f'{NAME}.{path}', text, f'must be a {kind.__name__}(…), which is set in the config file, or None')


def _only_class(config, path: str) -> type | None:
  """The dataclass that the field at `path` may hold, where it holds nothing else but None."""
  parent, _, name = path.rpartition('.')
  holder = fields.lookup(config, parent, '', NAME) if parent else config
  kinds = set(typing.get_args(typing.get_type_hints(type(holder))[name])) - {type(None)}
  return next(iter(kinds)) if len(kinds) == 1 and all(map(dataclasses.is_dataclass, kinds)) else None


def _resolve_annotations(cls: type):
  """config_flags reads `Field.type`, which is a string in a module that postpones its annotations."""
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls): field.type = hints[field.name]
