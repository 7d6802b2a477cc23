"""From an experiment to a trained model in a folder, and back: what `main`, `generate` and `evaluate` have in common."""
import contextlib
import dataclasses
import itertools
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm import axes, tree
from efficient_lm.compression import rules
from efficient_lm.config import experiment as experiments
from efficient_lm.config import fields
from efficient_lm.data import tokenizers
from efficient_lm.data.baselines import yardsticks
from efficient_lm.errors import CheckpointError, ConfigError, blaming
from efficient_lm.models import decode
from efficient_lm.report import write_report
from efficient_lm.runs import console, ledger, measure, stages
from efficient_lm.runs.checkpoint import Checkpoints, lock
from efficient_lm.runs.tracking import Tracker, load_heatmap
from efficient_lm.training import trainer as train
from efficient_lm.training.learner import Learner, assemble, initial_state, new_model

SAMPLE_TOKENS = 256


def starting_model(experiment, key, mesh=None):
  """The model before any technique: drawn from its spec, or that of an earlier run."""
  if experiment.start is not None: return experiment.start.load(mesh)
  return new_model(experiment.model, key, mesh)


def abstract_model(experiment):
  """Shapes of the model that a run of `experiment` trains, without drawing or reading a single number."""
  def build(key):
    if experiment.start is not None: model = blank(abstract_result(experiment.start.read()))
    else: model = experiment.model.build(rngs=nnx.Rngs(params=key))
    learner = Learner(model, None, None)
    # The keys of techniques count every technique, as in `assemble`; shapes do not depend on them.
    for technique in experiment.techniques:
      if technique.touches == 'model': learner = technique(learner, key)
    return learner.model
  return jax.eval_shape(build, jax.random.key(0))


def abstract_result(experiment):
  """Shapes of the model that a run of `experiment` leaves behind: after its stages."""
  model = abstract_model(experiment)
  for stage in experiment.stages: model = jax.eval_shape(stage.abstract, model)
  return model


def blank(abstract):
  """Zeros of the given shapes; inside `eval_shape` they cost nothing."""
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)


def placed(abstract, mesh):
  """The same shapes with the sharding that each will have on `mesh`."""
  add = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  return jax.tree.map(add, abstract, axes.shardings(abstract, mesh))


def single_device_mesh():
  """All of a model on the first device."""
  types = (jax.sharding.AxisType.Auto,) * len(axes.MESH)
  return jax.make_mesh((1,) * len(axes.MESH), axes.MESH, devices=jax.devices()[:1], axis_types=types)


def load_model(folder, mesh=None):
  """The newest saved model of a run, that of its last stage if it has some, on `mesh` (default: one device), whatever mesh
  it was trained on."""
  experiment = experiments.read(str(folder))
  where = Path(folder) / 'checkpoints'
  if experiment.stages:
    where = stage_folder(folder, experiment, len(experiment.stages) - 1)
    if not where.is_dir(): raise CheckpointError(f'no {where}: the run has not come to its last stage; run it again')
  abstract = placed(abstract_result(experiment), mesh or single_device_mesh())
  with contextlib.closing(Checkpoints(where)) as checkpoints: return checkpoints.restore_model(abstract)


def stage_folder(workdir, experiment, index: int) -> Path:
  """Where the model of a stage is kept."""
  return Path(workdir) / 'stages' / stages.folder_name(index, experiment.stages[index])


def bytes_on_disk(checkpoints) -> int:
  """Of the newest model saved in a folder of checkpoints, as it is stored, without the optimizer's state."""
  newest = max((entry for entry in Path(checkpoints).iterdir() if entry.name.isdecimal()), key=lambda entry: int(entry.name))
  return sum(file.stat().st_size for file in (newest / 'model').rglob('*') if file.is_file())


def load_tokenizer(folder):
  """The tokenizer that a run was trained with."""
  path = Path(folder) / 'tokenizer.json'
  if not path.is_file(): raise CheckpointError(f'{path} is missing: the run has not started training')
  return tokenizers.from_json(path.read_text())


