"""Experiment: all that a run is, as nested dataclasses; its validation; and how it is read from a file and overridden.

A config file has `get_config(variant='tiny') -> Experiment`. What is named in it is the implementation: `MoE(...)` in a
config is the class that builds the layer. Light on purpose: a wrong config is answered before JAX is loaded.
"""
import copy
import dataclasses
import difflib
import importlib.util
import math
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from efficient_lm.config import fields, names, paths
from efficient_lm.config.fields import difference, from_json, to_json
from efficient_lm.config.mesh import Mesh
from efficient_lm.config.sources import is_source
from efficient_lm.errors import CheckpointError, ConfigError, Problem, at_least
from efficient_lm.system import sealed
from efficient_lm.system import workdir as workdirs
from efficient_lm.training.train import Train, Training

CONFIG_JSON, RUN_JSON = 'config.json', 'run.json'
# What a run writes into its workdir.
FOLDERS = ('checkpoints', 'stages', 'samples', 'tensorboard')
FILES = (CONFIG_JSON, RUN_JSON, 'lock', 'metrics.jsonl', 'ledger.json', 'tokenizer.json', 'report.html', 'report.png')
# A run may be taken up again with these changed. The mesh: checkpoints are resharded when read. Stages: each is known by its
# settings and what it was given, and is made again when either is another.
RESUMABLE = ('config.mesh', 'config.stages', *(f'config.train.{name}' for name in Train.cosmetic))


@dataclasses.dataclass(kw_only=True)
class Experiment:
  """A run: a loop over stages, of which training is one. `train`, with `techniques`, is the short form of the first
  training; `stages` follow it in their order, further trainings among them (`Train(…)`).

  The run starts either from `model`, freshly drawn, or from `start`, a source such as an earlier run. With a start and no
  steps to train, `stages` are all there is.
  """
  seed: int = dataclasses.field(default=0, metadata=fields.WIDE)
  model: Any = None
  data: Any
  train: Training
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  techniques: tuple[Any, ...] = ()
  start: Any = None
  stages: tuple[Any, ...] = ()

  def check(self):
    yield from at_least(self, seed=0)
    if self.seed >= 2 ** 31: yield 'seed', self.seed, 'must be below 2**31'
    if self.model is None and self.start is None:
      yield 'model', None, 'must be a Transformer(…), unless config.start = FromRun(path=…) brings one'
    if self.model is not None and self.start is not None:
      yield 'model', self.model, 'must be None: config.start brings the model'
    if self.start is not None and not is_source(self.start):
      yield 'start', self.start, 'must be a source: FromRun(path=…), say'
    for technique in self.techniques:
      if not hasattr(technique, 'touches'): yield 'techniques', technique, 'must hold techniques: this one touches nothing'
    for stage in self.stages:
      if not (callable(stage) and hasattr(stage, 'abstract')):
        yield 'stages', stage, 'must hold stages, with abstract(model)'
    if self.trains:
      yield from Train(training=self.train, techniques=self.techniques).check()

  @property
  def trains(self) -> bool:
    """Whether `train` is a stage of the run."""
    return self.start is None or self.train.steps > 0 or bool(self.techniques)

  @property
  def sequence(self) -> list[tuple[str, Any]]:
    """The stages in their order, each with its place in the config, which error messages begin with."""
    first = [('config', Train(training=self.train, techniques=self.techniques))] if self.trains else []
    return first + [(f'config.stages[{i}]', stage) for i, stage in enumerate(self.stages)]


def sources(experiment: Experiment) -> Iterator[tuple[str, Any]]:
  """Every source in an experiment, with its path."""
  return ((path, node) for path, node in fields.walk(experiment, 'config') if is_source(node))


def caveats(experiment: Experiment) -> list[str]:
  """What its parts want a user to know, each once."""
  return list(dict.fromkeys(line for _, node in fields.walk(experiment) if fields.is_config(node)
                            for line in getattr(node, 'caveats', tuple)()))


def validate(experiment, workdir: str | None = None) -> None:
  """Raises ConfigError for the first thing that is wrong: a type, a value that its class refuses, a combination. `workdir`:
  of a run that may have been started before; what it recorded of its sources stands in for those that are gone."""
  if not isinstance(experiment, Experiment):
    raise ConfigError('config', experiment, 'get_config() must return an efficient_lm.config.Experiment')
  fields.check(experiment, 'config')
  known = recorded(workdir).get('sources', {})
  for path, source in sources(experiment):
    if source is experiment.start or (not source.here and source.label in known): continue
    _check_here(path, source)
    _check_vocabulary(path, source, experiment)
  for path, value, fix in _check_together(experiment, model_of(experiment, workdir)): raise ConfigError(path, value, fix)


