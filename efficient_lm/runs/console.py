"""What a run says on the terminal: the start-up report, then a progress bar (plain lines where there is no terminal)."""
import time

import jax
import rich.console
import rich.markup
import rich.progress
import rich.table
import rich.text

from efficient_lm.compression import rewriting
from efficient_lm.config import experiment as experiments
from efficient_lm.runs import ledger, measure
from efficient_lm.training.train import Train

CPU_FLOPS = 1e11          # what two cores of a laptop reach on float32 products: to say how long a run would take there
LONG_RUN = 6 * 3600       # seconds on a CPU from which a run is told to look for an accelerator
TABLE_WIDTH = 120         # characters
PLAIN_EVERY = 30          # seconds between progress lines where there is no terminal
STAGES_SHOWN = 4          # columns of the table at the end; the report has all
TABLE = ('weight', 'stored as', 'multiplied', 'bytes', 'of float32')   # of a stage's weights


def terminal():
  """A rich console on standard output; only process 0 prints."""
  return rich.console.Console(quiet=jax.process_index() != 0, highlight=False)


def for_tables():
  """The same, with room for a table where a file is written."""
  console = terminal()
  if not console.is_terminal: console.width = TABLE_WIDTH
  return console


def track(items, what: str, total: int):
  """The same items, with a bar on standard error that is gone at the end, where that is a terminal."""
  shown = rich.console.Console(stderr=True)
  return rich.progress.track(items, what, total=total, console=shown, transient=True,
                             disable=jax.process_index() != 0 or not shown.is_terminal)


def human(number: float, unit: str = '') -> str:
  """1234567 -> '1.23M'."""
  for power, letter in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if number >= power: return f'{number / power:.3g}{letter}{unit}'
  return f'{number:.3g}{unit}'


def say(heading: str, text: str, style: str = 'bold'):
  """A line of the report; `text` is shown as it is."""
  terminal().print(f'[{style}]{heading:<10}[/]{rich.markup.escape(text)}', soft_wrap=True)


def start(run, first):
  """Devices, corpus, what differs from the config's defaults, what a reader has to know, and where the run goes on; first:
  the stage to be performed next, None where there is none."""
  device, mesh = jax.devices()[0], ' '.join(f'{name}={size}' for name, size in run.mesh.shape.items() if size > 1)
  hosts = f', {jax.process_count()} processes' if jax.process_count() > 1 else ''
  say('devices', f'{jax.device_count()} x {device.device_kind}{hosts}{", mesh " + mesh if mesh else ""}')
  text = run.corpus.describe()
  say('text', f'{text["name"]}: {human(text["train_bytes"], "B")} to train on, {human(text["heldout_bytes"], "B")} held '
              f'out, {text["tokenizer"]}, sha256 {text["hash"][:12]}')
  for path, default, value in experiments.difference(run.default, run.experiment):
    say('changed', f'{path}: {default} -> {value}')
  for line in run.remarks: say('note', line, 'bold red')
  begun = 'all of them done' if first is None else '' if first is run.steps[0] else f'goes on with {first.planned.name}'
  if len(run.steps) > 1 or begun:
    say('stages', '; '.join(filter(None, (', '.join(step.planned.name for step in run.steps), begun))))
  say('logs', f'tensorboard --logdir {run.workdir}')


def training(name: str, training, notes, state):
  """Of a training that is about to begin or to go on: techniques, sizes and costs, and the step that it resumes after."""
  if name: terminal().print(f'\n[bold]stage {name}[/]')
  for note in notes: say('technique', note)
  for heading, line in costs(training, state).items(): say(heading, line)
  total = measure.flops_per_token(state.model, training.sequence_length).training * training.tokens_per_step
  seconds = total * training.steps / CPU_FLOPS
  if jax.devices()[0].platform == 'cpu' and seconds > LONG_RUN:
    terminal().print(f'[bold red]WARNING: no accelerator was found, and this run needs about {seconds / 86400:.1f} days '
                     f'on a CPU. Is JAX installed for your GPU or TPU?[/]')
  resumed = int(state.step)
  say('steps', f'{training.steps}, {f"resumes after step {resumed}" if resumed else "from the beginning"}\n')


