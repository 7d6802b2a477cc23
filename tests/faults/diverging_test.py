"""Batches whose loss is not a number, and learning rates that no model bears: what is refused leaves no trace, and a
training that is lost ends in one line, says from where it may be taken up, and says so again when it is."""
import collections
import contextlib
import dataclasses
import math

import jax
import numpy as np
import pytest

from efficient_lm.config import experiment
from efficient_lm.data.pipeline import Batches
from efficient_lm.errors import ConfigError, NonFinite
from efficient_lm.runs import run
from efficient_lm.runs.checkpoint import Checkpoints, sane_step
from efficient_lm.training import trainer
from tests import minute
from tests.leaving import left, metrics

WARMUP, MIDDLE = 4, 7
LEARNED = 12   # steps, by which losses are those of a model that has learned something
REFUSED = 'losses and gradients that are NaN: first step, warm-up, middle, five in a row, for ever'
RATES = 'learning rates of 1e9, 1e30, inf'
# Numbers of the batches, from 0.
BAD = {'first step': {0}, 'warm-up': {2}, 'middle': {MIDDLE}, 'five in a row': set(range(5, 10)), 'last step': {11},
       'first and last': {0, 11}}


pytestmark = pytest.mark.usefixtures('one_device', 'quick_compilation')


@dataclasses.dataclass(kw_only=True)
class Exploding:
  """A schedule: a good rate for `after` steps, then another."""
  after: int
  rate: float

  def build(self, steps: int): return lambda taken: jax.numpy.where(taken < self.after, 1e-2, self.rate)


def made(steps: int = 12, **schedule):
  """An experiment whose losses fall below those of a uniform guess within a few steps."""
  quick = minute.get_config('quick')
  own = Exploding(**schedule) if 'after' in schedule else dataclasses.replace(
    quick.train.optimizer.schedule, warmup=WARMUP, **schedule)
  optimizer = dataclasses.replace(quick.train.optimizer, schedule=own)
  return dataclasses.replace(quick, train=dataclasses.replace(quick.train, steps=steps, optimizer=optimizer, eval_every=50))


def perform(workdir, config):
  """What the command does with a config that it has read."""
  experiment.validate(config, str(workdir))
  run.run(config, config, workdir)


@contextlib.contextmanager
def poisoned(bad, rows=slice(None)):
  """Inside, the batches with these numbers weigh their targets with NaN, those of all rows or of some."""
  original = Batches.iterate
  def iterate(self, start=0):
    for number, batch in enumerate(original(self, start), start):
      weights_BT = batch['weights_BT'].copy()
      if number in bad: weights_BT[rows] = np.nan
      yield batch | {'weights_BT': weights_BT}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Batches, 'iterate', iterate)
    yield


class Ever:
  """All numbers from one on."""
  def __init__(self, first): self.first = first
  def __contains__(self, number): return number >= self.first


def of_steps(workdir) -> dict[int, dict]:
  return {row['step']: row for row in metrics(workdir) if 'loss' in row}


@pytest.fixture(scope='module')
def untouched(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('untouched')
  perform(workdir, made())
  return of_steps(workdir)


def moments(long: bool): return BAD if long else {'five in a row': BAD['five in a row']}


def test_exactly_the_bad_batches_are_refused_and_what_comes_before_is_untouched(untouched, tmp_path, request, tried):
  counts = collections.Counter()
  for name, bad in moments(request.config.getoption('--long')).items():
    workdir = tmp_path / name.replace(' ', '_')
    with poisoned(bad): perform(workdir, made())
    rows = of_steps(workdir)
    assert [step - 1 for step, row in rows.items() if row['skipped_in_a_row']] == sorted(bad), name
    for step, row in rows.items():
      assert row['skipped'] == sum(number < step for number in bad), (name, step)
      if step <= min(bad): assert row == untouched[step], (name, step)
      elif step - 1 not in bad: assert math.isfinite(row['loss']) and math.isfinite(row['grad_norm']), (name, step)
    # The schedule stands still in a refused step: what it would have been is what the next one is.
    rates = [row['learning_rate'] for row in rows.values() if not row['skipped_in_a_row']]
    assert rates == [untouched[step]['learning_rate'] for step in range(1, len(rates) + 1)], name
    counts += {'batches refused, and no others': len(bad)}
  tried(REFUSED, len(moments(request.config.getoption('--long'))), **counts)


def test_a_batch_of_which_one_part_is_bad_is_refused_as_a_whole(tmp_path):
  """Of eight rows in four parts the third: nothing of the others reaches weights or moments."""
  config = made(steps=6)
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=4))
  for name, rows in (('one', 2), ('all', slice(None))):
    with poisoned({4}, rows): perform(tmp_path / name, config)
    assert [step - 1 for step, row in of_steps(tmp_path / name).items() if row['skipped_in_a_row']] == [4]
  assert left(tmp_path / 'one') == left(tmp_path / 'all')


