"""Whatever a leaf of a config is set to: the run can be built, or is refused in one line before anything is written."""
import collections
import pathlib

import pytest

from efficient_lm.config import experiment, fields
from efficient_lm.data.corpus import Corpus
from efficient_lm.errors import ConfigError
from efficient_lm.runs.run import Run

ROOT = pathlib.Path(__file__).parent.parent.parent
FILES = ('baseline', 'moe', 'pruned', 'quantized', 'low_precision')   # that start from nothing
# What does not fit a field's type, what no program holds, and what is only just a number.
VALUES = ('-1', '0', '2147483647', str(10 ** 18), str(-10 ** 400), '1e30', '1e308', 'inf', '-inf', 'nan', '1e-30', '"x"',
          "'('", 'None', 'True', '()', '[1]', '{}')


FAULT = 'any leaf of a config of a wrong type, negative, zero, huge, infinite, NaN, misspelled'


@pytest.fixture
def opened_once(monkeypatch):
  """A corpus that is the same is not read again."""
  opened, read = {}, Corpus.open
  def once(corpus, **options):
    key = repr(corpus), options['seed']
    if key not in opened: opened[key] = read(corpus, **options)
    return opened[key]
  monkeypatch.setattr(Corpus, 'open', once)


@pytest.mark.parametrize('name', FILES)
def test_every_leaf_takes_any_value_or_refuses_it_in_a_line(name, tmp_path, opened_once, tried):
  file, workdir = str(ROOT / 'configs' / f'{name}.py'), tmp_path / 'run'
  whole, _ = experiment.load(file, [], None)
  leaves = [path for path, value in fields.walk(whole, 'config') if not fields.is_config(value)]
  ends = collections.Counter()
  for leaf in leaves:
    with pytest.raises(ConfigError, match='no such field'):
      experiment.load(file, [f'--{leaf}x=1'], None)
    ends['refused'] += 1
    for value in VALUES:
      try: Run(*experiment.load(file, [f'--{leaf}={value}'], None), workdir)
      except ConfigError as error:
        assert '\n' not in str(error) and len(str(error)) < 600 + len(value), (leaf, value)
        ends['refused'] += 1
      else: ends['built'] += 1
  assert not workdir.exists()
  assert ends['refused'] > 10 * len(leaves) and ends['built'] > len(leaves)
  tried(FAULT, ends.total(), **{'refused in a line, nothing written': ends['refused'],
                                'values that it may have': ends['built']})
