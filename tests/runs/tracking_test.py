"""Logs stay JSON, monotone and whole, whatever killed the run; the picture of the expert load shows what it says."""
import errno
import json
import time

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from efficient_lm.runs import writing
from efficient_lm.runs.tracking import Tracker, load_heatmap, read


def track(folder, steps, resume_step=0, value=0.0, stage=1):
  tracker = Tracker(folder, stage, resume_step)
  for step in steps: tracker.scalars(step, {'loss': value + step}, stage)
  return tracker


def board(folder):
  events = EventAccumulator(str(folder / 'tensorboard'), size_guidance={'scalars': 0, 'tensors': 0})
  return events.Reload()


def test_every_line_is_json_even_when_numbers_are_not(tmp_path):
  tracker = Tracker(tmp_path)
  tracker.scalars(1, {'loss': float('nan'), 'norm': np.float32('inf'), 'low': -np.inf, 'tokens': np.int64(7)})
  tracker.scalars(2, {'loss': jax.numpy.float32(0.5), 'load': np.array([[1.0, np.nan]]), 'hash': 'inf0'})
  tracker.close()
  strict = lambda constant: pytest.fail(f'{constant} is not JSON')
  first, second = [json.loads(line, parse_constant=strict) for line in (tmp_path / 'metrics.jsonl').open()]
  for row in (first, second): assert isinstance(row.pop('crc32'), int)
  assert first == {'step': 1, 'stage': 1, 'loss': None, 'norm': None, 'low': None, 'tokens': 7,
                   'not_finite': {'loss': 'nan', 'norm': 'inf', 'low': '-inf'}}
  assert second == {'step': 2, 'stage': 1, 'loss': 0.5, 'load': [[1.0, None]], 'hash': 'inf0',
                    'not_finite': {'load': [[1.0, 'nan']]}}
  assert 'hash' not in board(tmp_path).Tags()['scalars'], 'a text is no curve'
  rows = read(tmp_path / 'metrics.jsonl')
  assert np.isnan(rows[0]['loss']) and rows[0]['norm'] == np.inf and np.isnan(rows[1]['load'][0][1])


def test_a_resume_cuts_what_will_be_done_again(tmp_path):
  track(tmp_path, range(1, 8)).close()
  track(tmp_path, range(5, 10), resume_step=4, value=100).close()
  rows = read(tmp_path / 'metrics.jsonl')
  assert [row['step'] for row in rows] == list(range(1, 10))
  assert [row['loss'] for row in rows] == [1, 2, 3, 4, 105, 106, 107, 108, 109]