def test_a_run_of_bad_batches_interrupted_in_their_midst_goes_on_as_if_it_had_not_been(tmp_path):
  """How many have been refused in a row is part of the state."""
  bad = set(range(3, 9))
  with poisoned(bad):
    for folder, interruptions in (('whole', ()), ('parts', (6,))):
      for step in interruptions: stopped_after(tmp_path / folder, step)
      perform(tmp_path / folder, made())
  assert left(tmp_path / 'whole') == left(tmp_path / 'parts')
  assert metrics(tmp_path / 'whole') == metrics(tmp_path / 'parts')


def stopped_after(workdir, step: int):
  """Performs so many steps, and ends as a kill would after the save."""
  class Stopped(Exception): pass
  original = trainer.Saver.__call__
  def saved(self, at, state, wait):
    original(self, at, state, True)
    if at >= step: raise Stopped
  with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
    patch.setattr(trainer.Saver, '__call__', saved)
    perform(workdir, made())


@pytest.mark.parametrize('first', [0, LEARNED])
def test_without_an_end_of_bad_batches_the_run_ends_in_a_line_with_what_it_had(tmp_path, first, tried):
  """And again, when it is taken up: nothing is worn away."""
  workdir = tmp_path / 'run'
  kept = []
  for _ in range(2):
    with poisoned(Ever(first)), pytest.raises(NonFinite) as error: perform(workdir, made(steps=60))
    assert 'steps in a row had a loss or gradient that is not finite' in str(error.value)
    assert '\n' not in str(error.value) and error.value.exit_code == 4
    kept.append(sane_step(workdir / 'checkpoints'))
  assert kept[0] == kept[1]
  if first: assert first - 2 <= kept[0] <= first, 'saved every other step'
  else: assert kept[0] is None
  tried(REFUSED, 2, **{'runs ended with 4 in one line': 2})


# Rates, and the good steps before them. All of them with --long.
SOME = ((1e9, None), (1e30, LEARNED))


@pytest.mark.parametrize('rate', [1e9, 1e30, 3e38])
@pytest.mark.parametrize('after', [None, LEARNED], ids=['from the first step', 'after good ones'])
def test_a_rate_that_no_model_bears_ends_in_a_line_that_names_a_good_state_where_there_is_one(
    tmp_path, rate, after, request, tried):
  if not request.config.getoption('--long') and (rate, after) not in SOME: pytest.skip('needs --long')
  config = made(steps=60, peak=rate) if after is None else made(steps=60, after=after, rate=rate)
  workdir = tmp_path / 'run'
  for _ in range(2):
    with pytest.raises(NonFinite) as error: perform(workdir, config)
    line = str(error.value)
    assert '\n' not in line and error.value.exit_code == 4
    step = sane_step(workdir / 'checkpoints')
    assert (f'step {step}, is kept' if after else 'no state was saved') in line, line
    if after: assert step <= after and sane_loss(workdir) < math.log(8)
  tried(RATES, 2, **{'ended with 4, naming a state with sane losses' if after else 'ended with 4, naming none': 2})


def sane_loss(workdir) -> float:
  with contextlib.closing(Checkpoints(workdir / 'checkpoints')) as checkpoints: return checkpoints.sane_loss()


def test_an_infinite_rate_is_refused_before_anything_is_written(tmp_path, tried):
  for rate in (math.inf, -math.inf, math.nan, -1.0, 0.0):
    with pytest.raises(ConfigError, match='peak'): perform(tmp_path / 'run', made(peak=rate))
  assert not (tmp_path / 'run').exists()
  tried(RATES, 5, **{'refused in one line': 5})
