"""The loop over steps: when it logs, evaluates and saves, and how a signal, a full disk or diverging weights end it."""
import dataclasses
import os
import signal
import types

import numpy as np
import pytest

from efficient_lm.errors import NonFinite, Preempted, WriteError
from efficient_lm.system import interruption
from efficient_lm.training import trainer as train
from efficient_lm.training.health import Health, advised
from tests.training.tiny import Memory

pytestmark = pytest.mark.usefixtures('hears_hangup')


@dataclasses.dataclass
class Recorder:
  """Callbacks that write down what they were called for; the trainer's step is replaced by one that only counts."""
  monkeypatch: pytest.MonkeyPatch
  events: list = dataclasses.field(default_factory=list)

  def fit(self, first=0, refused=lambda step: 0, during=lambda step: None, signalled=None, health=None, **training):
    def step_function(state, loss, batch):
      step = state.step + 1
      self.events.append(('batch', batch))
      during(step)
      metrics = {'loss': np.float32(step), 'skipped_in_a_row': np.int32(refused(step)), 'layers': []}
      return types.SimpleNamespace(step=step, model='model'), metrics
    self.monkeypatch.setattr(train, 'compiled_step', lambda learner, accumulate: step_function)
    note = lambda name: lambda step, *more: self.events.append((name, step, more[-1] is True))
    def cut_off(step, model):
      os.kill(os.getpid(), signalled)
      interruption.check()
    evaluate = cut_off if signalled else note('evaluate')
    callbacks = train.Callbacks(note('log'), evaluate, note('save'), lambda step, numbers: None)
    settings = dict(steps=10, accumulate=1, log_every=4, eval_every=5, checkpoint_every=3, replay_every=0) | training
    return train.fit(types.SimpleNamespace(step=first), types.SimpleNamespace(loss=None), lambda step: step,
                     types.SimpleNamespace(**settings), callbacks, health)

  def at(self, name):
    return [event[1] for event in self.events if event[0] == name]


@pytest.fixture
def recorder(monkeypatch):
  return Recorder(monkeypatch)


def test_the_loop_logs_evaluates_and_saves_when_it_should_and_logs_and_saves_its_end(recorder):
  """What comes out of the last step is measured by whoever asked for the training."""
  assert recorder.fit().step == 10
  assert recorder.at('batch') == list(range(10)), 'step i + 1 takes batch i'
  assert recorder.at('log') == [1, 4, 8, 10]
  assert recorder.at('evaluate') == [5] and recorder.at('save') == [3, 6, 9, 10]
  assert recorder.events[-1] == ('save', 10, True), 'the last one is waited for'


def test_a_resumed_loop_goes_on_with_the_next_batch(recorder):
  recorder.fit(first=7)
  assert recorder.at('batch') == [7, 8, 9]


def test_a_finished_run_does_nothing(recorder):
  recorder.fit(first=10)
  assert recorder.events == []


def test_steps_refused_in_a_row_end_the_run_with_its_state_saved(recorder):
  with pytest.raises(NonFinite, match='10 steps in a row'):
    recorder.fit(steps=99, log_every=1, refused=lambda step: max(0, step - 5))
  assert recorder.events[-1] == ('save', 15, True)


def test_fewer_steps_refused_do_not(recorder):
  assert recorder.fit(log_every=1, refused=lambda step: train.MAX_REFUSED - 1).step == 10


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_its_state_saved(recorder, number):
  before = signal.getsignal(number)
  with pytest.raises(Preempted, match=f'{number.name} at step 4: saved'):
    recorder.fit(during=lambda step: os.kill(os.getpid(), number) if step == 4 else None)
  assert recorder.events[-1] == ('save', 4, True) and recorder.at('batch') == [0, 1, 2, 3]
  assert signal.getsignal(number) is before


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_an_evaluation_ends_the_run_there_with_its_state_saved(recorder, number):
  """Nothing is lost, and the evaluation is made good when the run is taken up (below)."""
  with pytest.raises(Preempted, match=f'{number.name} at step 5: saved'): recorder.fit(signalled=number)
  assert recorder.events[-1] == ('save', 5, True) and recorder.at('evaluate') == []


def test_a_signal_at_the_last_step_is_heard_once_its_state_is_saved(recorder):
  """Whatever would follow can be done by the same command."""
  with pytest.raises(Preempted, match='SIGTERM: stopped'):
    recorder.fit(during=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 10 else None)
  assert recorder.events[-1] == ('save', 10, True)