def test_rows_of_an_earlier_version_are_read(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": "nan", "low": "-inf", "ok": 2.5}\n')
  row, = read(tmp_path / 'metrics.jsonl')
  assert np.isnan(row['loss']) and row['low'] == -np.inf and row['ok'] == 2.5


def test_a_resume_in_a_later_stage_keeps_what_earlier_ones_logged_and_measures_its_own_end_again(tmp_path):
  """Stages 1 and 3 train for 4 and 3 steps, stage 2 is none: its step is that of the training before it."""
  tracker = track(tmp_path, range(1, 5))
  tracker.scalars(4, {'eval/bits': 1.0}, 1, end=True)
  tracker.scalars(4, {'stage/2/bits': 1.1}, 2, end=True)
  for step in range(5, 8): tracker.scalars(step, {'loss': 0.0}, 3)
  tracker.scalars(7, {'eval/bits': 0.9}, 3, end=True)
  tracker.close()
  steps = lambda: [(row['stage'], row['step'], 'loss' in row) for row in read(tmp_path / 'metrics.jsonl')]
  first = [(1, step, True) for step in range(1, 5)] + [(1, 4, False)]
  Tracker(tmp_path, 3, 7, end=9).close()
  assert steps()[-1] == (3, 7, False), 'a stage that goes on for longer than before keeps what it measured'
  Tracker(tmp_path, 3, 7, end=7).close()
  assert steps()[-1] == (3, 7, True)
  Tracker(tmp_path, 3, 6, end=7).close()
  assert steps() == [*first, (2, 4, False), (3, 5, True), (3, 6, True)]
  Tracker(tmp_path, 2, 4, end=4).close()
  assert steps() == first, 'the stage itself is made again'


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
  track(tmp_path, range(1, 8)).close()
  track(tmp_path, range(5, 10), resume_step=4, value=100).close()
  shown = board(tmp_path).Scalars('loss')
  assert [event.step for event in shown] == list(range(1, 10))
  assert [event.value for event in shown] == [1, 2, 3, 4, 105, 106, 107, 108, 109]


def test_each_element_of_a_small_array_is_a_curve(tmp_path):
  tracker = Tracker(tmp_path)
  for step in (1, 2): tracker.scalars(step, {'load': [[1.0, 0.5], [step, 4.0]], 'large': np.ones((60, 256))})
  tracker.close()
  shown = board(tmp_path)
  assert shown.Tags()['scalars'] == ['load/0/0', 'load/0/1', 'load/1/0', 'load/1/1']
  assert [event.value for event in shown.Scalars('load/1/0')] == [1, 2]


@pytest.mark.parametrize('torn', ['{"step": 4, "lo', '{"step": 4', '\x00\x00', '4', '{"loss": 1}'])
def test_a_torn_last_line_is_repaired(tmp_path, torn):
  track(tmp_path, [1, 2, 3]).close()
  with (tmp_path / 'metrics.jsonl').open('a') as file: file.write(torn)
  assert [row['step'] for row in read(tmp_path / 'metrics.jsonl')] == [1, 2, 3]
  track(tmp_path, [4], resume_step=3).close()
  assert [json.loads(line)['step'] for line in (tmp_path / 'metrics.jsonl').open()] == [1, 2, 3, 4]


@pytest.fixture
def logged(tmp_path):
  """The file of eight rows, and what it holds."""
  tracker = track(tmp_path, range(1, 8))
  tracker.scalars(8, {'loss': np.nan, 'load': [[1.0, np.inf]], 'text "crc32": 1}': 2.0})
  tracker.close()
  path = tmp_path / 'metrics.jsonl'
  return path, path.read_bytes(), read(path)


def same(rows): return [json.dumps(row) for row in rows]   # NaN is no NaN


def test_of_every_bit_that_flips_only_the_rows_that_it_touches_are_lost_and_a_warning_counts_them(logged, caplog):
  path, before, rows = logged
  for bit in range(0, 8 * len(before), 3):
    content = bytearray(before)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    caplog.clear()
    kept, at = same(read(path)), before[:bit // 8].count(b'\n')
    lost = {at, at + 1} if before[bit // 8] == 10 else {at}
    assert kept == [row for i, row in enumerate(same(rows)) if i not in lost], bit
    warned, = caplog.messages
    assert str(path) in warned and warned.endswith((': 1', ': 2')) and '\n' not in warned


@pytest.mark.parametrize('damage', [b'\xff', b'', b'{"step": 3}', b'{"step": 3, "loss": 4.0, "crc32": 1}', b'[' * 5000,
                                    b'\0' * 100])
def test_a_resume_keeps_all_other_rows_and_what_was_dropped_beside(logged, caplog, damage):
  path, before, rows = logged
  lines = before.splitlines()
  path.write_bytes(b'\n'.join([*lines[:2], damage, *lines[3:5], damage, *lines[6:]]) + b'\n')
  Tracker(path.parent, 1, 8).close()
  kept = [row for row in rows if row['step'] not in (3, 6)]
  assert same(read(path)) == same(kept) and len(path.read_bytes().splitlines()) == 6
  warned, = [message for message in caplog.messages if 'kept in' in message]
  assert warned.endswith(': 2') and 'metrics.jsonl.damaged' in warned
  assert path.with_name('metrics.jsonl.damaged').read_bytes() == (damage + b'\n') * 2
  caplog.clear()
  Tracker(path.parent, 1, 8).close()
  assert not caplog.messages and path.with_name('metrics.jsonl.damaged').read_bytes() == (damage + b'\n') * 2


@pytest.mark.parametrize('damage', [lambda path: path.unlink(), lambda path: path.write_bytes(b'')])
def test_a_resume_tells_of_a_log_that_is_gone(logged, caplog, damage):
  """A run logs its first step, and so has a row whenever it has a state to go on from."""
  path, _, _ = logged
  Tracker(path.parent, 1, 8).close()
  assert not caplog.messages
  damage(path)
  Tracker(path.parent, 1, 8).close()
  assert caplog.messages == [f'{path} has no rows of what was done before step 8, from which the run goes on']


def test_a_file_of_an_earlier_version_is_repaired_row_by_row_and_gets_checksums(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo\x00ss": 2.5}\n{"step": 3, "loss": "nan"}\n')
  assert [row['step'] for row in read(path)] == [1, 3]
  track(tmp_path, [4], resume_step=3).close()
  assert [row['step'] for row in read(path)] == [1, 3, 4]
  assert all(b'"crc32"' in line for line in path.read_bytes().splitlines())
  path.write_bytes(path.read_bytes().replace(b'3.0', b'3.5'))
  assert [row['step'] for row in read(path)] == [3, 4], 'now a changed value is noticed'
  assert np.isnan(read(path)[0]['loss'])


def test_a_row_is_on_disk_before_the_next_step(tmp_path):
  tracker = track(tmp_path, [1])
  assert [row['step'] for row in read(tmp_path / 'metrics.jsonl')] == [1]
  tracker.close()


def test_a_fresh_start_forgets_an_earlier_run(tmp_path):
  track(tmp_path, [1, 2]).close()
  track(tmp_path, [1]).close()
  assert [row['step'] for row in read(tmp_path / 'metrics.jsonl')] == [1]
  assert [event.step for event in board(tmp_path).Scalars('loss')] == [1]


def test_histogram_image_text_and_hparams_reach_tensorboard(tmp_path):
  tracker = Tracker(tmp_path)
  tracker.histogram(1, 'weights', np.arange(12.0).reshape(3, 4))
  tracker.image(1, 'load', load_heatmap(np.ones((2, 4))))
  tracker.text(1, 'sample', 'def f():\n  pass')
  tracker.hparams({'train.steps': 3, 'data': None, 'tied': True}, {'bits_per_byte': 1.5})
  tracker.close()
  tags = board(tmp_path).Tags()
  assert 'weights' in tags['histograms'] and 'load' in tags['images']
  assert any('sample' in tag for tag in tags['tensors'])
  table = EventAccumulator(str(tmp_path / 'tensorboard/hparams')).Reload()
  assert [event.value for event in table.Scalars('result/bits_per_byte')] == [1.5]   # no point of the curve of that name


def test_only_the_first_process_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  tracker = track(tmp_path / 'run', [1])
  tracker.histogram(1, 'a', [1.0]), tracker.text(1, 'a', 'b'), tracker.hparams({}, {})
  tracker.image(1, 'a', np.zeros((2, 2, 3), np.uint8)), tracker.close()
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('layers, experts', [(1, 4), (4, 8), (27, 256)])
def test_a_heatmap_is_a_picture_of_any_size_of_model(layers, experts):
  picture = load_heatmap(np.ones((layers, experts)))
  assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
  assert max(picture.shape) < 1600


def test_balance_is_white_and_experts_never_chosen_are_black():
  balanced, dead = load_heatmap(np.ones((2, 4))), load_heatmap(np.zeros((2, 4)))
  middle = (balanced.shape[0] // 2, balanced.shape[1] // 3)
  assert balanced[middle].min() > 230 and dead[middle].max() == 0


def test_one_load_has_one_colour_whatever_else_is_in_the_picture():
  calm, wild = load_heatmap([[2.0, 1.0, 0.5, 0.5]]), load_heatmap([[2.0, 1.0, 0.25, 0.75 * 8]])
  row, column = calm.shape[0] // 2, calm.shape[1] // 6   # in the first expert's cell
  assert (calm[row, column] == wild[row, column]).all() and calm[row, column, 0] > calm[row, column, 2]


class Disk:
  """A file without buffer that takes `room` bytes."""
  def __init__(self, file, room): self.file, self.room = file, room

  def write(self, data):
    if not self.room: raise OSError(errno.ENOSPC, 'No space left on device')
    taken = data[:self.room]
    self.room -= len(taken)
    return self.file.write(taken)

  def __getattr__(self, name): return getattr(self.file, name)


@pytest.mark.parametrize('room', [0, 1, 40, 100])
def test_a_full_disk_leaves_out_whole_rows_and_is_said_once(tmp_path, caplog, monkeypatch, room):
  monkeypatch.setattr(writing, '_said', set())
  tracker = track(tmp_path, [1])
  tracker.file = disk = Disk(tracker.file, room)
  for step in (2, 3, 4): tracker.scalars(step, {'loss': 1.0})
  disk.room = 10 ** 6
  tracker.scalars(5, {'loss': 1.0})
  tracker.close()
  lines = [json.loads(line)['step'] for line in (tmp_path / 'metrics.jsonl').open()]
  assert lines[0] == 1 and lines[-1] == 5 and lines == sorted(set(lines)) and len(lines) < 5
  said, = [record.getMessage() for record in caplog.records]
  assert said.startswith(f'{tmp_path}/metrics.jsonl cannot be written: No space left on device') and 'bytes free' in said


def test_a_full_disk_neither_ends_nor_blocks_tensorboard(tmp_path, monkeypatch):
  """Its queue holds ten events: whoever adds more waits for a writer that must not have ended."""
  from efficient_lm.runs import tracking
  opened = []
  monkeypatch.setattr(tracking.Lasting, 'open', classmethod(lambda cls, path: opened.append(cls(path)) or opened[-1]))
  tracker = track(tmp_path, range(1, 4))
  while opened[0].file.tell() < 230: time.sleep(0.01)   # it writes three rows, 235 bytes with what is before, in a thread
  opened[0].file = disk = Disk(opened[0].file, 10)
  for step in range(4, 60): tracker.scalars(step, {'loss': 1.0})
  while disk.room: time.sleep(0.01)
  time.sleep(0.2)
  disk.room = 10 ** 6
  for step in range(60, 80): tracker.scalars(step, {'loss': 1.0})
  tracker.close()
  steps = [event.step for event in board(tmp_path).Scalars('loss')]
  assert steps[0] == 1 and steps[-1] == 79 and len(steps) < 79, 'what follows a gap is read'


@pytest.mark.parametrize('values', [[np.nan], [np.inf, -np.inf], [np.nan, 1.0], [3e38, -3e38], [1e25], [0.0], [1e-45], []])
def test_no_numbers_keep_tensorboard_from_logging(tmp_path, values):
  tracker = track(tmp_path, [1])
  tracker.histogram(1, 'weights', values)
  tracker.image(1, 'load', load_heatmap([values or [0.0]]))
  tracker.hparams({'peak': float('inf')}, {'bits_per_byte': float('nan')})
  tracker.close()
  assert board(tmp_path).Tags()['histograms'] == ['weights'] * bool(np.isfinite(values).any())


def test_what_has_been_logged_of_a_step_is_known(tmp_path):
  tracker = track(tmp_path, [1, 2])
  assert tracker.has(2, 'loss')
  assert not (tracker.has(3, 'loss') or tracker.has(2, 'eval') or tracker.has(2, 'loss', stage=2))
  tracker.close()
