"""Techniques, stages, weights and schedules of a user's own file, outside this tree: they train, resume, generate and report
as ours do, from another folder; and a config copied out of the tree works."""
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
FILE = '''
"""A schedule, a technique with a weight of its own, and a stage."""
import dataclasses

import jax

from efficient_lm import tree
from efficient_lm.config import Experiment, Training
from efficient_lm.data import Corpus, Markov
from efficient_lm.models import transformer
from efficient_lm.models.spec import GroupedQuery, Stack, SwiGLU, Transformer
from efficient_lm.training.optimizers import AdamW
from efficient_lm.weights.weight import Weight, Wrapper


@dataclasses.dataclass
class Constant:
  """A schedule."""
  rate: float = 1e-3
  def build(self, steps): return lambda taken: self.rate


class Doubled(Wrapper):
  """Twice the values of `inner`."""
  def __init__(self, inner): self.inner = inner
  @property
  def kind(self): return f'{self.inner.kind}, doubled'
  def materialize(self): return 2 * self.inner.materialize()


@dataclasses.dataclass
class Double:
  """A technique."""
  where: str = 'mlp/up$'
  touches = 'model'
  def __call__(self, learner, key):
    model = tree.rewrite(learner.model, Weight, lambda path, weight: Doubled(weight), self.where)
    return learner.replace(model=model, notes=(*learner.notes, 'Double: mine'))


@dataclasses.dataclass
class Half:
  """A stage, which drops the second half of the layers."""
  share: float = 0.5
  def __call__(self, model, context): return self.abstract(model), ('Half: mine',)
  def abstract(self, model):
    def halved(_, stack):
      kept = int(stack.num_layers * self.share)
      stack = jax.tree.map(lambda leaf: leaf[:kept], stack)
      stack.num_layers = kept
      return stack
    return tree.rewrite(model, transformer.Stack, halved)


def get_config(variant='plain'):
  layers = Stack(num_layers=2, attention=GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8), mlp=SwiGLU(hidden=32))
  language = Markov(alphabet=8, order=1, document_length=32, train_documents=64, heldout_documents=8)
  return Experiment(
    model=Transformer(vocab_size=8, dim=16, stacks=(layers,)), data=Corpus(source=language, eval_tokens=128),
    train=Training(steps=4, batch_size=8, sequence_length=32, checkpoint_every=2, optimizer=AdamW(schedule=Constant())),
    techniques=(Double(),) if variant == 'double' else (), stages=(Half(),))
'''


@pytest.fixture(scope='module')
def call(tmp_path_factory):
  """call(command, *words) in a folder elsewhere, in which the user's file lies as mine.py."""
  folder, compiled = tmp_path_factory.mktemp('elsewhere'), tmp_path_factory.mktemp('compiled')
  (folder / 'mine.py').write_text(FILE)
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': '', 'JAX_COMPILATION_CACHE_DIR': str(compiled),
                 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  def run(command, *words, code=0):
    done = subprocess.run([sys.executable, '-m', f'efficient_lm.{command}', *words], cwd=folder, env=environment,
                          capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr
  run.folder = folder
  return run


@pytest.mark.thinned
@pytest.mark.parametrize('variant, needs', [('plain', []), ('double', ['--config=mine.py'])])
def test_parts_of_a_users_own_file_do_all_that_ours_do(call, variant, needs):
  """Where the model itself holds a class of that file, commands that read the run are given the file; else it is not
  needed."""
  main = ['main', f'--config=mine.py:{variant}', f'--workdir={variant}']
  assert ('Double: mine' in call(*main)) == (variant == 'double')
  said = call(*main, '--config.train.steps=6')
  assert 'resumes after step 4' in said and 'Half: mine' in said
  assert 'all of them done' in call(*main, '--config.train.steps=6')
  words = [f'--run={variant}', *needs]
  assert call('generate', *words, '--prompt=abc', '--tokens=4').startswith('abc')
  assert 'bits per byte' in call('evaluate', *words)
  assert 'bits per byte' in call('evaluate', *words, '--stage=1')
  assert '2 half' in call('report', variant)
  if needs:
    line, = call('generate', words[0], '--prompt=abc', code=3).splitlines()
    assert 'has a mine.py:Doubled' in line


def test_a_stage_that_changes_the_model_has_a_row_of_its_own_model(call):
  """Half of the layers: half of their FLOPs and of their parameters."""
  from efficient_lm.runs import ledger
  trained, halved = ledger.read(call.folder / 'plain' / 'ledger.json')
  outside = 2 * 8 * 16   # embedding and head, of parameters
  norms = 16
  assert halved.size.parameters - outside - norms == (trained.size.parameters - outside - norms) / 2
  head = 2 * 8 * 16      # FLOPs of the head's product, which both have
  assert halved.size.flops_per_token - head == (trained.size.flops_per_token - head) / 2
  assert halved.speed.peak_memory_bytes and halved.size.bytes_in_memory < trained.size.bytes_in_memory


@pytest.mark.parametrize('name', sorted(path.name for path in (ROOT / 'configs').glob('*.py')))
def test_a_config_copied_out_of_the_tree_is_read_as_it_is_in_it(call, tmp_path, name):
  """By a program that finds the package and nothing else of the tree. What they start or learn from is not there."""
  (tmp_path / name).write_text((ROOT / 'configs' / name).read_text())
  words = [f'--config={tmp_path / name}', f'--workdir={tmp_path / "run"}', '--config.train.batch_size=-1']
  error = call('main', *words, code=2)
  assert 'config.train.batch_size = -1' in error, error
