import math

import pytest

from efficient_lm.errors import (
  CheckpointError,
  ConfigError,
  DeviceFault,
  NonFinite,
  OtherProcess,
  Preempted,
  WriteError,
  at_least,
  fraction,
)


def test_a_config_error_is_one_line_whatever_it_quotes():
  message = str(ConfigError('config.train.steps', 'a\nb' + 'x' * 1000, 'must be\n a whole number'))
  assert '\n' not in message and len(message) < 250
  assert message.startswith('config.train.steps = ') and message.endswith(': must be a whole number')


def test_exit_codes_differ():
  kinds = (ConfigError, CheckpointError, NonFinite, WriteError, OtherProcess, DeviceFault, Preempted)
  assert [error.exit_code for error in kinds] == [2, 3, 4, 5, 6, 7, 42]


class Config:
  def __init__(self, size): self.size = size


@pytest.mark.parametrize('size, refused', [
  (1, False), (10 ** 9, False), (0, True), (-1, True), (1.0, True), (True, True), (math.nan, True), ('1', True)])
def test_too_small_wants_a_whole_number_of_at_least_the_bound(size, refused):
  assert bool(list(at_least(Config(size), size=1))) == refused


@pytest.mark.parametrize('size, refused', [
  (0.5, False), (0, True), (1, True), (-0.1, True), (math.nan, True), ('x', True)])
def test_not_fraction_wants_a_number_strictly_between_0_and_1(size, refused):
  assert bool(list(fraction(Config(size), 'size'))) == refused
