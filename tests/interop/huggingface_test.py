"""A Hugging Face folder wherever a model may come from: --run of the commands, a start, a teacher."""
import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from efficient_lm import commands, evaluate, generate, sensitivity
from efficient_lm.config import experiment, fields
from efficient_lm.config.sources import is_source
from efficient_lm.data import TextFiles
from efficient_lm.errors import ConfigError
from efficient_lm.interop import families, vocabulary
from efficient_lm.interop.huggingface import HuggingFace
from efficient_lm.runs import FromRun, record, results, run
from efficient_lm.techniques import Distill
from efficient_lm.training import losses
from efficient_lm.training.learner import Learner
from efficient_lm.training.optimizers import AdamW
from tests import minute

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'


@pytest.fixture(scope='module')
def path(tmp_path_factory) -> str:
  """A Llama whose vocabulary is that of a tokenizer beside it, of one layer."""
  path = tmp_path_factory.mktemp('of') / 'others'
  shutil.copytree(FIXTURES / 'tokenizers' / 'bytes_bos', path)
  config = json.loads((FIXTURES / 'llama' / 'config.json').read_text()) | {'vocab_size': 323, 'num_hidden_layers': 1}
  (path / 'config.json').write_text(json.dumps(config))
  arrays, rng = load_file(FIXTURES / 'llama' / 'model.safetensors'), np.random.default_rng(0)
  wide = {name: rng.normal(size=(323, 32)).astype(np.float32) for name in ('lm_head.weight', 'model.embed_tokens.weight')}
  kept = {name: wide.get(name, array) for name, array in arrays.items() if 'layers.1' not in name}
  save_file(kept, path / 'model.safetensors')
  return str(path)


@pytest.fixture(scope='module')
def text(tmp_path_factory) -> str:
  file = tmp_path_factory.mktemp('text') / 'a.txt'
  file.write_text('some text of a few words, ä€😀 ' * 60)
  return str(file)


@pytest.fixture
def said(path, capsys):
  """said(command, code, **words): what a command prints of the folder."""
  def call(command, code=0, **words):
    given = [f'--{name}={value}' for name, value in {'run': path, **words}.items()]
    try: assert commands.exit_code(command.main, [command.__name__, *given]) == code
    finally:
      for name in ('run', 'stage', 'text', *words): command.FLAGS[name].unparse()
    out, err = capsys.readouterr()
    return out if not code else err
  return call


def test_it_is_a_source_that_a_config_can_hold(path):
  source = HuggingFace(path=path, dtype='float32')
  assert is_source(source) and source.here and not list(source.check())
  assert fields.from_json(fields.to_json(source)) == source
  assert source.spec().dtype == 'float32' and HuggingFace(path=path).spec().vocab_size == 323 and source.context == 64
  assert [problem[0] for problem in HuggingFace(path='', dtype='int8').check()] == ['path', 'dtype']
  assert len({HuggingFace(path=path, **held).label for held in ({}, {'dtype': 'float32'}, {'parameters': 'float32'})}) == 3
  assert not HuggingFace(path='/no/such/folder').here


def test_its_key_is_that_of_its_content(path, tmp_path):
  first, copy = HuggingFace(path=path), tmp_path / 'copy'
  shutil.copytree(path, copy)
  key = lambda **held: HuggingFace(path=str(copy), **held).key()
  assert key() == first.key() != key(dtype='bfloat16') != key(parameters='bfloat16')
  (copy / 'README.md').write_text('more words')
  assert key() == first.key()
  settings = json.loads((copy / 'tokenizer_config.json').read_text())
  (copy / 'tokenizer_config.json').write_text(json.dumps(settings | {'add_bos_token': False}))
  assert key() != first.key()
  (copy / 'tokenizer_config.json').write_text(json.dumps(settings))
  (copy / 'config.json').write_text(json.dumps(json.loads((copy / 'config.json').read_text()) | {'rms_norm_eps': 1e-3}))
  assert key() != first.key()


@pytest.mark.usefixtures('quick_compilation')
def test_commands_read_it_as_they_read_a_run(said, path, text):
  assert said(generate, prompt='some', tokens=4, temperature=0).startswith('some')
  assert 'bits per byte' in said(evaluate, text=text)
  table = said(sensitivity, text=text, sequences=4, formats='int8', where='mlp/up')
  assert 'int8' in table and 'stacks/0/blocks/mlp/up' in table


def test_what_it_has_not_is_a_line(said, path, text, tmp_path):
  assert '--text = None: is missing' in said(evaluate, 2)
  assert '--text = None: is missing' in said(sensitivity, 2)
  assert 'only runs have stages' in said(generate, 2, stage=1, prompt='a')
  with pytest.raises(ConfigError, match='no rows to report'): results.load(path)
  bare = tmp_path / 'bare'
  bare.mkdir()
  for file in ('config.json', 'model.safetensors'): shutil.copy(pathlib.Path(path) / file, bare / file)
  assert 'no tokenizer' in said(generate, 2, run=bare, prompt='a')
  (bare / 'config.json').write_text(json.dumps({'model_type': 'mamba'}))
  assert 'is a family that cannot be read' in said(generate, 2, run=bare, prompt='a')


@pytest.mark.usefixtures('quick_compilation')
def test_a_run_starts_from_it(path, text, tmp_path):
  source, made = HuggingFace(path=path), minute.get_config('quick')
  data = dataclasses.replace(made.data, source=TextFiles(train=(text,), heldout_fraction=0.3), eval_tokens=64)
  started = dataclasses.replace(made, data=data, model=None, start=source, train=dataclasses.replace(made.train, steps=0))
  run.run(started, started, tmp_path / 'run')
  assert experiment.model_of(experiment.read(str(tmp_path / 'run'))) == source.spec()
  assert record.tokenizer(tmp_path / 'run').key == vocabulary.read(path).key
  assert record.read(tmp_path / 'run').start['key'] == source.key()
  kept, given = jax.tree.leaves(FromRun(path=str(tmp_path / 'run')).load()), jax.tree.leaves(source.load())
  for one, other in zip(kept, given, strict=True): np.testing.assert_array_equal(one, other)


def test_another_model_learns_from_it(path):
  source = HuggingFace(path=path, parameters='bfloat16')
  student = HuggingFace(path=path).load()
  taught = Distill(teacher=source)(Learner(student, losses.NextToken(), AdamW().build(9)), jax.random.key(0))
  for one, other in zip(jax.tree.leaves(taught.loss.teacher), jax.tree.leaves(student), strict=True):
    np.testing.assert_array_equal(one, other.astype(jnp.bfloat16))


def test_every_family_has_a_fixture():
  kinds = {json.loads(file.read_text())['model_type'] for file in FIXTURES.glob('*/config.json')}
  assert kinds == set(families.FAMILIES)