def _check_here(path: str, source):
  """Raises ConfigError for a source that is not there."""
  if not source.here:
    fix = f'holds no {CONFIG_JSON}: name the workdir of a run, or make that run first'
    raise ConfigError(f'{path}.path', source.label, fix)


def _check_vocabulary(path: str, source, experiment: Experiment):
  """Raises ConfigError for a source whose tokenizer has another number of ids than that of the run: so much is known before
  any text is read. (That both are equal is checked when they are.)"""
  try: theirs = source.tokenizer().vocab_size
  except CheckpointError: return   # it has not begun
  own = experiment.data if experiment.start is None or not experiment.start.here else experiment.start.tokenizer()
  if theirs != own.vocab_size:
    raise ConfigError(f'{path}.path', source.label, f'was trained with another tokenizer, of {theirs} ids: name a run with '
                      f'that of this run, of {own.vocab_size}')


def _check_together(experiment: Experiment, model) -> Iterator[Problem]:
  """What batch, model, data and mesh ask of each other."""
  mesh = experiment.mesh
  for place, stage in experiment.sequence:
    if not isinstance(stage, Train): continue
    training, name = stage.training, 'train' if place == 'config' else 'training'
    parts = max(mesh.data, 1) * max(mesh.fsdp, 1) * max(mesh.expert, 1) * training.accumulate
    if training.batch_size % parts:
      yield f'{place}.{name}.batch_size', training.batch_size, (
        f'must be a multiple of {parts} = config.mesh data * fsdp * expert * accumulate')
    positions = getattr(getattr(model, 'ends', None), 'positions', None)
    if positions is not None and training.sequence_length > positions.length:
      yield f'{place}.{name}.sequence_length', training.sequence_length, (
        f'must be at most config.model.ends.positions.length = {positions.length}')
  tokenizer = getattr(experiment.data, 'tokenizer', None)
  needed = 0 if is_source(tokenizer) and not tokenizer.here else getattr(experiment.data, 'vocab_size', 0)
  if needed > model.vocab_size:
    yield 'config.model.vocab_size', model.vocab_size, f'must be at least {needed}, the number of the tokenizer\'s ids'
  parts_of_model = (*fields.walk(model, 'config.model'), *fields.walk(experiment.techniques, 'config.techniques'))
  for axis, sizes in (('expert', ('num_experts',)), ('tensor', ('num_heads', 'hidden'))):
    shards = getattr(mesh, axis)
    for path, node in parts_of_model:
      for name in sizes:
        size = getattr(node, name, None) if fields.is_config(node) else None
        if isinstance(size, int) and shards > 1 and size % shards:
          yield f'{path}.{name}', size, f'must be divisible by config.mesh.{axis} = {shards}'


def model_of(experiment: Experiment, workdir: str | None = None):
  """The description of the model before any technique: the experiment's own, or that of what it starts from, which a run in
  `workdir` has recorded. Raises ConfigError where neither is there."""
  if experiment.model is not None: return experiment.model
  start = recorded(workdir).get('start')
  if not experiment.start.here and start: return recorded_spec(os.path.join(workdir, RUN_JSON), start['spec'])
  _check_here('config.start', experiment.start)
  return experiment.start.spec()


def recorded(workdir: str | os.PathLike | None) -> dict:
  """What a run in `workdir` has recorded of what it began with, if one has begun. Raises CheckpointError."""
  path = os.path.join(workdir or '', RUN_JSON)
  if not workdir or not os.path.isfile(path): return {}
  data = sealed.read(path)
  start, sources = data.get('start'), data.get('sources')
  if not isinstance(sources, dict) or not all(isinstance(key, str) for key in sources.values()):
    raise sealed.damaged(path, ValueError('its sources are no keys by name'))
  if start is not None and not (isinstance(start, dict) and isinstance(start.get('key'), str) and 'spec' in start):
    raise sealed.damaged(path, ValueError('its start has no key and spec'))
  return data


def recorded_spec(path: str, data):
  """The description of a model that the file `path` of a run has recorded. Raises CheckpointError."""
  try:
    spec = from_json(data)
    if not isinstance(spec, names.Unread):
      if not hasattr(spec, 'build'): raise ConfigError('spec', spec, 'is no description of a model')
      fields.check(spec, 'spec')
    return spec
  except (ConfigError, RecursionError) as error: raise sealed.damaged(path, error) from error


def choose(variant: str, choices: dict[str, Any]):
  """The choice named `variant`, for a config file's `get_config`; ConfigError names those there are."""
  if variant in choices: return choices[variant]
  close = difflib.get_close_matches(variant, choices, 1)
  hint = f'did you mean {close[0]}? ' if close else ''
  raise ConfigError('--config variant', variant, f'{hint}there are {", ".join(choices)}')


