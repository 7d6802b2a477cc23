"""Keys follow settings and what was given; a record is whole or refused."""
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficient_lm.config import Train, Training
from efficient_lm.data import ByteTokenizer, SymbolTokenizer
from efficient_lm.errors import CheckpointError
from efficient_lm.formats import Int
from efficient_lm.runs import FromRun, record
from efficient_lm.techniques import Distill, Prune, Quantize, Rule


def train(**changes):
  return Train(training=Training(**dict(steps=5, batch_size=8, sequence_length=16) | changes))


def keys(stage, given='above', **sources):
  return record.stage_keys(stage, given, sources)


def test_a_key_changes_with_every_setting_and_with_what_is_given_but_not_with_how_often_is_logged():
  stages = [train(), train(batch_size=4), Quantize(), Quantize(sequences=3), Quantize(rules=(Rule(weights=Int()),)),
            dataclasses.replace(train(), techniques=(Prune(sparsity=0.5),)), Prune(sparsity=0.5)]
  found = [keys(stage, given)[0] for stage in stages for given in ('above', 'other')]
  assert len(set(found)) == len(found)
  assert keys(train()) == keys(train(log_every=3, eval_every=7, checkpoint_every=9, replay_every=2))


def test_a_training_with_more_steps_is_of_the_same_course_and_has_another_key():
  (key, course), (longer, same) = keys(train()), keys(train(steps=9))
  assert course == same and key != longer and keys(train(), 'other')[1] != course
  assert keys(Quantize())[1] != keys(Quantize(sequences=3))[1]


def test_a_source_counts_by_its_content_not_by_where_it_lies():
  taught = lambda path: dataclasses.replace(train(), techniques=(Distill(teacher=FromRun(path=path)),))
  assert keys(taught('a'), a='content') == keys(taught('b'), b='content') != keys(taught('a'), a='other')


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner)
                    | st.dictionaries(st.text(), inner)))
def test_a_hash_is_that_of_the_json_whatever_the_order_of_names(value):
  assert record.key_of(json.loads(json.dumps(value))) == record.key_of(value)


PLAN = (record.Planned('1_train', '1 train', 'k1'), record.Planned('2_quantize', '2 quantize', 'k2'))
RECORD = record.Record({'hash': 'h'}, 't', None, {'runs/base': 'k'}, PLAN)


def test_reading_is_the_inverse_of_writing(tmp_path):
  assert record.read(tmp_path) is None
  record.write(tmp_path, RECORD)
  assert record.read(tmp_path) == RECORD


@pytest.mark.parametrize('damage', ['', '{', '[]', '{"text": 1}', 'null', '{"text": {}, "tokenizer": "", "start": null, '
                                    '"sources": {}, "plan": [{"folder": "x"}]}'])
def test_a_damaged_record_is_one_line(tmp_path, damage):
  (tmp_path / 'run.json').write_text(damage)
  with pytest.raises(CheckpointError, match=r'run\.json is damaged') as caught: record.read(tmp_path)
  assert '\n' not in str(caught.value)


def commit(folder, step: int, key: str, **damage):
  entries = {'key': key, 'step': step}
  manifest = {'record': entries, 'record_crc32': record.crc32(entries)} | damage
  (folder / str(step) / 'manifest').mkdir(parents=True)
  (folder / str(step) / record.MANIFEST).write_text(json.dumps(manifest))


def test_a_commit_counts_under_its_present_key_only_and_if_it_is_whole(tmp_path):
  record.write(tmp_path, RECORD)
  assert record.committed(tmp_path, PLAN[0]) is None
  commit(tmp_path / 'stages' / '1_train', 4, 'k1')
  commit(tmp_path / 'stages' / '2_quantize', 4, 'of other settings')
  assert record.committed(tmp_path, PLAN[0])['step'] == 4 and record.committed(tmp_path, PLAN[1]) is None
  with pytest.raises(CheckpointError, match='not come to its last stage, 2 quantize'): record.chosen(tmp_path)
  assert record.chosen(tmp_path, 1) == PLAN[0]
  commit(tmp_path / 'stages' / '1_train', 6, 'k1', record_crc32=0)
  assert record.committed(tmp_path, PLAN[0])['step'] == 4, 'a damaged one is passed over'


def test_a_stage_whose_beginning_is_damaged_is_not_taken_for_one_that_has_none(tmp_path):
  """What it has saved may be of other settings, and would be taken up, or moved away."""
  record.begin(tmp_path, PLAN[0], 'course')
  path = tmp_path / 'stages' / '1_train' / 'begun.json'
  text = path.read_text()
  for content in (text.replace('course":', 'course ":'), text.replace('"course",', '"cours",'), text[:-3], '', '{}'):
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r'begun\.json is damaged'): record.course(tmp_path, PLAN[0])


def test_a_record_that_is_gone_from_a_run_that_has_begun_is_missed(tmp_path):
  """Without it the run would be taken for one of an earlier version."""
  record.write(tmp_path, RECORD)
  record.begin(tmp_path, PLAN[0], 'course')
  (tmp_path / 'run.json').unlink()
  with pytest.raises(CheckpointError, match=r'run\.json is missing') as caught: record.read(tmp_path)
  assert '\n' not in str(caught.value)


def test_the_tokenizer_is_the_one_that_the_run_was_trained_with(tmp_path):
  one, other = SymbolTokenizer('abc'), SymbolTokenizer('abd')
  for tokenizer in (one, ByteTokenizer()):
    record.write_tokenizer(tmp_path, tokenizer)
    record.write(tmp_path, dataclasses.replace(RECORD, tokenizer=tokenizer.key))
    assert record.tokenizer(tmp_path) == tokenizer
    record.write_tokenizer(tmp_path, other)   # whole, with its hash, and of another run
    with pytest.raises(CheckpointError, match=r'tokenizer\.json is not the tokenizer that the run was trained with'):
      record.tokenizer(tmp_path)


def test_what_a_stage_was_begun_of_is_known_afterwards(tmp_path):
  assert record.course(tmp_path, PLAN[0]) is None
  record.begin(tmp_path, PLAN[0], 'course')
  assert record.course(tmp_path, PLAN[0]) == 'course'
