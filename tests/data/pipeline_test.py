import itertools
import threading

import numpy as np
import pytest

from efficient_lm.data.packing import Rows, Stream
from efficient_lm.data.pipeline import Batches, in_sequence
from efficient_lm.errors import ConfigError

LENGTH = 4


def make_rows(count):
  """Row r begins with the input r * LENGTH: rows can be told apart."""
  tokens = np.arange(count * LENGTH + 1)
  return Rows(Stream(tokens, np.array([0]), np.ones(len(tokens), np.int32)), LENGTH)


def batches(count=23, size=4, seed=0, **process):
  return Batches(make_rows(count), batch_size=size, seed=seed, **process)


def ids(batch):
  return (batch['inputs_BT'][:, 0] // LENGTH).tolist()


def equal(left, right):
  return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_three_epochs_with_five_interruptions_repeat_and_miss_nothing():
  plain = [ids(batches()[step]) for step in range(18)]
  seen, step = [], 0
  for stop in (1, 2, 7, 11, 16, 18):  # a new process each time, knowing only its step
    seen += [ids(batch) for batch in itertools.islice(batches().iterate(step), stop - step)]
    step = stop
  assert seen == plain
  flat = list(itertools.chain(*seen))
  for epoch in range(3): assert sorted(flat[epoch * 23:epoch * 23 + 23]) == list(range(23))


def test_every_epoch_and_every_seed_has_its_own_order():
  def epochs(seed):
    flat = [row for step in range(23) for row in ids(batches(seed=seed)[step])]
    return [tuple(flat[epoch * 23:epoch * 23 + 23]) for epoch in range(4)]
  orders = epochs(0) + epochs(1) + epochs(2**40)
  assert len(set(orders)) == len(orders)
  assert tuple(range(23)) not in orders


def test_the_iterator_is_random_access_in_order():
  data = batches()
  for start in (0, 5, 10**9):
    for step, batch in zip(range(start, start + 8), data.iterate(start)): assert equal(batch, data[step])


@pytest.mark.parametrize('count', [1, 2, 4])
def test_the_processes_together_have_the_global_batch(count):
  for step in (0, 5, 17):
    parts = [batches(process_index=index, process_count=count)[step] for index in range(count)]
    whole = batches()[step]
    for name in whole:
      np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])


@pytest.mark.parametrize('count', [1, 2, 4])
def test_the_processes_together_evaluate_every_row_in_as_many_batches(count):
  parts = [list(in_sequence(make_rows(23), batch_size=4, process_index=index, process_count=count))
           for index in range(count)]
  assert len({len(part) for part in parts}) == 1  # or the others would wait for ever
  rows = [ids(batch) for step in zip(*parts, strict=True) for batch in step]
  assert [row for batch in rows for row in batch][:23] == list(range(23))


def test_a_batch_that_does_not_divide_is_an_error():
  with pytest.raises(ConfigError, match='batch_size = 4'): batches(process_count=3)
  with pytest.raises(ConfigError): batches(size=0)
  with pytest.raises(IndexError): batches()[-1]


def test_fewer_rows_than_a_batch_are_repeated():
  assert sorted(ids(batches(count=2, size=4)[0])) == [0, 0, 1, 1]


def test_an_abandoned_iterator_leaves_no_thread():
  before = threading.active_count()
  iterator = batches().iterate()
  next(iterator)
  iterator.close()
  assert threading.active_count() <= before + 1  # grain may keep one idle


@pytest.mark.parametrize('size', [1, 3, 4, 23, 50])
def test_evaluation_reads_the_same_rows_whatever_the_batch_size(size):
  rows = make_rows(23)
  read = list(in_sequence(rows, batch_size=size))
  assert all(batch['inputs_BT'].shape == (size, LENGTH) for batch in read)
  real = np.concatenate([batch['inputs_BT'][batch['segments_BT'].any(1)] for batch in read])
  np.testing.assert_array_equal(real, rows[range(23)]['inputs_BT'])
