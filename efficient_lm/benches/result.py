"""A case to time, the turns in which it is timed, and what came of it: rows, a table, a file."""
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from efficient_lm.lazy import lazy

ledger = lazy('efficient_lm.ledger')
rich_box = lazy('rich.box')
rich_console = lazy('rich.console')
rich_table = lazy('rich.table')
rich_text = lazy('rich.text')

OURS = 'ours'
MISSING = 'baseline not installed (pip install efficient_lm[bench])'
# PyTorch's idle OpenMP threads spin for some 8 ms after a call (processor time read while the process slept), which
# would be charged to whoever runs next. JAX's threads sleep at once. So everyone starts after a rest.
REST = 0.05
WIDTH = 118   # characters of a table in a file


class Disagreement(RuntimeError):
  """Ours and a baseline compute different things, so that comparing their times would say nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """Calls that do the same work: `candidates` holds OURS and each baseline by name; a call returns when it is done.

  tokens, flops: of one call; flops are analytic (see measure.Flops). agreement: how close the results are, in words.
  target: how many times as fast as the fastest baseline ours is meant to be.
  """
  candidates: dict[str, Callable[[], object]]
  flops: float
  tokens: int | None = None
  agreement: str = ''
  target: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """Seconds of every call of a case, by candidate and in turns; wall clock, and processor time over all threads."""
  name: str
  seconds: dict[str, list[float]]
  processor: dict[str, list[float]]
  flops: float
  tokens: int | None = None
  agreement: str = ''
  target: float | None = None

  @property
  def ours(self) -> float:
    """Median seconds."""
    return statistics.median(self.seconds[OURS])

  @property
  def baseline(self) -> str | None:
    """The fastest baseline by median; None where none was timed."""
    others = {name: statistics.median(times) for name, times in self.seconds.items() if name != OURS}
    return min(others, key=others.get) if others else None

  @property
  def ratio(self) -> float | None:
    """How many times as fast as the baseline: the median over turns, so that a turn on a busy machine counts little."""
    if self.baseline is None: return None
    return statistics.median(b / a for a, b in zip(self.seconds[OURS], self.seconds[self.baseline], strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """Rows of one run of the command on one machine. peak_flops: FLOP/s that a large matrix product reached there."""
  hardware: str
  versions: dict[str, str]
  date: str
  peak_flops: float
  quick: bool
  rows: list[Row]


def take_turns(case: Case, repeats: int, watch: Callable[[str], None] = lambda text: None):
  """Wall and processor seconds of each candidate's calls, A B A B …, after one call each to warm up."""
  wall, processor = ({name: [] for name in case.candidates} for _ in range(2))
  for turn in range(repeats + 1):
    for name, call in case.candidates.items():
      watch(f'turn {turn} of {repeats}, {name}' if turn else f'warming up, {name}')
      time.sleep(REST)
      start, used = time.perf_counter(), time.process_time()
      call()
      if turn:
        processor[name].append(time.process_time() - used)
        wall[name].append(time.perf_counter() - start)
  return wall, processor


def measured(name: str, case: Case, repeats: int, watch: Callable[[str], None] = lambda text: None) -> Row:
  """The case timed `repeats` times."""
  wall, processor = take_turns(case, repeats, watch)
  return Row(name=name, seconds=wall, processor=processor, flops=case.flops, tokens=case.tokens,
             agreement=case.agreement, target=case.target)


def same(what: str, ours, theirs, tolerance: float) -> str:
  """The largest difference of two lists of numbers, relative to the largest number, in words.

  Raises Disagreement above `tolerance`, and where either is not finite."""
  difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / max(map(abs, theirs))
  if not difference <= tolerance:
    raise Disagreement(f'{what}: ours {ours}, baseline {theirs}, {difference:.1e} apart; at most {tolerance} is rounding')
  return f'{what} within {difference:.0e}'


def write(report: Report, folder) -> Path:
  """Writes bench.json and bench.txt into `folder`, which is made if it is missing; returns the former's path."""
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'bench.json').write_text(json.dumps(dataclasses.asdict(report), indent=2) + '\n', encoding='utf-8')
  with open(folder / 'bench.txt', 'w', encoding='utf-8') as file:
    rich_console.Console(file=file, width=WIDTH).print(table(report))
  return folder / 'bench.json'


def read(path) -> Report:
  """The report that `write` wrote."""
  entry = json.loads(Path(path).read_text(encoding='utf-8'))
  return Report(**{**entry, 'rows': [Row(**row) for row in entry['rows']]})


def table(report: Report):
  """A rich table: a case a row, its baseline and how far both agree below its name."""
  grid = rich_table.Table(box=rich_box.SIMPLE_HEAD, caption=_caption(report), caption_justify='left')
  grid.add_column('case')
  for heading in ('ours', 'least', 'baseline', 'times as fast', 'rate', 'of peak'): grid.add_column(heading, justify='right')
  for row in report.rows: grid.add_row(*_cells(row, report))
  return grid


def _cells(row: Row, report: Report) -> list:
  below = '\n'.join(filter(None, [row.baseline or MISSING, row.agreement]))
  rate = row.tokens / row.ours if row.tokens else row.flops / row.ours
  theirs = statistics.median(row.seconds[row.baseline]) if row.baseline else None
  return [rich_text.Text.assemble((row.name, 'bold'), '\n', (below, 'dim')),
          ledger.duration(row.ours), ledger.duration(min(row.seconds[OURS])), ledger.duration(theirs),
          _verdict(row, report.quick), ledger.quantity(rate, 'tokens/s' if row.tokens else 'FLOP/s'),
          f'{row.flops / row.ours / report.peak_flops:.0%}']


def _verdict(row: Row, quick: bool):
  """The ratio, and whether it reaches the target; small sizes have no target."""
  if row.ratio is None: return '–'
  if row.target is None or quick: return f'{row.ratio:.2f}'
  reached = row.ratio >= row.target
  return rich_text.Text.assemble((f'{row.ratio:.2f}', 'green' if reached else 'red'),
                                 f'\ntarget {row.target:g}{" reached" if reached else " MISSED"}')


def _caption(report: Report) -> str:
  small = 'SMALL SIZES (--quick): they show that everything runs, not how fast.\n' if report.quick else ''
  versions = ', '.join(f'{name} {version}' for name, version in report.versions.items())
  return (f'{small}{report.hardware}. Matrix product at its best: {ledger.quantity(report.peak_flops, "FLOP/s")}. '
          f'{versions}. {report.date}.\nours, baseline: medians; times as fast: median over turns, against the fastest '
          f'baseline; of peak: analytic FLOPs against that matrix product.')
