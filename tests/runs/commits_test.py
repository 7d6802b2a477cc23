"""What a stage leaves is there as a whole or not at all."""
import contextlib
import dataclasses
import os

import jax
import numpy as np
import pytest

from efficient_lm.errors import CheckpointError, NonFinite
from efficient_lm.formats import Group, Int
from efficient_lm.runs import commits, ledger, record
from efficient_lm.runs.record import Planned
from efficient_lm.techniques import Quantize, Rule
from tests.compressing import Context, model_of

PLANNED = Planned('2_quantize', '2 quantize', 'key')
ROW = ledger.Row(stage='2 quantize', notes=('a note',), quality=ledger.Quality(bits_per_byte=2.5, perplexity=4.0))


def quantized():
  return Quantize(rules=(Rule(weights=Int(bits=4, scales=Group(size=8))),))(model_of(), Context())[0]


@pytest.fixture(scope='module')
def model(): return quantized()


def test_all_that_was_left_comes_back(tmp_path, model):
  commits.commit(tmp_path, PLANNED, 7, model, ROW)
  loaded = commits.load(tmp_path, PLANNED)
  assert jax.tree.structure(loaded) == jax.tree.structure(jax.tree.map(lambda leaf: leaf, model))
  for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(model), strict=True):
    assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
  assert jax.tree.structure(commits.abstract(tmp_path, PLANNED)) == jax.tree.structure(jax.eval_shape(lambda: model))
  left = record.committed(tmp_path, PLANNED)
  assert left['step'] == 7 and ledger.row_of(left['row']) == ROW
  assert [line['path'] for line in left['weights']] and record.bytes_on_disk(tmp_path, PLANNED) > 0


def test_another_key_is_another_commit(tmp_path, model):
  commits.commit(tmp_path, PLANNED, 7, model, ROW)
  other = dataclasses.replace(PLANNED, key='other')
  assert record.committed(tmp_path, other) is None
  commits.commit(tmp_path, other, 7, model, dataclasses.replace(ROW, notes=('changed',)))
  assert record.committed(tmp_path, PLANNED) is None
  assert record.committed(tmp_path, other)['row']['notes'] == ['changed'], 'also where step and arrays are the same'


def test_a_model_that_is_not_finite_is_not_committed(tmp_path, model):
  broken = jax.tree.map(lambda leaf: leaf * float('nan') if leaf.dtype == 'float32' else leaf, model)
  with pytest.raises(NonFinite): commits.commit(tmp_path, PLANNED, 7, broken, ROW)
  assert record.committed(tmp_path, PLANNED) is None


@pytest.mark.parametrize('call', ['rename', 'replace'])
def test_a_kill_at_any_rename_leaves_the_old_or_the_new(tmp_path, model, monkeypatch, call):
  """Renames are the moments at which what is written becomes visible."""
  commits.commit(tmp_path, PLANNED, 7, model, ROW)
  other = dataclasses.replace(PLANNED, key='other')
  original, count = getattr(os, call), [0]

  class Killed(Exception): pass

  for moment in range(1, 20):
    count[0] = 0
    def counted(*arguments, moment=moment, **words):
      count[0] += 1
      if count[0] == moment: raise Killed
      return original(*arguments, **words)
    with monkeypatch.context() as patch:
      patch.setattr(os, call, counted)
      with contextlib.suppress(Exception):   # Orbax wraps what its threads raise
        commits.commit(tmp_path, other, 7, model, ROW)
    left = record.committed(tmp_path, PLANNED) or record.committed(tmp_path, other)
    commits.commit(tmp_path, PLANNED, 7, model, ROW)
    assert record.committed(tmp_path, PLANNED)
    if count[0] < moment: break
    assert left is None or left['step'] == 7
  assert count[0] < moment, 'all moments were tried'


def test_the_ledger_ends_where_the_commits_do(tmp_path, model):
  plan = (Planned('1_train', '1 train', 'a'), PLANNED, Planned('3_convert', '3 convert', 'c'))
  commits.commit(tmp_path, plan[0], 3, model, dataclasses.replace(ROW, stage='1 train'))
  commits.commit(tmp_path, plan[2], 9, model, dataclasses.replace(ROW, stage='3 convert'))
  assert [row.stage for row in commits.write_ledger(tmp_path, plan)] == ['1 train'] == [
    row.stage for row in ledger.read(tmp_path / 'ledger.json')]
  commits.commit(tmp_path, PLANNED, 7, model, ROW)
  assert [row.stage for row in commits.write_ledger(tmp_path, plan)] == ['1 train', '2 quantize', '3 convert']


def test_what_is_not_there_is_one_line(tmp_path, model):
  commits.commit(tmp_path, PLANNED, 7, model, ROW)
  array = max((file for file in (tmp_path / 'stages/2_quantize/7/model').rglob('*') if file.is_file()),
              key=lambda file: file.stat().st_size)
  content = bytearray(array.read_bytes())
  content[len(content) // 2] ^= 255
  array.write_bytes(content)
  with pytest.raises(CheckpointError, match=r'none of the checkpoints in .* is intact'): commits.load(tmp_path, PLANNED)
