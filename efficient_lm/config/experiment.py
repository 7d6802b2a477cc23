"""Experiment: all that a run is, as nested dataclasses; its validation; and how it is read from a file and overridden.

A config file has `get_config(variant='tiny') -> Experiment`. What is named in it is the implementation: `MoE(...)` in a
config is the class that builds the layer. Light on purpose: a wrong config is answered before JAX is loaded.
"""
import copy
import dataclasses
import difflib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from efficient_lm.config import fields
from efficient_lm.config.fields import difference, from_json, to_json
from efficient_lm.config.mesh import Mesh
from efficient_lm.errors import ConfigError, too_small
from efficient_lm.lazy import lazy
from efficient_lm.training.optimizers import AdamW

__all__ = ['Experiment', 'FromRun', 'Mesh', 'Training', 'choose', 'difference', 'from_json', 'load', 'model_of', 'read',
           'refuse_other', 'to_json', 'validate']

overrides = lazy('efficient_lm.config.overrides')
run = lazy('efficient_lm.runs.run')

CONFIG_JSON = 'config.json'
# A run may be taken up again with these changed; the mesh too: checkpoints are resharded when read.
RESUMABLE = ('config.mesh', 'config.train.log_every', 'config.train.eval_every', 'config.train.checkpoint_every')


@dataclasses.dataclass(kw_only=True)
class Training:
  """How long, on how much at once, and how. `batch_size` counts sequences of a step over all devices, in `accumulate`
  equal parts one after the other; the `every`s count steps."""
  steps: int
  batch_size: int
  sequence_length: int
  optimizer: Any = dataclasses.field(default_factory=AdamW)
  accumulate: int = 1
  log_every: int = 10
  eval_every: int = 100
  checkpoint_every: int = 100

  def check(self):
    yield from too_small(self, steps=0, batch_size=1, sequence_length=2, accumulate=1, log_every=1, eval_every=1,
                         checkpoint_every=1)
    if self.accumulate > 0 and self.batch_size % self.accumulate:
      yield 'batch_size', self.batch_size, f'must be divisible by config.train.accumulate = {self.accumulate}'


@dataclasses.dataclass(kw_only=True)
class FromRun:
  """The model that an earlier run left in its workdir `path`: to start from, or to learn from as a teacher."""
  path: str

  def check(self):
    if not os.path.isfile(os.path.join(self.path, CONFIG_JSON)):
      yield 'path', self.path, f'holds no {CONFIG_JSON}: name the workdir of a run, or make that run first'

  def read(self) -> 'Experiment':
    """What that run was. Raises ConfigError."""
    return read(self.path)

  def load(self, mesh=None):
    """Its model, from the newest checkpoint, on `mesh` (default: on one device). Raises CheckpointError."""
    return run.load_model(self.path, mesh)


@dataclasses.dataclass(kw_only=True)
class Experiment:
  """A run: `model` trained on `data` as `train` says, then taken through `stages` in their order.

  Training starts either from `model`, freshly drawn, or from `start`, the model of an earlier run. `techniques` change
  the learner before it trains, in their order.
  """
  seed: int = 0
  model: Any = None
  data: Any
  train: Training
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  techniques: tuple[Any, ...] = ()
  start: Any = None
  stages: tuple[Any, ...] = ()

  def check(self):
    yield from too_small(self, seed=0)
    if self.seed >= 2 ** 31: yield 'seed', self.seed, 'must be below 2**31'
    if self.model is None and self.start is None:
      yield 'model', None, 'must be a Transformer(…), unless config.start = FromRun(path=…) brings one'
    if self.model is not None and self.start is not None:
      yield 'model', self.model, 'must be None: config.start brings the model'


def validate(experiment) -> None:
  """Raises ConfigError for the first thing that is wrong: a type, a value that its class refuses, a combination."""
  if not isinstance(experiment, Experiment):
    raise ConfigError('config', experiment, 'get_config() must return an efficient_lm.config.experiment.Experiment')
  fields.check(experiment, 'config')
  for path, value, fix in _check_together(experiment): raise ConfigError(path, value, fix)


def _check_together(experiment: Experiment):
  """What batch, model, data and mesh ask of each other."""
  mesh, train, model = experiment.mesh, experiment.train, model_of(experiment)
  parts = max(mesh.data, 1) * max(mesh.fsdp, 1) * max(mesh.expert, 1) * train.accumulate
  if train.batch_size % parts:
    yield 'config.train.batch_size', train.batch_size, (
      f'must be a multiple of {parts} = config.mesh data * fsdp * expert * config.train.accumulate')
  needed = getattr(experiment.data, 'vocab_size', 0)
  if needed > model.vocab_size:
    yield 'config.model.vocab_size', model.vocab_size, f'must be at least {needed}, the number of the tokenizer\'s ids'
  for path, node in fields.walk(experiment, 'config'):
    if isinstance(node, FromRun) and node.read().data.unfitted != experiment.data.unfitted:
      yield f'{path}.path', node.path, 'was trained with another tokenizer: name a run with that of config.data'
  parts_of_model = (*fields.walk(model, 'config.model'), *fields.walk(experiment.techniques, 'config.techniques'))
  for axis, names in (('expert', ('num_experts',)), ('tensor', ('num_heads', 'hidden'))):
    shards = getattr(mesh, axis)
    for path, node in parts_of_model:
      for name in names:
        size = getattr(node, name, None)
        if isinstance(size, int) and shards > 1 and size % shards:
          yield f'{path}.{name}', size, f'must be divisible by config.mesh.{axis} = {shards}'