def costs(training, state) -> dict[str, str]:
  """What the model and its training take, a line each."""
  parameters = measure.parameters(state.model)
  flops = measure.flops_per_token(state.model, training.sequence_length)
  memory = measure.state_bytes(state.model, state.opt_state)
  return {
    'model': f'{human(parameters.total)} parameters, {human(parameters.active)} active a token',
    'training': f'{human(flops.training)} FLOPs a token, {human(training.tokens_per_step)} tokens a step',
    'memory': f'{human(memory.model, "B")} model, {human(memory.optimizer, "B")} optimizer, '
              f'{human(memory.total, "B")} with gradients'}


class Progress:
  """Steps done, loss, tokens per second, MFU where the peak is known, time left."""

  def __init__(self, first: int, last: int):
    self.first, self.last, self.console = first, last, terminal()
    self.live, self.text = self.console.is_terminal, ''

  def __enter__(self):
    self.started = self.printed = time.perf_counter()
    if self.live:
      self.bar = rich.progress.Progress(
        rich.progress.TextColumn('step'), rich.progress.MofNCompleteColumn(), rich.progress.BarColumn(bar_width=24),
        rich.progress.TextColumn('{task.description}'), rich.progress.TimeRemainingColumn(), console=self.console)
      self.task = self.bar.add_task('compiling', total=self.last, completed=self.first)
      self.bar.start()
    return self.advance

  def __exit__(self, *error):
    if self.live: self.bar.stop()

  def advance(self, step: int, numbers: dict | None):
    """Called after each step; `numbers` on logged ones."""
    if numbers:
      self.text = f'loss {numbers["loss"]:.4f}  {human(numbers["tokens_per_second"])} tokens/s'
      if 'mfu' in numbers: self.text += f'  MFU {numbers["mfu"]:.1%}'
    if self.live: self.bar.update(self.task, completed=step, description=self.text)
    elif numbers and not self.console.quiet and self._is_due(step):
      self.printed = time.perf_counter()
      timed = step - self.first - 1
      left = f'  {(self.printed - self.started) / timed * (self.last - step):.0f} s left' if timed else ''
      print(f'step {step}/{self.last}  {self.text}{left}', flush=True)
    if step == self.first + 1: self.started = time.perf_counter()   # that step was mostly compilation

  def _is_due(self, step: int) -> bool:
    return time.perf_counter() - self.printed > PLAIN_EVERY or step in (self.first + 1, self.last)

  def note(self, step: int, result: dict):
    """A line above the bar: an evaluation."""
    self.console.print(f'step {step}: {_quality(result)}', soft_wrap=True)


def _quality(result: dict) -> str:
  return f'held-out [bold]{result["bits_per_byte"]:.4f} bits per byte[/], perplexity {result["perplexity"]:.2f} a token'


def stage(step, model, notes, result: dict):
  """What a stage has done: its quality, and, where it is no training, its notes and every weight with its format, what
  multiplies it, and its bytes."""
  console = for_tables()
  console.print(f'[bold]stage {rich.markup.escape(step.planned.name)}[/]: {_quality(result)}', soft_wrap=True)
  if isinstance(step.stage, Train) or step.number == 0: return
  for note in notes: console.print(f'  {note}', soft_wrap=True, markup=False)
  table = rich.table.Table(*(rich.table.Column(name, overflow='fold') for name in TABLE), box=None)
  for line in rewriting.table(model):
    cells = (line.path, line.kind, line.product, human(line.num_bytes, 'B'), f'{line.num_bytes / line.float_bytes:.3f}')
    table.add_row(*map(rich.text.Text, cells))
  console.print(table)


def finish(run, rows, sample, page):
  """What came of it: quality beside plain compressors, cost, a sample, and where to look further."""
  console = terminal()
  if rows:
    quality = rows[-1].quality
    beside = ', '.join(f'{name} {bits:.3f}' for name, bits in quality.baselines.items())
    bits = ledger.number(quality.bits_per_byte, 4)
    console.print(f'\n[bold]{bits} bits per byte[/] on held-out text (beside it: {beside})', soft_wrap=True)
    console.print(ledger.table({row.stage: row for row in rows[-STAGES_SHOWN:]}))
  if sample is not None:
    prompt, text = sample
    console.print('[bold]a sample, after the part in bold:[/]')
    console.print(rich.text.Text(prompt, style='bold') + rich.text.Text(text), soft_wrap=True)
  console.print()
  say('report', str(page))
  say('next', f'python -m efficient_lm.generate --run={run.workdir}')
