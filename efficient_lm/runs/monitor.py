"""What a run watches of a stage while it goes, and measures of what it leaves: for the log, the terminal and the ledger."""
import math
import time

import jax
import numpy as np

from efficient_lm.errors import IncompatibleError, NonFinite
from efficient_lm.models import decode
from efficient_lm.parallel import replicas
from efficient_lm.parallel.processes import checking
from efficient_lm.runs import console, ledger, measure, record, writing
from efficient_lm.runs.energy import Energy
from efficient_lm.runs.tracking import load_heatmap
from efficient_lm.system import workdir as workdirs
from efficient_lm.training.evaluation import evaluate
from efficient_lm.training.train import Train
from efficient_lm.tree import path_name

SAMPLE_TOKENS = 256


class Monitor:
  """Of one stage (`run.Step`) of a run. Evaluations of trainings are points of one curve, those of other stages have names
  of their own."""

  def __init__(self, run, step):
    self.run, self.place, self.number, self.offset, self.training = run, step, step.number, step.steps, step.training
    self.trains = isinstance(step.stage, Train)
    self.energy, self.memory, self.clock = Energy(), measure.PeakMemory(), time.perf_counter()
    self.first, self.step, self.speeds, self.load, self.flops, self.bar = 0, 0, [], None, None, None
    self.result, self.latency, self.sample = {}, None, None

  # ---------------------------------------------------------------- while it goes

  def report(self, training, notes, state):
    """At the start of a training, or where it goes on."""
    self.first = self.step = int(state.step)
    self.flops = measure.flops_per_token(state.model, training.sequence_length)
    name = self.place.planned.name if len(self.run.steps) > 1 else ''
    console.training(name, training, notes, state)
    self.clock = time.perf_counter()

  def progress(self, first: int, last: int):
    """The progress bar of a training."""
    self.bar = console.Progress(first, last)
    return self.bar

  def log(self, step: int, numbers: dict):
    """Numbers of a step of the stage."""
    self.step = step
    peak = measure.peak_flops(jax.devices()[0])
    if peak: numbers['mfu'] = numbers['tokens_per_second'] * self.flops.training / (peak * jax.device_count())
    self.run.tracker.scalars(self.offset + step, numbers, self.number)
    self.energy.joules()   # counters wrap around: they must be read now and then
    if 'tokens_per_second' in numbers: self.speeds.append(numbers['tokens_per_second'])
    if 'load' in numbers: self.load = np.array(numbers['load'])

  def evaluate(self, step: int, model, end: bool = False):
    """Quality on held-out text, a hash of the model, and a sample; `end`: of what the stage leaves. Raises DeviceFault where
    copies of a parameter on several devices are not equal, and NonFinite."""
    tracker, at = self.run.tracker, self.offset + step
    prefix = 'eval' if self.trains else f'stage/{self.number}'
    found = {'parameters_hash': self._hash(model)}
    self.result = evaluate(model, self._heldout(), self.run.mesh)
    numbers = {f'{prefix}/{name}': value for name, value in (self.result | found).items()}
    tracker.scalars(at, numbers, self.number, end)
    if self.trains and not math.isfinite(self.result['nats_per_token']):
      raise NonFinite(f'step {step}: the loss on held-out text is {self.result["nats_per_token"]}')
    self._sample(at, model)
    if not self.trains: return
    if self.load is not None: tracker.image(at, 'expert_load', load_heatmap(self.load))
    for name, array in measure.histogram_arrays(model): tracker.histogram(at, name, array)
    if not end: self.bar.note(step, self.result)

  @staticmethod
  def _hash(model) -> str:
    """Of all arrays of the model, bit for bit: two runs that have the same have the same model."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}
    return record.key_of({name: value for name, (value, _) in replicas.digests(leaves).items()})[:16]

  def has_evaluated(self, step: int) -> bool:
    """Whether `evaluate` has left its row of this step of a training."""
    return self.run.tracker.has(self.offset + step, 'eval/bits_per_byte', self.number)

  def _heldout(self, corpus=None):
    """Batches of held-out text, of as many rows as training reads at once, so that they take no more memory."""
    corpus = corpus or self.run.corpus
    rows = self.training.batch_size // self.training.accumulate
    return corpus.eval_batches(rows=rows, sequence_length=self.training.sequence_length)

  def _sample(self, at: int, model):
    """Continues the beginning of the held-out text, and times it: one row a batch shard, so on one device this is the
    latency of a single reader."""
    corpus, shards = self.run.corpus, self.run.batch_shards
    batch = next(iter(self._heldout(corpus.undivided)))   # all processes read the prompts of all
    prompt_BT, drawn, clock, check = batch['inputs_BT'][:shards, :32], [], None, checking()
    try:
      for ids in decode.stream(model, prompt_BT, SAMPLE_TOKENS, sampling=decode.Sampling(0.8), seed=at,
                               vocab_size=corpus.tokenizer.vocab_size):
        check()
        drawn.append(ids)
        clock = clock or time.perf_counter()   # the first burst compiles
    except IncompatibleError: return   # a model that cannot be decoded, as its caveats say
    self.latency = (time.perf_counter() - clock) / (SAMPLE_TOKENS - drawn[0].shape[1])
    text = decode.until_stop(np.concatenate(drawn, 1)[0], corpus.tokenizer.stops)
    self.sample = corpus.tokenizer.decode(prompt_BT[0]), corpus.tokenizer.decode(text)
    name = f'{at:08d}.txt' if self.trains else f'stage_{self.number}.txt'
    if jax.process_index() == 0:
      with writing.dispensable(self.run.workdir / 'samples'): workdirs.write(self.run.workdir, f'samples/{name}', self.text)
    self.run.tracker.text(at, 'sample', self.text)

  @property
  def text(self) -> str | None:
    """The sample with its prompt, None where there is none."""
    return None if self.sample is None else ''.join(self.sample)

  # ---------------------------------------------------------------- what it leaves

  def row(self, name: str, model, notes) -> ledger.Row:
    """The ledger's row of the model that the stage leaves, after `evaluate`; without its bytes on disk."""
    run, steps = self.run, self.step - self.first
    seconds, (peak, source), joules = time.perf_counter() - self.clock, self.memory.read(), self.energy.joules()
    tokens, parameters = steps * self.training.tokens_per_step, measure.parameters(model)
    return ledger.Row(
      stage=name, notes=tuple(notes),
      quality=ledger.Quality(bits_per_byte=self.result['bits_per_byte'], perplexity=self.result['perplexity'],
                             baselines=run.baselines),
      size=ledger.Size(parameters=parameters.total, nonzero_parameters=measure.nonzero_parameters(model),
                       active_parameters=parameters.active, bits_per_parameter=measure.bits_per_parameter(model),
                       bytes_in_memory=measure.num_bytes(model),
                       flops_per_token=measure.flops_per_token(model, self.training.sequence_length).forward),
      speed=ledger.Speed(tokens_per_second=float(np.median(self.speeds)) if self.speeds else None,
                         latency_seconds=self.latency, peak_memory_bytes=peak, memory_source=source),
      effort=ledger.Effort(steps=steps, tokens=tokens, wall_seconds=seconds, energy_source=self.energy.source,
                           joules_per_token=joules / tokens if joules is not None and tokens else None),
      origin=ledger.Origin(hardware=ledger.hardware(), versions=ledger.versions(), corpus_hash=run.corpus.hash,
                           seed=run.experiment.seed))