def test_a_signal_in_the_first_step_has_nothing_to_save(recorder):
  """That is the one which compiles."""
  with pytest.raises(Preempted, match='SIGTERM: stopped'):
    recorder.fit(during=lambda step: os.kill(os.getpid(), signal.SIGTERM))
  assert recorder.at('save') == []


@pytest.fixture
def interruptible():
  """As at a terminal: a shell has programs that it starts in the background ignore SIGINT."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_at_once(recorder, interruptible):
  def twice(step):
    for _ in range(2 * (step == 3)): os.kill(os.getpid(), signal.SIGINT)
  with pytest.raises(KeyboardInterrupt): recorder.fit(during=twice)
  assert recorder.at('save') == []


def failing(*outcomes):
  """A Saver of checkpoints each of whose saves fails or succeeds so."""
  left = list(outcomes)
  class Disk(Memory):
    def save(self, step, state, wait, sane=None, spared=None):
      if left.pop(0): raise WriteError('disk full')
  return train.Saver(Disk(), Health())


def test_one_save_that_fails_is_said_and_the_next_one_is_tried(caplog):
  saver = failing(True, False, True)
  for step in (1, 2): saver(step, None, False)
  assert [record.getMessage() for record in caplog.records] == ['disk full; training goes on until the next save']


def test_a_second_save_that_fails_ends_the_training_and_so_does_one_that_nothing_follows():
  saver = failing(True, True)
  saver(1, None, False)
  with pytest.raises(WriteError): saver(2, None, False)
  with pytest.raises(WriteError): failing(True)(1, None, True)


def test_a_save_that_succeeds_in_between_makes_good(caplog):
  saver = failing(True, False, True, False, True, True)
  for step in range(5): saver(step, None, False)
  assert len(caplog.records) == 3, 'of saves 0, 2 and 4'
  with pytest.raises(WriteError): saver(5, None, False)


def test_a_save_that_fails_in_the_background_is_noticed_at_the_next_one(caplog):
  class Slow(Memory):
    failing = True
    def wait(self):
      if self.kept and self.failing: raise WriteError('disk full')
  checkpoints = Slow()
  saver = train.Saver(checkpoints, Health())
  saver(1, {}, False), saver(2, {}, False)
  assert checkpoints.steps() == [1, 2] and len(caplog.records) == 1, 'the next one is tried'
  with pytest.raises(WriteError): saver(3, {}, False)
  checkpoints.failing = False


def noted(*windows) -> list[int | None]:
  """Steps that are noted as sane after each save, one after each of these windows of losses; None stands for refused."""
  checkpoints, health = Memory(), Health(uniform=2.0)
  saver, found = train.Saver(checkpoints, health), []
  for step, losses in enumerate(windows, 1):
    for loss in losses: health.see({'loss': loss} if loss is not None else {'loss': 9.0, 'skipped_in_a_row': 1})
    saver(step, {}, False)
    found.append(checkpoints.sane_step())
  return found


@pytest.mark.parametrize('windows, steps', [
  ([[1.0], [1.0], [1.0]], [None, 1, 2]),
  ([[1.0], [1.0, 99.0], [99.0]], [None, 1, 1]),            # the second update is the one that broke it
  ([[1.0], [1.0], [99.0], [99.0]], [None, 1, 1, 1]),       # the loss of step 2 is from before its own update
  ([[1.0], [None], [None], [1.0]], [None, None, None, 1]), # nothing is known, and nothing has changed, until the last
  ([[1.0], [None], [None], [99.0]], [None] * 4),
  ([[9.0], [1.0], [1.0]], [None, None, 2])])
def test_a_state_is_noted_as_sane_once_a_loss_of_its_own_is(windows, steps):
  assert noted(*windows) == steps


def test_a_diverged_training_says_from_where_it_may_be_taken_up(recorder):
  for kept, said in (({}, 'no state was saved'), ({3: 1.5}, 'sane, step 3, is kept in memory')):
    checkpoints = Memory()
    checkpoints.sane = kept
    with pytest.raises(NonFinite, match=f'10 steps in a row .*{said}') as error, advised('memory', checkpoints.sane_step):
      recorder.fit(steps=99, log_every=1, refused=lambda step: step)
    assert '\n' not in str(error.value)


def test_absurd_losses_end_a_training(recorder):
  """Of the recorder, each is the number of its step."""
  with pytest.raises(NonFinite, match='step 21: the loss has been far above that of a uniform guess'):
    recorder.fit(steps=99, log_every=1, health=Health(uniform=3.0))