def model_of(experiment: Experiment):
  """The description of the model before any technique: the experiment's own, or that of the run it starts from."""
  return experiment.model if experiment.model is not None else model_of(experiment.start.read())


def choose(variant: str, choices: dict[str, Any]):
  """The choice named `variant`, for a config file's `get_config`; ConfigError names those there are."""
  if variant in choices: return choices[variant]
  close = difflib.get_close_matches(variant, choices, 1)
  hint = f'did you mean {close[0]}? ' if close else ''
  raise ConfigError('--config variant', variant, f'{hint}there are {", ".join(choices)}')


def load(path: str, words: Sequence[str] = ()) -> tuple[Experiment, Experiment]:
  """Reads 'FILE.py' or 'FILE.py:variant' and applies overrides such as '--config.train.steps=5'.

  Returns the experiment, validated, and the file's own, for `difference`. The file is Python and is executed. Raises
  ConfigError, for any mistake in the file, too.
  """
  default = _read_config_file(path)
  if not isinstance(default, Experiment): validate(default)
  # Configs share the instances that are defaults of their classes: what is overridden must not be one of those.
  experiment = overrides.apply(copy.deepcopy(default), words) if words else copy.deepcopy(default)
  validate(experiment)
  return experiment, default


def _read_config_file(path: str):
  file, _, variant = path.partition(':')
  if not os.path.isfile(file):
    raise ConfigError('--config', file, 'is a folder, not a file' if os.path.isdir(file) else 'there is no such file')
  try:
    return _module(file).get_config(*([variant] if variant else []))
  except ConfigError:
    raise
  except (Exception, SystemExit) as error:   # the file is the user's program: whatever it raises is a wrong config
    raise ConfigError('--config', file, _where(error, file)) from error


def _module(file: str):
  """The config file as a module, findable by the name that classes defined in it carry."""
  name = 'config_' + os.path.splitext(os.path.basename(file))[0]
  spec = importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, file))
  sys.modules[name] = module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'): raise ConfigError('--config', file, 'defines no get_config(variant)')
  return module


def _where(error, file: str) -> str:
  """'line 12: TypeError: …', the line being the last of the config file's own that was executed."""
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
  if isinstance(error, SyntaxError): return f'line {error.lineno}: {type(error).__name__}: {error.msg}'
  return f'line {lines[-1] if lines else 1}: {type(error).__name__}: {error}'


def write(workdir: str, experiment: Experiment) -> None:
  """Writes `config.json` into an existing workdir, whole or not at all."""
  path = os.path.join(workdir, CONFIG_JSON)
  with open(path + '.partial', 'w', encoding='utf-8') as file: json.dump(to_json(experiment), file, indent=2)
  os.replace(path + '.partial', path)


def read(workdir: str) -> Experiment:
  """The experiment that a workdir's `config.json` records; no Python is executed. Raises ConfigError."""
  path = os.path.join(workdir, CONFIG_JSON)
  try:
    with open(path, encoding='utf-8') as file: data = json.load(file)
  except (OSError, ValueError) as error:
    raise ConfigError('run', workdir, f'has no readable {CONFIG_JSON}: name the workdir of a run') from error
  experiment = from_json(data)
  if not isinstance(experiment, Experiment): raise ConfigError('run', path, 'does not describe an experiment')
  return experiment


def refuse_other(workdir: str, experiment: Experiment) -> None:
  """Raises ConfigError if `workdir` cannot be written, or holds a run that `experiment` would not resume: one that
  differs in more than a larger train.steps, how often it reports and saves, and its mesh."""
  if '://' not in workdir: _check_writable(workdir)
  if not os.path.exists(os.path.join(workdir, CONFIG_JSON)): return
  old = read(workdir)
  def resumable(path, before, after):
    return path.startswith(RESUMABLE) or (path == 'config.train.steps' and after >= before)
  lines = [line for line in difference(old, experiment) if not resumable(*line)]
  if not lines: return
  shown = ', '.join(f'{path} = {fields.brief(a)} there and {fields.brief(b)} here' for path, a, b in lines[:3])
  more = f' and {len(lines) - 3} more' if len(lines) > 3 else ''
  raise ConfigError('--workdir', workdir, f'holds another run: {shown}{more}; choose another, or remove this one')


def _check_writable(workdir: str):
  found = os.path.abspath(workdir)
  while not os.path.exists(found): found = os.path.dirname(found)
  if not os.path.isdir(found): raise ConfigError('--workdir', workdir, f'{found} is a file: choose another --workdir')
  if not os.access(found, os.W_OK | os.X_OK):
    raise ConfigError('--workdir', workdir, f'{found} cannot be written: choose another --workdir')
