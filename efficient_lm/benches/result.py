"""A case to time, the turns in which it is timed, and the results: rows, tables, a file."""
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from efficient_lm.lazy import lazy
from efficient_lm.runs import ledger

np = lazy('numpy')
rich_box = lazy('rich.box')
rich_console = lazy('rich.console')
rich_table = lazy('rich.table')
rich_text = lazy('rich.text')

OURS = 'ours'
MISSING = 'baseline not installed (pip install efficient_lm[bench])'
# PyTorch's idle OpenMP threads spin for some 8 ms after a call (measured as processor time during a sleep) and slow down the
# next call. JAX's threads sleep at once. Therefore every call starts after a rest, in seconds.
REST = 0.05
BUSY = 0.3    # load of other programs, in cores, above which figures are unreliable
WIDTH = 110   # characters of a table in a file


class Disagreement(RuntimeError):
  """A baseline computes something else, so that a comparison of times would be meaningless."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """Functions that do the same work, OURS and the baselines by name; each returns when it is done.

  tokens, flops, bytes: those of one call; flops are analytic (see measure.Flops), bytes those of files read. agreement: how
  close the results are, in words.
  target: how many times as fast as the fastest baseline OURS should be.
  """
  candidates: dict[str, Callable[[], object]]
  flops: float = 0
  tokens: int | None = None
  bytes: int | None = None
  agreement: str = ''
  target: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """Seconds of every call of a case, by candidate: `seconds` of wall-clock time, and `processor` time of all threads."""
  name: str
  seconds: dict[str, list[float]]
  processor: dict[str, list[float]]
  flops: float = 0
  tokens: int | None = None
  bytes: int | None = None
  agreement: str = ''
  target: float | None = None

  @property
  def ours(self) -> float:
    """Median seconds of OURS."""
    return statistics.median(self.seconds[OURS])

  @property
  def baseline(self) -> str | None:
    """The fastest baseline by median; None if none was timed."""
    others = {name: statistics.median(times) for name, times in self.seconds.items() if name != OURS}
    return min(others, key=others.get) if others else None

  @property
  def ratio(self) -> float | None:
    """How many times as fast as the fastest baseline OURS is: the median over turns, because other programs may disturb
    single turns."""
    if self.baseline is None: return None
    turns = zip(self.seconds[OURS], self.seconds[self.baseline], strict=True)
    return statistics.median(theirs / ours for ours, theirs in turns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """The rows of one run of the command on one machine. peak_flops: FLOP/s of a large product of matrices. load: processor
  cores that other programs kept busy over the minute before."""
  hardware: str
  load: float
  versions: dict[str, str]
  date: str
  peak_flops: float
  quick: bool
  rows: list[Row]


def take_turns(case: Case, repeats: int, watch: Callable[[str], None] = lambda text: None):
  """Wall-clock and processor seconds of each candidate's calls. Candidates take turns, A B A B …, after one call each to
  warm up. watch: is told what runs."""
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
  """Times the case `repeats` times."""
  wall, processor = take_turns(case, repeats, watch)
  return Row(name=name, seconds=wall, processor=processor, flops=case.flops, tokens=case.tokens,
             bytes=case.bytes, agreement=case.agreement, target=case.target)


def difference(what: str, ours, theirs, tolerance: float) -> float:
  """The largest difference of two arrays of equal shape, relative to the largest number of the second.

  Raises Disagreement if it exceeds `tolerance`, or if a number is not finite."""
  ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
  apart = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
  if not apart <= tolerance:
    raise Disagreement(f'{what}: they differ by {apart:.1e} from the baseline; up to {tolerance} is rounding')
  return apart


def within(what: str, apart: float) -> str:
  """The difference of two results, in words."""
  return f'{what} within {apart:.0e}' if apart else f'{what} equal'


def write(report: Report, folder) -> Path:
  """Writes bench.json and bench.txt into `folder`, which is made if it is missing; returns the path of bench.json."""
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(dataclasses.asdict(report), indent=2)
  (folder / 'bench.json').write_text(text + '\n', encoding='utf-8')
  with open(folder / 'bench.txt', 'w', encoding='utf-8') as file:
    rich_console.Console(file=file, width=WIDTH).print(page(report))
  return folder / 'bench.json'


def read(path) -> Report:
  """The report that `write` wrote."""
  entry = json.loads(Path(path).read_text(encoding='utf-8'))
  return Report(**{**entry, 'rows': [Row(**row) for row in entry['rows']]})


def page(report: Report):
  """The page to print: a row of figures for each case; below, what each was compared with, and how far both agree."""
  figures = rich_table.Table(box=rich_box.SIMPLE_HEAD)
  figures.add_column('case', no_wrap=True)
  for heading in ('ours', 'least', 'baseline', 'times as fast', 'target', 'a second', 'of peak'):
    figures.add_column(heading, justify='right')
  for row in report.rows: figures.add_row(row.name, *_figures(row, report))
  words = rich_table.Table(box=rich_box.SIMPLE_HEAD)
  words.add_column('case', no_wrap=True)
  words.add_column('compared with')
  words.add_column('and found')
  for row in report.rows:
    words.add_row(row.name, rich_text.Text(row.baseline or MISSING), rich_text.Text(row.agreement or '–'))
  return rich_console.Group(figures, words, rich_text.Text(_caption(report)))


def _figures(row: Row, report: Report) -> list:
  if row.tokens: rate = f'{ledger.quantity(row.tokens / row.ours)} tokens'
  elif row.bytes: rate = ledger.quantity(row.bytes / row.ours, 'B')
  else: rate = ledger.quantity(row.flops / row.ours, 'FLOP')
  theirs = statistics.median(row.seconds[row.baseline]) if row.baseline else None
  target = None if report.quick else row.target   # targets are for full sizes
  reached = target is None or row.ratio is None or row.ratio >= target
  ratio = '–' if row.ratio is None else rich_text.Text(f'{row.ratio:.2f}', style='' if reached else 'red')
  return [ledger.duration(row.ours), ledger.duration(min(row.seconds[OURS])), ledger.duration(theirs), ratio,
          '–' if target is None else f'{target:g}{"" if reached else " missed"}', rate,
          f'{row.flops / row.ours / report.peak_flops:.0%}' if row.flops else '–']


def _caption(report: Report) -> str:
  small = 'SMALL SIZES (--quick): they show that everything runs, not how fast.\n' if report.quick else ''
  busy = f'BUSY MACHINE: other programs kept {report.load:.1f} cores busy.\n' if report.load > BUSY else ''
  versions = ', '.join(f'{name} {version}' for name, version in report.versions.items())
  peak = ledger.quantity(report.peak_flops, 'FLOP/s')
  return (f'{small}{busy}{report.hardware}; large matrix products reach {peak}. '
          f'{report.date}. {versions}.\nours, baseline: medians; times as fast: median over turns, against '
          f'the fastest baseline; of peak: analytic FLOPs against that matrix product.')
