"""The results of timing operations: rows, tables and files."""
import dataclasses
import json
import statistics
from pathlib import Path

from efficient_lm.benches.ceilings import Ceilings
from efficient_lm.benches.result import BUSY
from efficient_lm.lazy import lazy
from efficient_lm.runs import ledger

rich_box = lazy('rich.box')
rich_console = lazy('rich.console')
rich_table = lazy('rich.table')
rich_text = lazy('rich.text')

WIDTH = 120   # characters of a line in a file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """The work of a case; see `ops`. checked: the implementation with whose result the others are compared."""
  flops: float
  bytes: float
  precision: str
  tolerance: float
  checked: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
  """Seconds of one call in each round, and the error of the result, None where it cannot be compared. ours: whether it is an
  implementation of the operation, not a baseline. auto: whether it is the one that 'auto' chooses."""
  name: str
  seconds: list[float]
  error: float | None
  ours: bool
  auto: bool = False

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """The results of a case. notes: by name, why an implementation or a baseline was not timed. work: None if the case itself
  failed."""
  op: str
  case: str
  work: Work | None
  timings: list[Timing]
  notes: dict[str, str] = dataclasses.field(default_factory=dict)

  @classmethod
  def failed(cls, op: str, case: str, why: str) -> 'Row':
    """The row of a case of which nothing could be timed."""
    return cls(op=op, case=case, work=None, timings=[], notes={'all': f'FAILED: {why}'})

  def median(self, name: str) -> float | None:
    """Median seconds of the implementation or baseline of that name, None if it was not timed."""
    return next((timing.median for timing in self.timings if timing.name == name), None)

  @property
  def baseline(self) -> Timing | None:
    """The fastest baseline."""
    return min((timing for timing in self.timings if not timing.ours), key=lambda timing: timing.median, default=None)

  @property
  def wrong(self) -> list[str]:
    """Implementations that failed, or whose errors exceed the tolerance of the case, one line each."""
    failed = [f'{self.op}, {self.case}, {name}: {note}' for name, note in self.notes.items() if note.startswith('FAILED')]
    return failed + [f'{self.op}, {self.case}, {one.name}: error {one.error:.1e}, rounding is {self.work.tolerance:.1e}'
                     for one in self.timings if one.ours and not one.error <= self.work.tolerance]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """The results of one run of `bench --ops`. elsewhere: a line for each kernel for other devices. left_out: cases for which
  there was no time."""
  hardware: str
  load: float
  versions: dict[str, str]
  date: str
  ceilings: Ceilings
  rows: list[Row]
  elsewhere: list[str] = dataclasses.field(default_factory=list)
  left_out: list[str] = dataclasses.field(default_factory=list)

  @property
  def wrong(self) -> list[str]:
    return [line for row in self.rows for line in row.wrong]


def write(report: Report, folder) -> Path:
  """Writes ops.json and ops.txt into `folder`, which is made if it is missing; returns the path of ops.json."""
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'ops.json').write_text(json.dumps(dataclasses.asdict(report), indent=2) + '\n', encoding='utf-8')
  with open(folder / 'ops.txt', 'w', encoding='utf-8') as file:
    rich_console.Console(file=file, width=WIDTH).print(page(report))
  return folder / 'ops.json'


def read(path) -> Report:
  """The report that `write` wrote."""
  entry = json.loads(Path(path).read_text(encoding='utf-8'))
  rows = [Row(**{**row, 'work': row['work'] and Work(**row['work']),
                 'timings': [Timing(**timing) for timing in row['timings']]}) for row in entry['rows']]
  return Report(**{**entry, 'ceilings': Ceilings(**entry['ceilings']), 'rows': rows})


def page(report: Report):
  """The page to print: a table for each operation, with a line for each way to compute a case; below, what was not timed,
  and the hardware and versions."""
  names = list(dict.fromkeys(row.op for row in report.rows))
  tables = [_table(name, [row for row in report.rows if row.op == name], report.ceilings) for name in names]
  notes = [f'{row.op}, {row.case}, {name}: {note}' for row in report.rows for name, note in row.notes.items()]
  lines = [*notes, *report.elsewhere, *(f'left out: {line}' for line in report.left_out),
           *(f'WRONG: {line}' for line in report.wrong), _caption(report)]
  return rich_console.Group(*tables, rich_text.Text('\n'.join(lines)))


def _table(name: str, rows: list[Row], ceilings: Ceilings):
  table = rich_table.Table(box=rich_box.SIMPLE_HEAD, title=name, title_justify='left')
  table.add_column('case, and by what', min_width=26, overflow='fold')
  for heading in ('median', 'TFLOP/s', 'GB/s', 'of roofline', 'x xla', 'x library', 'error'):
    table.add_column(heading, justify='right', no_wrap=True)
  for row in rows:
    if row.timings: table.add_row(rich_text.Text(row.case, style='bold'))
    for timing in row.timings: table.add_row(*_figures(row, timing, ceilings))
  return table


def _figures(row: Row, timing: Timing, ceilings: Ceilings) -> list:
  seconds, work, best = timing.median, row.work, row.baseline
  label = rich_text.Text(f'  {timing.name}{" (auto)" if timing.auto else ""}', style='' if timing.ours else 'dim')
  bad = timing.ours and not timing.error <= work.tolerance
  error = rich_text.Text('–' if timing.error is None else f'{timing.error:.0e}', style='red' if bad else '')
  times = lambda other: '–' if other is None else f'{other / seconds:.2f}'
  return [label, ledger.duration(seconds), f'{work.flops / seconds / 1e12:.3g}', f'{work.bytes / seconds / 1e9:.3g}',
          f'{ceilings.seconds(work.flops, work.bytes, work.precision) / seconds:.0%}', times(row.median('xla')),
          times(best and best.median) if timing.ours else '–', error]


def _caption(report: Report) -> str:
  busy = f'BUSY MACHINE: other programs kept {report.load:.1f} cores busy.\n' if report.load > BUSY else ''
  rates = ', '.join(f'{name} {ledger.quantity(rate, "FLOP/s")}' for name, rate in report.ceilings.flops.items())
  versions = ', '.join(f'{name} {version}' for name, version in report.versions.items())
  approximate = sorted({f'{row.op}, {row.case}' for row in report.rows if row.work and row.work.checked != 'reference'})
  checked = f'Errors against the XLA path, for want of memory: {"; ".join(approximate)}.\n' * bool(approximate)
  return (f'{checked}{busy}{report.hardware}; XLA\'s large matrix products reach {rates}, memory '
          f'{ledger.quantity(report.ceilings.bandwidth, "B/s")}. {report.date}. {versions}.\n'
          'median: of one call; of roofline: the least time that those rates allow against the median; x xla, x library: '
          'times as fast as the XLA path and as the fastest baseline; error: the largest difference from the float32 '
          'reference, relative to its largest number.')
