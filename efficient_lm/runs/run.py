"""A run: a loop over stages. Each is given the model that the one before has left; what it leaves is one commit.

A stage that has been committed under its present key is passed over, so the same command, given again, goes on where the run
was: a training at its own step, any other stage from its beginning. A change upstream, of settings or of what was given, is
another key, and the stage is made again. Nothing is written before all stages have been checked against the model's shapes.
"""
import contextlib
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax

from efficient_lm.axes import BATCH
from efficient_lm.config import experiment as experiments
from efficient_lm.config import fields
from efficient_lm.config.sources import is_source
from efficient_lm.data.baselines import baselines
from efficient_lm.errors import CheckpointError, ConfigError, in_field
from efficient_lm.parallel import processes
from efficient_lm.parallel.sharding import part_here, placed
from efficient_lm.runs import commits, console, derived, invariants, memory, record, report_page, shared, writing
from efficient_lm.runs.checkpoint import lock, sane_step
from efficient_lm.runs.context import Context
from efficient_lm.runs.monitor import Monitor
from efficient_lm.runs.tracking import Tracker
from efficient_lm.system import interruption, sealed
from efficient_lm.system import workdir as workdirs
from efficient_lm.training import health
from efficient_lm.training.learner import new_model
from efficient_lm.training.train import Train


@dataclasses.dataclass(frozen=True)
class Step:
  """A stage of the run. number: its place, 0 for the source that the run starts from; field: its place in the config;
  course: a key that stays when the stage is only to go on for longer; steps, tokens: of all trainings before it; training:
  the last training up to it, its own included, whose text and shapes it sees."""
  number: int
  field: str
  stage: Any
  planned: record.Planned
  course: str
  steps: int
  tokens: int
  training: Any


