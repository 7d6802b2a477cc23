"""Whatever valid config is drawn: it is refused in one line before anything is written, or it runs to its end, and the
`config.json` that it leaves gives the same experiment and, run anew, the same numbers bit for bit."""
import collections
import shutil

import jax
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from efficient_lm.config import experiment
from efficient_lm.errors import ConfigError, IncompatibleError
from efficient_lm.runs import run
from tests import minute, random_configs
from tests.leaving import left, metrics

FEW, MANY = 3, 60
MOST_REFUSED = 0.5   # of all draws; a strategy that is mostly refused would state little


pytestmark = pytest.mark.usefixtures('one_device', 'quick_compilation')


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """The workdir of a run to start and to learn from, and a pattern of text files."""
  folder = tmp_path_factory.mktemp('base')
  made = minute.get_config('quick')
  made.model.dim, made.train.steps, made.data.source = random_configs.DIM, 1, random_configs.LANGUAGE
  perform(made, folder / 'run')
  for i in range(6): (folder / f'{i}.txt').write_text(f'some text {i}, ä€😀 ' * 20)
  return str(folder / 'run'), f'{folder}/*.txt'


def perform(made, workdir):
  """What the command does with a config that it has read."""
  experiment.validate(made, str(workdir))
  experiment.refuse_other(str(workdir), made)
  run.run(made, made, workdir)


def names(made) -> list[str]:
  """Of the techniques and stages of an experiment."""
  parts = [*made.techniques, *made.stages, *(one for stage in made.stages for one in getattr(stage, 'techniques', ()))]
  return [type(part).__name__ for part in parts]


def test_any_config_is_refused_in_a_line_or_runs_and_its_config_json_gives_the_same_again(base, tmp_path, request, tried):
  count = MANY if request.config.getoption('--long') else FEW
  ends, seen = collections.Counter(), collections.Counter()

  @settings(max_examples=count, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck))
  @given(random_configs.experiments(*base))
  def check(made):
    one, again = tmp_path / 'one', tmp_path / 'again'
    for folder in (one, again): shutil.rmtree(folder, ignore_errors=True)
    jax.clear_caches()
    try: perform(made, one)
    except (ConfigError, IncompatibleError) as error:
      assert '\n' not in str(error) and len(str(error)) < 600, made
      assert not one.exists(), f'refused after something had been written: {error}'
      ends['refused'] += 1
      print(error)
      return
    read = experiment.read(str(one))
    assert read == made and repr(read) == repr(made)
    perform(read, again)
    assert left(again) == left(one) and metrics(again) == metrics(one)
    ends['run'] += 1
    seen.update(names(made))

  check()
  print(dict(ends), dict(seen))
  assert ends['refused'] <= MOST_REFUSED * sum(ends.values())
  tried('random valid configs: all techniques and stages', ends.total(), **{
    'run twice, bit for bit': ends['run'], 'refused in one line': ends['refused']})
