"""Which model a run has at a time: that of a training under way, of its last stage, of the stage asked for."""
import dataclasses
import shutil

import jax
import numpy as np
import pytest

from efficient_lm.errors import CheckpointError
from efficient_lm.formats import Int
from efficient_lm.runs import commits, loading, record, run
from efficient_lm.techniques import Quantize, Rule
from tests import minute


def quick(**changes):
  return dataclasses.replace(minute.get_config('quick'), **changes)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """Of two stages."""
  folder = tmp_path_factory.mktemp('run')
  made = quick(stages=(Quantize(rules=(Rule(weights=Int()),)),))
  run.run(made, made, folder)
  return folder


def same(a, b) -> bool:
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


def test_each_stage_has_its_model_and_the_last_is_the_default(workdir):
  kinds = [loading.load_model(workdir, stage=stage).stacks[0].blocks.mlp.up.kind for stage in (1, 2, None)]
  assert kinds[0] == 'float32' and kinds[1] == kinds[2] != 'float32'


def test_a_model_is_known_by_the_key_of_its_stage(workdir):
  first, last = (planned.key for planned in record.read(workdir).plan)
  assert first != last and [loading.key(workdir, stage) for stage in (1, 2, None)] == [first, last, last]


@pytest.mark.parametrize('stage', [1, 2])
def test_shapes_are_those_of_the_model(workdir, stage):
  shapes, model = loading.abstract_model(workdir, stage), loading.load_model(workdir, stage=stage)
  assert jax.tree.structure(shapes) == jax.tree.structure(jax.eval_shape(lambda: model))


def test_on_a_mesh_it_is_the_same(workdir, mesh):
  with mesh(2, 2, 1, 2):
    spread = loading.load_model(workdir, jax.sharding.get_mesh())
    assert len(spread.stacks[0].blocks.mlp.up.codes.devices() if hasattr(spread.stacks[0].blocks.mlp.up, 'codes')
               else spread.embed.array.devices()) > 1
    assert same(spread, loading.load_model(workdir))


def test_a_first_training_under_way_has_its_newest_checkpoint(tmp_path, monkeypatch):
  """Its own config may say more steps than have been made."""
  made = quick()
  class Killed(Exception): pass
  def killed(*_): raise Killed
  monkeypatch.setattr(commits, 'commit', killed)
  with pytest.raises(Killed): run.run(made, made, tmp_path)
  assert loading.load_model(tmp_path).embed.kind == 'float32'
  more = dataclasses.replace(made, stages=(Quantize(rules=(Rule(weights=Int()),)),))
  with pytest.raises(Killed): run.run(more, more, tmp_path)
  with pytest.raises(CheckpointError, match='has not come to its last stage, 2 quantize'): loading.load_model(tmp_path)
  assert loading.load_model(tmp_path, stage=1).embed.kind == 'float32'


def test_what_was_left_under_another_key_is_not_served(workdir, tmp_path):
  """As that of a stage whose settings have changed since, in a run that has not come to it again."""
  folder = shutil.copytree(workdir, tmp_path / 'copy')
  known = record.read(folder)
  stale = dataclasses.replace(known.plan[1], key='another')
  record.write(folder, dataclasses.replace(known, plan=(known.plan[0], stale)))
  with pytest.raises(CheckpointError, match='has not come to its last stage, 2 quantize'): loading.load_model(folder)
