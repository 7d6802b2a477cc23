"""Every config, in every variant: short, documented, valid, exact through JSON, and of a model that can be built."""
import ast
import dataclasses
import importlib.util
import json
import pathlib

import pytest
from ml_collections.config_flags import config_flags

from efficient_lm import techniques
from efficient_lm.config import experiment as experiments
from efficient_lm.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / 'configs').glob('*.py'))


def module(file):
  spec = importlib.util.spec_from_file_location(file.stem, file)
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded


def variants(file):
  """The names that an unknown one is answered with."""
  with pytest.raises(ConfigError) as caught: module(file).get_config('no such variant')
  return caught.value.fix.removeprefix('there are ').split(', ')


ALL = [(file, variant) for file in FILES for variant in variants(file)]
every_variant = pytest.mark.parametrize('file, variant', ALL, ids=[f'{file.stem}:{variant}' for file, variant in ALL])


@pytest.fixture(autouse=True)
def trained_baselines(tmp_path, monkeypatch):
  """A folder in which the runs that others start from are there, as far as a config can see."""
  monkeypatch.chdir(tmp_path)
  for name in ('baseline', 'moe'):
    file = ROOT / 'configs' / f'{name}.py'
    for variant in variants(file):
      workdir = tmp_path / 'runs' / (name if variant == 'tiny' else f'{name}-{variant}')
      workdir.mkdir(parents=True)
      (workdir / 'config.json').write_text(json.dumps(experiments.to_json(module(file).get_config(variant))))


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_a_config_is_short_and_says_how_to_run_it(file):
  source = file.read_text()
  doc = ast.get_docstring(ast.parse(source))
  code = [line for line in source.replace(f'"""{doc}\n"""', '').splitlines() if line.strip()]
  assert len(code) <= 40
  assert f'make {file.stem}' in doc or f' {file.stem}\n' in doc
  assert f'python -m efficient_lm.main --config=configs/{file.name}' in doc
  assert 'bits per byte' in doc and 'CPU' in doc and 'H100' in doc


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_tiny_is_the_default(file):
  assert module(file).get_config() == module(file).get_config('tiny')


@every_variant
def test_a_variant_is_valid_and_exact_through_json(file, variant):
  experiment, default = experiments.load(f'{file}:{variant}')
  assert experiment == default and not experiments.difference(default, experiment)
  again = experiments.from_json(json.loads(json.dumps(experiments.to_json(experiment), allow_nan=False)))
  assert again == experiment and repr(again) == repr(experiment)


@every_variant
def test_a_variant_describes_a_model_that_can_be_built(file, variant):
  """Shapes only: techniques that rewrite the model included, so that their selectors find something."""
  jax, derived = importlib.import_module('jax'), importlib.import_module('efficient_lm.runs.derived')
  experiment, _ = experiments.load(f'{file}:{variant}')
  model = derived.start_shapes(experiment)
  for _, stage in experiment.sequence: model = jax.eval_shape(stage.abstract, model)
  assert jax.tree.leaves(model)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')   # how config_flags imports the file
@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_config_flags_of_ml_collections_takes_the_file_as_it_is(file):
  parsed = config_flags.ConfigFileFlagParser('config').parse(f'{file}:tiny')
  assert parsed == module(file).get_config()


def test_two_reads_share_nothing_that_an_override_could_change():
  first, _ = experiments.load(str(ROOT / 'configs' / 'moe.py'), ['--config.model.stacks[0].mlp.balance[0].weight=7'])
  second, _ = experiments.load(str(ROOT / 'configs' / 'moe.py'))
  assert first.model.stacks[0].mlp.balance[0].weight == 7 != second.model.stacks[0].mlp.balance[0].weight


# A reason for each that no config has.
WITHOUT_CONFIG = {'GivingUp': 'for a stage that loses what an earlier one promised; none of ours does',
                  'SkipSpikes': 'for trainings that have spikes; none of ours has',
                  'StoreBlocks': 'for masks of whole blocks; no stage of ours leaves such masks'}


def values(value):
  """Every dataclass in a config, however deep."""
  if dataclasses.is_dataclass(value):
    yield value
    for field in dataclasses.fields(value): yield from values(getattr(value, field.name))
  elif isinstance(value, (tuple, list)):
    for item in value: yield from values(item)


def test_every_technique_and_every_stage_is_in_a_config():
  used = {type(value).__name__ for file, variant in ALL for value in values(module(file).get_config(variant))}
  classes = [value for name in techniques.__all__ if isinstance(value := getattr(techniques, name), type)]
  ours = {found.__name__ for found in classes if '__call__' in vars(found)}
  assert ours > {'Prune', 'Distill', 'Upcycle', 'Convert', 'Rotate'}
  assert ours - used == set(WITHOUT_CONFIG)
