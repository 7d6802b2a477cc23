"""What a run says on the terminal: the start-up report, then a progress bar (plain lines where there is no terminal)."""
import time

import jax

from efficient_lm.lazy import lazy

ledger = lazy('efficient_lm.runs.ledger')
measure = lazy('efficient_lm.runs.measure')
experiments = lazy('efficient_lm.config.experiment')
rich_console = lazy('rich.console')
rich_progress = lazy('rich.progress')
rich_table = lazy('rich.table')
rich_text = lazy('rich.text')

CPU_FLOPS = 1e11          # what two cores of a laptop reach on float32 products: to say how long a run would take there
LONG_RUN = 6 * 3600       # seconds on a CPU from which a run is told to look for an accelerator
TABLE_WIDTH = 120         # characters
PLAIN_EVERY = 30          # seconds between progress lines where there is no terminal


def terminal():
  """A rich console on standard output; only process 0 prints."""
  return rich_console.Console(quiet=jax.process_index() != 0, highlight=False)


def for_tables():
  """The same, with room for a table where a file is written."""
  console = terminal()
  if not console.is_terminal: console.width = TABLE_WIDTH
  return console


def human(number: float, unit: str = '') -> str:
  """1234567 -> '1.23M'."""
  for power, letter in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if number >= power: return f'{number / power:.3g}{letter}{unit}'
  return f'{number:.3g}{unit}'


def report(run, resumed: int | None):
  """Devices, corpus, what differs from the config's defaults, sizes and costs, and where the run starts."""
  console, training = terminal(), run.training
  say = lambda heading, text: console.print(f'[bold]{heading:<10}[/]{text}', soft_wrap=True)
  device, mesh = jax.devices()[0], ' '.join(f'{name}={size}' for name, size in run.mesh.shape.items() if size > 1)
  say('devices', f'{jax.device_count()} x {device.device_kind}{", mesh " + mesh if mesh else ""}')
  text = run.corpus.describe()
  say('text', f'{text["name"]}: {human(text["train_bytes"], "B")} to train on, {human(text["heldout_bytes"], "B")} held '
              f'out, {text["tokenizer"]}, sha256 {text["hash"][:12]}')
  for path, default, value in experiments.difference(run.default, run.experiment):
    say('changed', f'{path}: {default} -> {value}')
  for note in run.learner.notes: say('technique', note)
  for heading, line in costs(run).items(): say(heading, line)
  total = measure.flops_per_token(run.state.model, training.sequence_length).training * tokens_per_step(training)
  seconds = total * training.steps / CPU_FLOPS
  if device.platform == 'cpu' and seconds > LONG_RUN:
    console.print(f'[bold red]WARNING: no accelerator was found, and this run needs about {seconds / 86400:.1f} days '
                  f'on a CPU. Is JAX installed for your GPU or TPU?[/]')
  say('steps', f'{training.steps}, {"from the beginning" if resumed is None else f"resumes after step {resumed}"}')
  say('logs', f'tensorboard --logdir {run.workdir}\n')


def tokens_per_step(training) -> int:
  """Of a global batch."""
  return training.batch_size * training.sequence_length


def costs(run) -> dict[str, str]:
  """What the model and its training take, a line each."""
  parameters = measure.parameters(run.state.model)
  flops = measure.flops_per_token(run.state.model, run.training.sequence_length)
  memory = measure.state_bytes(run.state.model, run.state.opt_state)
  return {
    'model': f'{human(parameters.total)} parameters, {human(parameters.active)} active a token',
    'training': f'{human(flops.training)} FLOPs a token, {human(tokens_per_step(run.training))} tokens a step',
    'memory': f'{human(memory.model, "B")} model, {human(memory.optimizer, "B")} optimizer, '
              f'{human(memory.total, "B")} with gradients'}


TABLE = ('weight', 'stored as', 'multiplied', 'bytes', 'of float32')   # of a stage's weights


class Progress:
  """Steps done, loss, tokens per second, MFU where the peak is known, time left."""

  def __init__(self, first: int, last: int):
    self.first, self.last, self.console = first, last, terminal()
    self.live, self.text = self.console.is_terminal, ''

  def __enter__(self):
    self.started = self.printed = time.perf_counter()
    if self.live:
      progress = rich_progress
      self.bar = progress.Progress(
        progress.TextColumn('step'), progress.MofNCompleteColumn(), progress.BarColumn(bar_width=24),
        progress.TextColumn('{task.description}'), progress.TimeRemainingColumn(), console=self.console)
      self.task = self.bar.add_task('compiling', total=self.last, completed=self.first)
      self.bar.start()
    return self

  def __exit__(self, *error):
    if self.live: self.bar.stop()

  def advance(self, step: int, numbers: dict | None):
    """Called after each step; `numbers` on logged ones."""
    if numbers:
      self.text = f'loss {numbers["loss"]:.4f}  {human(numbers["tokens_per_second"])} tokens/s'
      if 'mfu' in numbers: self.text += f'  MFU {numbers["mfu"]:.1%}'
    if self.live: self.bar.update(self.task, completed=step, description=self.text)
    elif numbers and (time.perf_counter() - self.printed > PLAIN_EVERY or step in (self.first + 1, self.last)):
      self.printed = time.perf_counter()
      timed = step - self.first - 1
      left = f'  {(self.printed - self.started) / timed * (self.last - step):.0f} s left' if timed else ''
      print(f'step {step}/{self.last}  {self.text}{left}', flush=True)
    if step == self.first + 1: self.started = time.perf_counter()   # that step was mostly compilation

  def note(self, step: int, result: dict):
    """A line above the bar: an evaluation."""
    self.console.print(f'step {step}: held-out [bold]{result["bits_per_byte"]:.4f} bits per byte[/], '
                       f'perplexity {result["perplexity"]:.2f} a token')


def stage(name: str, notes, lines):
  """What a stage has done: its notes, and every weight with its format, what multiplies it, and its bytes."""
  console = for_tables()
  console.print(f'[bold]stage {name}[/]')
  for note in notes: console.print(f'  {note}', soft_wrap=True)
  table = rich_table.Table(*(rich_table.Column(name, overflow='fold') for name in TABLE), box=None)
  for line in lines:
    table.add_row(line.path, line.kind, line.product, human(line.num_bytes, 'B'), f'{line.num_bytes / line.float_bytes:.3f}')
  console.print(table)


def finish(run, page):
  """What came of it: quality beside plain compressors, cost, a sample, and where to look further."""
  console, row = terminal(), run.row
  if row is not None:
    beside = ', '.join(f'{name} {bits:.3f}' for name, bits in row.quality.yardsticks.items())
    console.print(f'\n[bold]{row.quality.bits_per_byte:.4f} bits per byte[/] on held-out text (beside it: {beside})')
    console.print(ledger.table({run.workdir.name: row}))
    prompt, text = run.sample
    console.print('[bold]a sample, after the part in bold:[/]')
    console.print(rich_text.Text(prompt, style='bold') + rich_text.Text(text), soft_wrap=True)
  console.print(f'\n[bold]report[/]    {page}', soft_wrap=True)
  console.print(f'[bold]next[/]      python -m efficient_lm.generate --run={run.workdir}', soft_wrap=True)