class Run:
  """One run: its corpus, mesh, stages and files."""

  def __init__(self, experiment, default, workdir):
    self.experiment, self.default, self.workdir = experiment, default, Path(workdir)
    workdirs.check(workdir)
    self.mesh = experiment.mesh.build()
    self.batch_shards = math.prod(self.mesh.shape[name] for name in BATCH)
    self.known, (part, parts) = record.read(workdir), part_here(self.mesh)
    self.corpus = experiment.data.open(seed=experiment.seed, tokenizer=self._own_tokenizer(),
                                       process_index=part, process_count=parts)
    self._check_tokenizers()
    self.record, self.steps = self._plan()
    with jax.set_mesh(self.mesh): self._check_stages()
    self.row, self.sample = None, None

  # ---------------------------------------------------------------- before anything is written

  def _own_tokenizer(self):
    """The run's tokenizer: its own, once it has one, or that of what it starts from; None: the configured one is fitted."""
    if (self.workdir / record.TOKENIZER).is_file(): return record.tokenizer(self.workdir)
    return None if self.experiment.start is None else self.experiment.start.tokenizer()

  def _check_tokenizers(self):
    own, configured = self.corpus.tokenizer, self.experiment.data.tokenizer
    if self.known and self.known.tokenizer != own.key:
      raise CheckpointError(f'{self.workdir / record.TOKENIZER} is missing, and what would be in its place now is another '
                            'than the run was trained with: bring it back')
    if not (configured is None or is_source(configured)) and configured.vocab_size != own.vocab_size:
      raise ConfigError('config.data.tokenizer', configured, f'is not the one of what the run starts from, which has '
                        f'{own.vocab_size} ids: leave it None')
    for path, source in experiments.sources(self.experiment):
      if source.here and source.tokenizer().key != own.key:
        fix = ('was trained with another tokenizer, whose ids mean other text: name a run with the same, start from it, or '
               'take its tokenizer, config.data.tokenizer')
        raise ConfigError(f'{path}.path', source.label, fix)

  def _plan(self) -> tuple[record.Record, list[Step]]:
    """What run.json is to say, and the stages with their keys."""
    experiment, known = self.experiment, self.known
    text = known.text if known else self.corpus.describe()
    start = self._start_record()
    keys = {source.label: self._key_of(path, source) for path, source in experiments.sources(experiment)}
    origin = start['key'] if start else record.key_of('model', fields.to_json(experiment.model))
    first = [self._start_step(origin)] if start else []
    given = record.key_of(origin, experiment.seed, text.get('hash'), self.corpus.tokenizer.key)
    steps, taken, tokens, training = first, 0, 0, experiment.train
    for number, (field, stage) in enumerate(experiment.sequence, 1):
      name = getattr(stage, 'name', type(stage).__name__).lower()
      key, course = record.stage_keys(stage, given, keys)
      if isinstance(stage, Train): training = stage.training
      planned = record.Planned(f'{number}_{name}', f'{number} {name}', key)
      steps.append(Step(number, field, stage, planned, course, taken, tokens, training))
      if isinstance(stage, Train): taken, tokens = taken + training.steps, tokens + training.steps * training.tokens_per_step
      given = key
    return record.Record(text, self.corpus.tokenizer.key, start, keys, tuple(step.planned for step in steps)), steps

  def _start_record(self):
    start = self.experiment.start
    if start is None: return None
    if not start.here: return self.known.start
    return {'source': start.label, 'key': start.key(), 'spec': fields.to_json(start.spec())}

  def _start_step(self, origin: str) -> Step:
    planned = record.Planned('0_start', '0 start', record.key_of('start', origin))
    return Step(0, 'config.start', self.experiment.start, planned, planned.key, 0, 0, self.experiment.train)

  def _key_of(self, path: str, source) -> str:
    """Of a source, or, where it is gone, the one that it had when the run began."""
    if source.here: return source.key()
    if path == 'config.start' and self.known and self.known.start: return self.known.start['key']
    return self.known.sources[source.label]

  def _check_stages(self):
    """Refuses what would only be found after hours of training, and what no memory holds."""
    model, devices = derived.start_shapes(self.experiment, self.workdir), list(self.mesh.devices.flat)
    start, name = self.experiment.start, 'model' if self.experiment.start is None else 'start'
    memory.check_model(model, self.experiment.model if start is None else start, devices, f'config.{name}')
    width = getattr(experiments.model_of(self.experiment, self.workdir), 'dim', 1)
    for step in self.steps:
      if step.number == 0: continue
      field = f'{step.field}.{"train" if step.field == "config" else "training"}'
      if isinstance(step.stage, Train): memory.check_batch(step.training, width, devices, field)
      with in_field(step.field, step.stage):
        given, model = model, jax.eval_shape(step.stage.abstract, model)
        invariants.check_shapes(given, model, step.stage)

  def _check_processes(self):
    """Refuses several processes that would not do the same, do not see one workdir, or come to a stage that works in one."""
    if not processes.several(): return
    stated = {'config': json.dumps(fields.to_json(self.experiment)),
              'text': json.dumps(dataclasses.asdict(self.record), sort_keys=True)}
    processes.refuse_unlike(**stated)
    shared.check(self.workdir)
    for step in self.steps:
      if step.number == 0 or getattr(step.stage, 'across_processes', False): continue
      if record.committed(self.workdir, step.planned): continue
      raise ConfigError(step.field, type(step.stage).__name__, 'works in one process only: leave it out here, and when the '
                        'rest is done give the command again with it, on one host alone')

  # ---------------------------------------------------------------- the loop

  def run(self):
    """All stages that have not been committed, then the ledger and the report."""
    self._check_processes()
    with contextlib.ExitStack() as stack:
      stack.enter_context(jax.set_mesh(self.mesh))
      stack.enter_context(lock(self.workdir))
      pending = self.pending()
      console.start(self, pending[0] if pending else None)
      processes.on_first(self.write_beginning)
      if pending: self._perform(self.steps[self.steps.index(pending[0]):])
      rows = commits.write_ledger(self.workdir, self.record.plan)
      processes.on_first(self._finish, rows)

  def _finish(self, rows):
    with writing.dispensable(self.workdir / 'report.html'): report_page.write_report(self.workdir)
    console.finish(self, rows, self.sample, self.workdir / 'report.html')

  def pending(self) -> list[Step]:
    """Stages that have not been committed under their present keys. The run goes on with the first of them, and makes all
    that follow it again."""
    return [step for step in self.steps if not record.committed(self.workdir, step.planned)]

  def write_beginning(self):
    """Config, tokenizer and record, each whole with its hash. A run that is killed between two of them is taken up as one
    that has not begun."""
    with writing.needed(self.workdir / experiments.CONFIG_JSON): experiments.write(str(self.workdir), self.experiment)
    path = self.workdir / record.TOKENIZER
    if not path.is_file() or not sealed.is_sealed(path): record.write_tokenizer(self.workdir, self.corpus.tokenizer)
    record.write(self.workdir, self.record)

  def _perform(self, steps: list[Step]):
    """These stages, one after the other, each with the model that the one before has left."""
    processes.on_first(self._set_aside, steps[0])
    first = steps[0]
    reached, end = first.steps + self._saved_step(first), first.steps + self._own_steps(first)
    with contextlib.closing(Tracker(self.workdir, first.number, reached, end)) as self.tracker:
      model = self._given(steps[0])
      for step in steps:
        if step is not steps[0]: processes.on_first(self._set_aside, step)
        model = self._perform_one(step, model)
      settings = {path: value for path, value in fields.walk(self.experiment) if not fields.is_config(value)}
      self.tracker.hparams(settings, {'bits_per_byte': self.row.quality.bits_per_byte})

  def _perform_one(self, step: Step, model):
    """What the stage makes of the model, committed."""
    monitor = Monitor(self, step)
    processes.on_first(record.begin, self.workdir, step.planned, step.course)
    if step.number == 0: model, notes = step.stage.load(self.mesh), (f'start: {step.stage.label}',)
    else: model, notes = self._made(step, model, monitor)
    at = self._own_steps(step)
    with health.advised(self._checkpoints(step), lambda: sane_step(self._checkpoints(step))):
      monitor.evaluate(at, model, end=True)
    self.row, self.sample = monitor.row(step.planned.name, model, [*notes, *self.remarks]), monitor.sample
    with interruption.holding():   # what it has taken to come here would be lost
      commits.commit(self.workdir, step.planned, step.steps + at, model, self.row, monitor.text)
      commits.write_ledger(self.workdir, self.record.plan)
    console.stage(step, model, notes, monitor.result)
    return model

  def _own_steps(self, step: Step) -> int:
    return step.training.steps if isinstance(step.stage, Train) else 0

  def _made(self, step: Step, model, monitor: Monitor):
    promised = invariants.read(self._before(step) if self._saved_step(step) else model)
    context = Context(
      key=jax.random.fold_in(self._keys[1], step.number), mesh=self.mesh, corpus=self.corpus, field=step.field,
      folder=self._checkpoints(step), tokens_seen=step.tokens, training=step.training, monitor=monitor)
    with context, in_field(step.field, step.stage):
      model, notes = step.stage(model, context)
      return model, (*notes, *invariants.check(promised, model, step.stage, context.followed))

  @functools.cached_property
  def _keys(self):
    """For the model, and for the stages."""
    return jax.random.split(jax.random.key(self.experiment.seed))

  def _given(self, step: Step):
    """The model that a stage is given; shapes will do for one that goes on from a state of its own."""
    if step.number == 0: return None
    if not self._saved_step(step): return self._before(step) or new_model(self.experiment.model, self._keys[0], self.mesh)
    place = self.steps.index(step)
    if place: shapes = commits.abstract(self.workdir, self.steps[place - 1].planned)
    else: shapes = derived.start_shapes(self.experiment)
    return placed(shapes, self.mesh)

  def _before(self, step: Step):
    """The model that the stage before has left, None where there is none."""
    place = self.steps.index(step)
    return commits.load(self.workdir, self.steps[place - 1].planned, self.mesh) if place else None

  # ---------------------------------------------------------------- what a stage has saved while it went

  def _checkpoints(self, step: Step) -> Path:
    first = step.number == 1 and isinstance(step.stage, Train)
    return self.workdir / derived.CHECKPOINTS if first else record.stage_folder(self.workdir, step.planned) / 'checkpoints'

  def _saved_step(self, step: Step) -> int:
    """The newest step that a stage has saved of its own course, 0 if none."""
    if not getattr(step.stage, 'resumes', False): return 0
    return max(derived.saved_steps(self._checkpoints(step)), default=0)

  def _set_aside(self, step: Step):
    """Moves away what a stage has left or saved of another course: of other settings, or of another model given."""
    if record.course(self.workdir, step.planned) in (None, step.course): return
    # The stage's folder last: it holds the course, without which a kill in between would leave the states to be resumed.
    for folder in (self._checkpoints(step), record.stage_folder(self.workdir, step.planned)):
      name = str(folder.relative_to(self.workdir))
      if folder.is_dir(): workdirs.move(self.workdir, name, f'{name}.old')

  # ---------------------------------------------------------------- what there is to say

  @functools.cached_property
  def baselines(self) -> dict[str, float]:
    """What the quality is to be compared with: the entropy, where it is known, or compressors without a neural network."""
    floor = self.corpus.entropy_nats_per_token
    return {'entropy': floor / math.log(2)} if floor is not None else baselines(self.corpus)

  @functools.cached_property
  def remarks(self) -> list[str]:
    """What a reader of the ledger has to know of the model and the text."""
    found, now = experiments.caveats(self.experiment), self.corpus.describe()
    if now['hash'] != self.record.text.get('hash'):
      files = lambda text: f'{text.get("train_files")} + {text.get("heldout_files")} documents'
      count = lambda text: f'{files(text)}, sha256 {str(text.get("hash"))[:12]}'
      found.append(f'the text has changed since the run began: {count(self.record.text)} then, {count(now)} now')
    if now['left_out']:
      more = f' and {len(now["left_out"]) - 3} more' if len(now['left_out']) > 3 else ''
      found.append(f'left out of the text: {", ".join(now["left_out"][:3])}{more}')
    return found


def run(experiment, default, workdir):
  """Builds and performs a run; see `main`."""
  with processes.together(): made = Run(experiment, default, workdir)
  made.run()
