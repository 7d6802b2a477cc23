"""What a stage is given: text that follows what was trained on, the same at every call."""
import dataclasses
import itertools

import jax
import numpy as np
import pytest

from efficient_lm.errors import NonFinite, Preempted, WriteError
from efficient_lm.parallel.sharding import single_device_mesh
from efficient_lm.runs.context import Context
from tests import minute


@pytest.fixture(scope='module')
def corpus():
  return minute.get_config('quick').data.open(seed=0, process_index=0, process_count=1)


def context(corpus, folder, tokens_seen=0, **changes):
  training = dataclasses.replace(minute.get_config('quick').train, **changes)
  return Context(key=jax.random.key(0), mesh=single_device_mesh(), corpus=corpus, folder=folder, field='config.stages[0]',
                 tokens_seen=tokens_seen, training=training, monitor=None)


def inputs(batches): return [np.asarray(batch['inputs_BT']) for batch in batches]


def test_calibration_reads_what_follows_what_was_trained_on(corpus, tmp_path):
  training = minute.get_config('quick').train
  trained = corpus.batches(batch_size=training.batch_size, sequence_length=training.sequence_length)
  after = inputs(itertools.islice(trained.iterate(3), 2))
  made = context(corpus, tmp_path, tokens_seen=3 * training.tokens_per_step)
  for _ in range(2): np.testing.assert_array_equal(inputs(made.batches(2)), after)
  halves = context(corpus, tmp_path, tokens_seen=3 * training.tokens_per_step, batch_size=training.batch_size // 2)
  np.testing.assert_array_equal(np.concatenate(inputs(halves.batches(4))), np.concatenate(after))


def test_what_is_saved_stays_in_the_stages_folder(corpus, tmp_path):
  made = context(corpus, tmp_path / 'checkpoints')
  assert not (tmp_path / 'checkpoints').exists()
  with made: made.checkpoints.save(1, {'model': {'a': np.ones(2, np.float32)}})
  assert (tmp_path / 'checkpoints' / '1').is_dir()


def test_a_context_that_saves_nothing_leaves_nothing(corpus, tmp_path):
  with context(corpus, tmp_path / 'checkpoints'): pass
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('error, raised', [(None, WriteError), (Preempted, WriteError), (NonFinite, NonFinite)])
def test_a_save_that_fails_last_is_told_but_does_not_hide_what_failed_before(corpus, tmp_path, caplog, error, raised):
  """A signal's code says that all is saved: it is not to be had where it is not."""
  made = context(corpus, tmp_path / 'run' / 'checkpoints')
  (tmp_path / 'run').mkdir()
  with pytest.raises(raised), made:
    made.checkpoints.save(1, {'model': {'a': np.ones(2, np.float32)}}, wait=True)
    made.checkpoints.close = lambda: fail()
    if error: raise error('before')
  assert ('no room' in caplog.text) == (raised is NonFinite)


def fail(): raise WriteError('no room')