def load(path: str, words: Sequence[str] = (), workdir: str | None = None) -> tuple[Experiment, Experiment]:
  """Reads 'FILE.py' or 'FILE.py:variant' and applies overrides such as '--config.train.steps=5'.

  Returns the experiment, validated (see `validate` for `workdir`), and the file's own, for `difference`. The file is Python
  and is executed. Raises ConfigError, for any mistake in the file, too.
  """
  from efficient_lm.config import overrides
  default = _read_config_file(path)
  if not isinstance(default, Experiment): validate(default)
  # Configs share the instances that are defaults of their classes: what is overridden must not be one of those.
  experiment = overrides.apply(copy.deepcopy(default), words) if words else copy.deepcopy(default)
  validate(experiment, workdir)
  return experiment, default


def execute(path: str) -> None:
  """Executes a config file for the classes that it has, so that a run made with them can be read. Raises ConfigError."""
  _read_config_file(path)


def _read_config_file(path: str):
  file, _, variant = path.partition(':')
  if not os.path.isfile(file):
    raise ConfigError('--config', file, 'is a folder, not a file' if os.path.isdir(file) else 'there is no such file')
  try:
    module = _module(file)
    found = module.get_config(*([variant] if variant else []))
    own = [value for value in vars(module).values() if getattr(value, '__module__', None) == module.__name__]
    names.remember([*own, *(type(node) for _, node in fields.walk(found))])
    return found
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
  sealed.write(workdir, CONFIG_JSON, to_json(experiment))


def read(workdir: str) -> Experiment:
  """The experiment that a workdir's `config.json` records, checked as one that a config file describes; no Python is
  executed. Whether its text is there is checked when that is read. Raises ConfigError."""
  path = os.path.join(workdir, CONFIG_JSON)
  if not os.path.isfile(path): raise ConfigError('run', workdir, f'has no readable {CONFIG_JSON}: name the workdir of a run')
  try:
    experiment = from_json(_updated(sealed.read(path)))
    if not isinstance(experiment, Experiment): raise ConfigError('class', type(experiment).__name__, 'is no experiment')
    _check_recorded(experiment)
    return experiment
  except (ConfigError, CheckpointError) as error:
    said = str(error) if isinstance(error, ConfigError) else str(error).removeprefix(path).strip()
    raise ConfigError('run', path, f'cannot be used: {said}') from error
  except RecursionError as error: raise ConfigError('run', path, 'cannot be used: it is nested too deeply') from error


def _check_recorded(experiment: Experiment):
  """Raises ConfigError for what a config could not be written with. Left out are parts of which something is a class of the
  user's own that is not at hand, the text, and whether a technique would have come to its end in the steps of a training,
  which an earlier version may not have asked: none is needed by all that reads a run."""
  for path, value, fix in fields.type_problems(experiment, Experiment, 'config'): raise ConfigError(path, value, fix)
  for where, node in fields.walk(experiment, 'config'):
    if where.startswith('config.data') or any(isinstance(one, names.Unread) for _, one in fields.walk(node)): continue
    for field, value, fix in getattr(node, 'check', tuple)():
      if not (isinstance(node, Experiment | Train) and field.startswith('techniques[')):
        raise ConfigError(fields.join(where, field), value, fix)


def _updated(data):
  """JSON of an experiment as today's classes have it: an evaluation used to be counted in batches of the training's size."""
  try:
    corpus, train = data['data'], data['train']
    counts = [corpus.get('eval_batches'), train['batch_size'], train['sequence_length']]
    if all(isinstance(count, int) for count in counts):
      del corpus['eval_batches']
      corpus['eval_tokens'] = math.prod(counts)
  except (TypeError, KeyError, AttributeError): pass   # whatever it is, from_json will say so
  return data


def refuse_other(workdir: str, experiment: Experiment) -> None:
  """Raises ConfigError if `workdir` cannot be written, in all parts that it has, or holds a run that `experiment` would not
  resume: one that differs in more than a larger train.steps, its stages, how often it reports and saves, and its mesh."""
  paths.check_folder('--workdir', workdir)
  paths.check_parts('--workdir', workdir, FOLDERS, FILES)
  workdirs.check(workdir)
  if not os.path.exists(os.path.join(workdir, CONFIG_JSON)): return
  old = read(workdir)
  def resumable(path, before, after):
    return path.startswith(RESUMABLE) or (path == 'config.train.steps' and after >= before)
  lines = [line for line in difference(old, experiment) if not resumable(*line)]
  if not lines: return
  shown = ', '.join(f'{path} = {fields.brief(a)} there and {fields.brief(b)} here' for path, a, b in lines[:3])
  more = f' and {len(lines) - 3} more' if len(lines) > 3 else ''
  raise ConfigError('--workdir', workdir, f'holds another run: {shown}{more}; choose another, or remove this one')