class Run:
  """One training run: its corpus, learner, state and files. Nothing is written before all of it has been built."""

  def __init__(self, experiment, default, workdir):
    self.experiment, self.default, self.workdir = experiment, default, Path(workdir)
    training = self.training = experiment.train
    self.mesh = experiment.mesh.build()
    self.batch_shards = math.prod(self.mesh.shape[name] for name in axes.BATCH)
    parts = self.batch_shards * training.accumulate
    if training.batch_size % parts:
      raise ConfigError('config.train.batch_size', training.batch_size, f'must be a multiple of {parts}: the mesh\'s data '
                        f'* fsdp * expert, times config.train.accumulate')
    self.corpus = experiment.data.open(
      sequence_length=training.sequence_length, batch_size=training.batch_size, seed=experiment.seed,
      process_index=jax.process_index(), process_count=jax.process_count())
    key_model, key_techniques = jax.random.split(jax.random.key(experiment.seed))
    with jax.set_mesh(self.mesh):
      model = starting_model(experiment, key_model, self.mesh)
      self.learner = assemble(model, training.optimizer.build(training.steps), experiment.techniques, key_techniques)
      self.state = initial_state(self.learner, self.mesh)
      self._check_stages()
    self.learner = self.learner.replace(model=None)   # the state has its own copy; keep no second one alive
    self.flops = measure.flops_per_token(self.state.model, training.sequence_length)
    self.load, self.result, self.speeds, self.latency, self.sample, self.row = None, {}, [], None, None, None

  def _check_stages(self):
    """Refuses what would only be found after training."""
    model = self.state.model
    for i, stage in enumerate(self.experiment.stages):
      with blaming(f'config.stages[{i}]', stage): model = jax.eval_shape(stage.abstract, model)

  def train(self):
    """Trains to the last step, resuming where the workdir left off; then the stages, the ledger and the report."""
    with contextlib.ExitStack() as stack:
      stack.enter_context(jax.set_mesh(self.mesh))
      stack.enter_context(lock(self.workdir))
      self.checkpoints = stack.enter_context(contextlib.closing(Checkpoints(self.workdir / 'checkpoints')))
      resumed = self._restore()
      console.report(self, resumed)
      self._write_config()
      self.tracker = stack.enter_context(contextlib.closing(Tracker(self.workdir, resumed)))
      energy = self.energy = measure.Energy()
      clock = time.perf_counter()
      with console.Progress(resumed or 0, self.training.steps) as self.progress:
        batches = self.corpus.iterate(resumed or 0)
        callbacks = train.Callbacks(self._log, self._evaluate, self._save, self.progress.advance)
        next_batch = lambda step: train.place(next(batches), self.mesh)
        self.state = train.fit(self.state, self.learner, next_batch, self.training, callbacks)
      if self.training.steps == 0 and resumed is None: self._measure_start()
      self.checkpoints.wait()
      steps = self.training.steps - (resumed or 0)
      self._enter('train', self.state.model, steps, time.perf_counter() - clock, energy, self.workdir / 'checkpoints',
                  self.learner.notes)
      self._stages()
      if jax.process_index() == 0: console.finish(self, write_report(self.workdir))

  def _restore(self) -> int | None:
    if not self.checkpoints.steps(): return None
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), self.state)
    self.state = self.checkpoints.restore(shapes)
    return int(self.state.step)

  def _write_config(self):
    if jax.process_index(): return
    (self.workdir / 'samples').mkdir(parents=True, exist_ok=True)
    experiments.write(str(self.workdir), self.experiment)
    (self.workdir / 'tokenizer.json').write_text(self.corpus.tokenizer.to_json())

  def _log(self, step: int, numbers: dict):
    numbers['tokens_per_second'] = console.tokens_per_step(self.training) * numbers['steps_per_second']
    numbers['learning_rate'] = float(self.training.optimizer.schedule.build(self.training.steps)(step - 1))
    peak = measure.peak_flops(jax.devices()[0])
    if peak: numbers['mfu'] = numbers['tokens_per_second'] * self.flops.training / (peak * jax.device_count())
    self.tracker.scalars(step, numbers)
    self.energy.joules()   # counters wrap around: they must be read now and then
    self.speeds.append(numbers['tokens_per_second'])
    if 'load' in numbers: self.load = np.array(numbers['load'])

  def _evaluate(self, step: int, model):
    self._measure(step, model, 'eval', f'{step:08d}')
    if self.load is not None: self.tracker.image(step, 'expert_load', load_heatmap(self.load))
    for name, array in measure.histogram_arrays(model): self.tracker.histogram(step, name, array)
    self.progress.note(step, self.result)

  def _measure(self, step: int, model, name: str, sample: str):
    """Quality on held-out text, and a sample, under these names."""
    self.result = train.evaluate(model, self.corpus.eval_batches(), self.mesh)
    self.tracker.scalars(step, {f'{name}/{figure}': value for figure, value in self.result.items()})
    self._sample(step, model, sample)

  def _sample(self, step: int, model, name: str):
    """Continues the beginning of the held-out text, and times it: one row a batch shard, so on one device this is the
    latency of a single reader."""
    tokenizer = self.corpus.tokenizer
    prompt_BT = next(iter(self.corpus.eval_batches()))['inputs_BT'][:self.batch_shards, :32]
    drawn, clock = [], None
    for ids in decode.stream(model, prompt_BT, SAMPLE_TOKENS, sampling=decode.Sampling(0.8), seed=step,
                             vocab_size=tokenizer.vocab_size):
      drawn.append(ids)
      clock = clock or time.perf_counter()   # the first burst compiles
    self.latency = (time.perf_counter() - clock) / (SAMPLE_TOKENS - drawn[0].shape[1])
    self.sample = tokenizer.decode(prompt_BT[0]), tokenizer.decode(np.concatenate(drawn, 1)[0])
    if jax.process_index() == 0:
      (self.workdir / 'samples' / f'{name}.txt').write_text(''.join(self.sample), encoding='utf-8')
    self.tracker.text(step, 'sample', ''.join(self.sample))

  def _save(self, step: int, state, wait: bool):
    self.checkpoints.save(step, state, wait=wait)

  def _measure_start(self):
    """Of a run that trains no step: what it starts from is what its stages are compared with."""
    self._evaluate(0, self.state.model)
    self._save(0, self.state, True)

  def _stages(self):
    """What follows training: each stage maps the model to another, which is saved, measured and gets its own row."""
    model, settled = self.state.model, self.learner.notes
    for i, stage in enumerate(self.experiment.stages):
      energy, clock, name = measure.Energy(), time.perf_counter(), f'{i + 1} {type(stage).__name__}'
      folder = stage_folder(self.workdir, self.experiment, i)
      with contextlib.closing(Checkpoints(folder)) as saved:
        if saved.steps():   # of a run that was taken up again
          model = saved.restore_model(placed(jax.eval_shape(stage.abstract, model), self.mesh))
          continue
        key = jax.random.fold_in(jax.random.key(self.experiment.seed), i)
        with blaming(f'config.stages[{i}]', stage):
          model, notes = stage(model, stages.Context(key, self._calibration, self.mesh))
        seconds = time.perf_counter() - clock
        saved.save(self.training.steps, {'model': model}, wait=True)
      settled = (*settled, *notes)
      table = rules.table(model)
      if jax.process_index() == 0:
        (folder / 'weights.json').write_text(json.dumps([dataclasses.asdict(line) for line in table], indent=2))
      console.stage(name, notes, table)
      self._measure(self.training.steps, model, f'stage/{i + 1}', f'stage_{i + 1}')
      self._enter(name, model, 0, seconds, energy, folder, settled)

  def _calibration(self, count: int):
    """Batches of training text that follow those trained on."""
    for batch in itertools.islice(self.corpus.iterate(self.training.steps), count): yield train.place(batch, self.mesh)

  def _enter(self, stage: str, model, steps: int, seconds: float, energy, folder, notes):
    """Adds the ledger's row of a stage, whose model lies in `folder`. A run resumed at its end keeps the row that it had."""
    if jax.process_index() or not self.result: return
    tokens = steps * console.tokens_per_step(self.training)
    parameters, (peak, peak_source), joules = measure.parameters(model), measure.peak_memory(), energy.joules()
    floor = self.corpus.entropy_nats_per_token
    known = {'entropy': floor / math.log(2)} if floor is not None else yardsticks(self.corpus)
    row = ledger.Row(
      stage=stage, notes=notes,
      quality=ledger.Quality(bits_per_byte=self.result['bits_per_byte'], perplexity=self.result['perplexity'],
                             yardsticks=known),
      size=ledger.Size(parameters=parameters.total, active_parameters=parameters.active,
                       bytes_on_disk=bytes_on_disk(folder), bytes_in_memory=tree.num_bytes(model),
                       flops_per_token=self.flops.forward),
      speed=ledger.Speed(tokens_per_second=float(np.median(self.speeds)) if steps and self.speeds else None,
                         latency_seconds=self.latency, peak_memory_bytes=peak, memory_source=peak_source),
      effort=ledger.Effort(steps=steps, tokens=tokens, wall_seconds=seconds, energy_source=energy.source,
                           joules_per_token=joules / tokens if joules is not None and tokens else None),
      origin=ledger.Origin(hardware=ledger.hardware(), versions=ledger.versions(), corpus_hash=self.corpus.hash,
                           seed=self.experiment.seed))
    ledger.Ledger(self.workdir).add(row)
    self.row = row
    best = {'bits_per_byte': self.result['bits_per_byte']}
    settings = {path: value for path, value in fields.walk(self.experiment) if not fields.is_config(value)}
    self.tracker.hparams(settings, best)


def run(experiment, default, workdir):
  """Builds and trains; see `main`."""
  Run(experiment, default, workdir).train()
