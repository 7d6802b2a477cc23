"""What a user can be told. A command that catches one of these ends with its `exit_code`."""
import contextlib
import numbers
from collections.abc import Iterator
from typing import Any

Problem = tuple[str, Any, str]  # (field, value, what to write instead), as the `check` methods yield them


class ConfigError(ValueError):
  """A setting that cannot be used. Its text is ONE line: `field = value: fix`."""
  exit_code = 2

  def __init__(self, field: str, value: Any, fix: str):
    super().__init__(field, value, fix)
    self.field, self.value, self.fix = field, value, fix

  def __str__(self) -> str:
    value = repr(self.value)
    if len(value) > 120: value = value[:117] + '...'
    return ' '.join(f'{self.field} = {value}: {self.fix}'.split())


class IncompatibleError(ValueError):
  """What a config asks of a model that the model cannot give, in ONE line: a rule that finds nothing, groups that do not
  divide. `in_part` and `in_field` add which setting it was."""
  exit_code = 2
  part: tuple[str, Any] | None = None


@contextlib.contextmanager
def in_part(part: str, value: Any):
  """An IncompatibleError inside is one of this part ('techniques[0]') of a setting that is named further out."""
  try: yield
  except IncompatibleError as error:
    error.part = error.part or (part, value)
    raise


@contextlib.contextmanager
def in_field(field: str, value: Any):
  """An IncompatibleError inside becomes a ConfigError of this setting, with the name of what it holds."""
  try: yield
  except IncompatibleError as error:
    if error.part: field, value = f'{field}.{error.part[0]}', error.part[1]
    raise ConfigError(field, type(value).__name__, str(error)) from error


class CheckpointError(Exception):
  """No usable checkpoint where one is needed."""
  exit_code = 3


class NonFinite(Exception):
  """Training went non-finite and stopped with the last good state kept."""
  exit_code = 4


class WriteError(Exception):
  """What has to be kept cannot be written, in ONE line: no room, or no right to. What was kept before is as it was."""
  exit_code = 5


class OtherProcess(Exception):
  """Another process of the run did not answer, or has failed in a way of its own."""
  exit_code = 6


class DeviceFault(Exception):
  """A device does not compute, or does not keep, what it should, in ONE line: copies that must be equal are not. Nothing
  that is known to be wrong is saved; on another machine the same command goes on."""
  exit_code = 7


class Preempted(BaseException):
  """The machine was taken away, or somebody asked for the end; what there was to save is saved and the same command resumes.
  No Exception, as KeyboardInterrupt is none: it may be raised anywhere, also where whatever goes wrong is the user's."""
  exit_code = 42
  in_all = False   # whether all processes of a run raise it, at the same place


def at_least(config: Any, **least: float) -> Iterator[Problem]:
  """Problems of named fields of `config` that are below the given value or, where that is an int, not whole."""
  for field, minimum in least.items():
    value = getattr(config, field)
    whole = isinstance(minimum, int)
    kind = numbers.Integral if whole else numbers.Real
    # `not >=` instead of `<`, so that NaN is refused too.
    if not isinstance(value, kind) or isinstance(value, bool) or not value >= minimum:
      yield field, value, f'a {"whole " * whole}number of at least {minimum} is needed'


def fraction(config: Any, *fields: str) -> Iterator[Problem]:
  """Problems of named fields of `config` that are not strictly between 0 and 1."""
  for field in fields:
    value = getattr(config, field)
    if not isinstance(value, numbers.Real) or not 0 < value < 1:
      yield field, value, 'a number between 0 and 1 is needed'
