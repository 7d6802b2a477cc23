import dataclasses
import json
import math
import re
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.config import fields, names
from efficient_lm.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class Leaves:
  whole: int = 1
  real: float = 0.5
  text: str = 'a'
  flag: bool = False
  maybe: int | None = None
  names: tuple[str, ...] = ()

  def check(self):
    if self.whole < 0: yield 'whole', self.whole, 'must be 0 or more'


@dataclasses.dataclass(kw_only=True)
class Nested:
  part: Leaves = dataclasses.field(default_factory=Leaves)
  parts: tuple[Leaves, ...] = (Leaves(),)
  anything: Any = dataclasses.field(default_factory=Leaves)
  optional: Any = None


names.remember([Leaves, Nested])   # as those of a config file are
numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
leaves = st.builds(Leaves, whole=st.integers(0, 2 ** 31 - 1), real=numbers, text=st.text(max_size=5), flag=st.booleans(),
                   maybe=st.none() | st.integers(-2 ** 31 + 1, 2 ** 31 - 1),
                   names=st.lists(st.text(max_size=3), max_size=3).map(tuple))
nested = st.builds(Nested, part=leaves, parts=st.lists(leaves, max_size=2).map(tuple), anything=leaves,
                   optional=st.none() | leaves)
few = settings(max_examples=30, deadline=None)


@few
@given(nested)
def test_json_round_trip_is_exact(config):
  again = fields.from_json(json.loads(json.dumps(fields.to_json(config), allow_nan=False)))
  assert again == config and repr(again) == repr(config)   # repr tells 1 from 1.0 and (1,) from [1]


@few
@given(nested, nested)
def test_difference_is_empty_exactly_for_equal_configs(a, b):
  assert not fields.difference(a, a)
  assert bool(fields.difference(a, b)) == (a != b)


def test_difference_names_the_smallest_parts():
  new = Nested(part=Leaves(whole=2), parts=(Leaves(), Leaves()))
  assert [line[0] for line in fields.difference(Nested(), new)] == ['config.part.whole', 'config.parts']


@pytest.mark.parametrize('change, path', [
  (dict(part=Leaves(whole='1')), 'config.part.whole'),
  (dict(part=Leaves(whole=True)), 'config.part.whole'),
  (dict(part=Leaves(whole=1.0)), 'config.part.whole'),
  (dict(part=Leaves(real=math.nan)), 'config.part.real'),
  (dict(part=Leaves(real=math.inf)), 'config.part.real'),
  (dict(part=Leaves(real=1e39)), 'config.part.real'),
  (dict(part=Leaves(whole=2 ** 31)), 'config.part.whole'),
  (dict(part=Leaves(maybe=-2 ** 31)), 'config.part.maybe'),
  (dict(part=Leaves(flag=1)), 'config.part.flag'),
  (dict(part=Leaves(text=None)), 'config.part.text'),
  (dict(part=Leaves(maybe='x')), 'config.part.maybe'),
  (dict(part=Leaves(names=['a'])), 'config.part.names'),
  (dict(part=Leaves(names=('a', 1))), 'config.part.names[1]'),
  (dict(part=None), 'config.part'),
  (dict(part=Nested()), 'config.part'),
  (dict(part=Leaves), 'config.part'),
  (dict(parts=(Leaves(), 3)), 'config.parts[1]'),
  (dict(anything=None), 'config.anything'),
  (dict(anything='x'), 'config.anything'),
  (dict(parts=(Leaves(whole=-1),)), 'config.parts[0].whole'),
])
def test_check_names_the_field_that_is_wrong(change, path):
  with pytest.raises(ConfigError) as caught: fields.check(Nested(**change))
  assert caught.value.field == path


@few
@given(nested)
def test_check_accepts_what_fits(config):
  fields.check(config)


def test_a_whole_number_fits_where_a_number_is_asked_for():
  for number in (1, 10 ** 12): fields.check(Nested(part=Leaves(real=number)))
  with pytest.raises(ConfigError, match='float32'): fields.check(Nested(part=Leaves(real=10 ** 400)))


def test_infinity_is_read_back():
  assert fields.from_json(json.loads(json.dumps(fields.to_json(Leaves(real=-math.inf)), allow_nan=False))).real == -math.inf


def test_a_field_may_ask_for_more():
  @dataclasses.dataclass(kw_only=True)
  class Large:
    count: int = dataclasses.field(default=2 ** 62, metadata=fields.WIDE)
    limit: float = dataclasses.field(default=math.inf, metadata=fields.INFINITE)
  fields.check(Large())
  with pytest.raises(ConfigError, match=r'2\^63'): fields.check(Large(count=2 ** 63))


@few
@given(nested)
def test_lookup_finds_what_walk_names(config):
  for path, value in fields.walk(config):
    if path: assert fields.lookup(config, path, '') is value


@pytest.mark.parametrize('path, hint', [
  ('prat', 'did you mean part?'), ('part.whol', 'did you mean whole?'), ('part.whole.x', 'has no fields'),
  ('parts[7].whole', 'has 1 elements'), ('parts.whole', 'config.parts[0].whole'), ('part[0]', 'is not a tuple'),
  ('part..whole', 'is not a path'), ('__class__', 'no such field'), ('part.__init__.__globals__', 'no such field'),
])
def test_lookup_says_what_is_wrong_with_a_path(path, hint):
  with pytest.raises(ConfigError, match=re.escape(hint)): fields.lookup(Nested(), path, '')


@pytest.mark.parametrize('name', [
  'efficient_lm.config.fields.check', 'efficient_lm.config.fields.dataclasses', 'efficient_lm.nowhere.Thing', 'Thing', '',
  None, 3, 'efficient_lm..errors.ConfigError', 'system', 'Any', 'dataclass',
])
def test_from_json_makes_nothing_but_dataclasses_that_a_config_can_hold(name):
  with pytest.raises(ConfigError, match='class'): fields.from_json({'class': name})


@pytest.mark.parametrize('name', [
  'os.system', 'subprocess.Popen', 'antigravity.Thing', 'efficient_lm_evil.Thing', 'gone.py:Mine'])
def test_a_class_from_elsewhere_is_not_looked_for_and_what_needs_it_says_so(name):
  before = set(sys.modules)
  read = fields.from_json({'class': name, 'command': 'ls'}, 'config.model')
  assert not {module for module in set(sys.modules) - before if not module.startswith('efficient_lm')}
  assert isinstance(read, names.Unread) and fields.to_json(read) == {'class': name, 'command': 'ls'}
  with pytest.raises(ConfigError, match='give --config'): getattr(read, 'command')  # noqa: B009 - the reading is what raises


def test_from_json_refuses_unknown_and_missing_fields():
  name = 'efficient_lm.models.spec.SwiGLU'
  with pytest.raises(ConfigError, match='no such field'): fields.from_json({'class': name, 'hidden': 1, 'width': 2})
  with pytest.raises(ConfigError, match='cannot be read'): fields.from_json({'class': name})
