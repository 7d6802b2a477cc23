"""Runs as sources, as far as they go without a model; what they load is in loading_test."""
import dataclasses
import json

import pytest

from efficient_lm.config import Mesh, experiment, fields, presets
from efficient_lm.data import ByteTokenizer
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.models import zoo
from efficient_lm.models.described import alike, described
from efficient_lm.runs import FromRun, run, trained
from efficient_lm.techniques import Magnitude, Shape, Shrink
from tests import minute


@pytest.mark.parametrize('changes, field', [(dict(path=''), 'path'), (dict(path='a', stage=-1), 'stage')])
def test_what_names_no_model_is_refused(changes, field):
  assert [problem[0] for problem in FromRun(**changes).check()] == [field]


def test_a_run_is_here_with_its_config_and_brings_description_and_tokenizer(tmp_path):
  run = FromRun(path=str(tmp_path / 'run'))
  assert not run.here
  with pytest.raises(ConfigError): run.spec()
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(fields.to_json(presets.dense())))
  assert run.here and run.spec() == zoo.tiny()
  with pytest.raises(CheckpointError, match='has not started'): run.tokenizer()
  with pytest.raises(CheckpointError, match='no checkpoint'): run.load()
  (tmp_path / 'run' / 'tokenizer.json').write_text(ByteTokenizer().to_json())
  assert run.tokenizer().key == ByteTokenizer().key


def test_labels_tell_the_stages_of_a_run_apart():
  assert FromRun(path='a').label != FromRun(path='a', stage=1).label != FromRun(path='a', stage=2).label


def test_only_sizes_that_are_trained_here_have_a_baselines_run():
  for size in presets.SIZES: assert trained(size).path.startswith('runs/baseline')
  with pytest.raises(ConfigError): trained('llama3_8b')


def test_a_run_that_made_its_model_smaller_is_described_as_what_it_left(tmp_path):
  """Each stage as its own; and a mesh that the model no longer divides into is refused by the numbers of that."""
  quick = minute.get_config('quick')
  made = dataclasses.replace(quick, train=dataclasses.replace(quick.train, steps=2),
                             stages=(Shrink(to=Shape(hidden=23), scores=(Magnitude(),)),))
  run.run(made, made, tmp_path / 'run')
  left, trained = FromRun(path=str(tmp_path / 'run')), FromRun(path=str(tmp_path / 'run'), stage=1)
  hidden = lambda source: {layer.mlp.hidden for layer in source.spec().layers}
  assert hidden(left) == {23} and hidden(trained) == {layer.mlp.hidden for layer in quick.model.layers}
  for source in (left, trained): assert described(source.abstract()) == alike(source.spec())
  again = dataclasses.replace(quick, model=None, start=left, mesh=Mesh(tensor=2))
  with pytest.raises(ConfigError, match=r'stacks\[0\]\.mlp\.hidden = 23: must be divisible by config\.mesh\.tensor = 2'):
    experiment.validate(again)
