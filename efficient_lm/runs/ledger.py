"""The ledger: one row a stage of a run, quality beside what it costs. Efficiency claims are read off it, with hardware.

Every stage commits its row with its model; `ledger.json` is all of them, written anew when one is added. None stands for
what was not measured; a table shows it as a dash, never as a number.
"""
import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import platform
import types
import typing
from pathlib import Path

from efficient_lm.errors import CheckpointError
from efficient_lm.runs import record, writing
from efficient_lm.system import sealed
from efficient_lm.system import workdir as workdirs

log = logging.getLogger(__name__)
LEDGER, ASIDE = 'ledger.json', 'ledger.json.damaged'

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
  """On held-out text: bits per byte of text, perplexity per token, and the bits per byte of `baselines`, compressors without
  a neural network, on that text."""
  bits_per_byte: float | None = None
  perplexity: float | None = None
  baselines: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """Of the row's own model: numbers of parameters, of those that are not zero, and of those that a token meets; bits that a
  parameter takes, scales and masks included; bytes of its files and of its arrays; forward FLOPs a token (see measure.Flops:
  zeros are multiplied as all other numbers, but for blocks that are not stored)."""
  parameters: int | None = None
  nonzero_parameters: int | None = None
  active_parameters: int | None = None
  bits_per_parameter: float | None = None
  bytes_on_disk: int | None = None
  bytes_in_memory: int | None = None
  flops_per_token: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
  """Training tokens a second; seconds from one generated token to the next; the most bytes in use during the stage, and of
  what memory."""
  tokens_per_second: float | None = None
  latency_seconds: float | None = None
  peak_memory_bytes: int | None = None
  memory_source: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
  """What the stage took since its last start (a resumed run counts from where it resumed): steps, tokens, seconds; joules
  a token, and the counter that they were read from."""
  steps: int | None = None
  tokens: int | None = None
  wall_seconds: float | None = None
  joules_per_token: float | None = None
  energy_source: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
  """What the figures depend on beside the configuration."""
  hardware: str | None = None
  versions: dict[str, str] = dataclasses.field(default_factory=dict)
  corpus_hash: str | None = None
  seed: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """What a stage left behind ('train', 'prune' …); `notes` are its invariants in words ('masks exact', '2:4')."""
  stage: str
  quality: Quality = Quality()
  size: Size = Size()
  speed: Speed = Speed()
  effort: Effort = Effort()
  origin: Origin = Origin()
  notes: tuple[str, ...] = ()


LARGEST = 1e300   # of any figure
RENAMED = {'yardsticks': 'baselines'}   # fields of earlier versions
GROUPS = {'quality': Quality, 'size': Size, 'speed': Speed, 'effort': Effort, 'origin': Origin}


def write(workdir, rows: list[Row]):
  """ledger.json of a run, each row with a checksum; all or nothing reaches the disk. One that was damaged is kept aside.
  Raises WriteError."""
  rows = [as_json(row) for row in rows]
  text = json.dumps([row | {'crc32': record.crc32(row)} for row in rows], indent=2, allow_nan=False)
  with writing.needed(Path(workdir) / LEDGER):
    _set_aside(workdir)
    workdirs.write(workdir, LEDGER, text + '\n')


def _set_aside(workdir):
  path = Path(workdir) / LEDGER
  try: damaged = path.is_file() and _scan(path)[1]
  except ValueError: damaged = True
  if not damaged: return
  log.warning('%s is damaged: made again of what the stages have left; it is kept as %s', path, ASIDE)
  workdirs.write(workdir, ASIDE, path.read_bytes())


def as_json(row: Row) -> dict:
  """A row as JSON has it: a number that is not finite, which JSON cannot hold, is null, and a note says what it was."""
  bad = []

  def plain(value, path: str):
    if isinstance(value, dict): return {name: plain(one, f'{path}.{name}' if path else name) for name, one in value.items()}
    if isinstance(value, (list, tuple)): return [plain(one, path) for one in value]
    if not isinstance(value, float) or math.isfinite(value): return value
    bad.append(f'{path} is not finite: {value}')
    return None
  data = plain(dataclasses.asdict(row), '')
  return data | {'notes': [*data['notes'], *bad]}


def read(path) -> list[Row]:
  """Rows of a ledger.json; none if it is missing. Fields of another version of this file are left out, missing ones None; so
  are, with a warning, rows that are not what was written.

  Raises ValueError that names the file when it is no ledger.
  """
  if not Path(path).is_file(): return []
  rows, damaged = _scan(path)
  if damaged and not rows: raise ValueError(f'{path} is no ledger: it has no row that is whole')
  if damaged: log.warning('%s has %d damaged rows, which are left out', path, damaged)
  return rows


def committed(workdir, plan) -> list[Row]:
  """Rows of the stages that have left something, up to the first that has not, by what they have left."""
  rows = []
  for planned in plan:
    left = record.committed(workdir, planned)
    if left is None: break
    try: row = row_of(left['row'])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise CheckpointError(f'{record.stage_folder(workdir, planned)} has no row of a ledger: {error}') from error
    size = dataclasses.replace(row.size, bytes_on_disk=record.bytes_on_disk(workdir, planned))
    rows.append(dataclasses.replace(row, size=size))
  return rows


def of_run(workdir, known: record.Record | None) -> list[Row]:
  """Rows of ledger.json, or, where it is missing or damaged, of what the stages of the run have left. Raises ValueError."""
  path = Path(workdir) / LEDGER
  try:
    rows, damaged = _scan(path) if path.is_file() else ([], 1)
    if not damaged: return rows
  except ValueError: pass
  rows = committed(workdir, known.plan) if known else []
  if not rows: return read(path)
  log.warning('%s is missing or damaged: shown are the rows that the stages have left', path)
  return rows


def _scan(path) -> tuple[list[Row], int]:
  """The rows that are whole, and the number of others. Raises ValueError for what is no list."""
  try: entries = sealed.load(path, strict=False)
  except CheckpointError as error: raise ValueError(f'{path} is no ledger: {error}') from error
  if not isinstance(entries, list): raise ValueError(f'{path} is no ledger: it holds no list of rows')
  rows, summed = [], any(isinstance(entry, dict) and 'crc32' in entry for entry in entries)
  for entry in entries:
    try:
      if summed and entry.pop('crc32') != record.crc32(entry): continue   # earlier versions wrote none
      rows.append(row_of(entry))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError): continue
  return rows, len(entries) - len(rows)


def row_of(entry: dict) -> Row:
  """The inverse of `as_json`; fields of another version are left out, missing ones None. Raises ValueError, TypeError,
  KeyError or AttributeError for what is no row."""
  groups = {name: _known(kind, entry.get(name, {})) for name, kind in GROUPS.items()}
  return _typed(Row(stage=entry['stage'], notes=tuple(entry.get('notes', ())), **groups))


def _known(kind, entry: dict):
  entry = {RENAMED.get(name, name): value for name, value in entry.items()}
  return _typed(kind(**{field.name: entry[field.name] for field in dataclasses.fields(kind) if field.name in entry}))


def _typed(value):
  hints = typing.get_type_hints(type(value))
  for field in dataclasses.fields(value):
    if not _fits(getattr(value, field.name), hints[field.name]): raise ValueError(f'{field.name} is no {hints[field.name]}')
  return value


def _fits(value, hint) -> bool:
  """Whether a value is of a type, and not so large that it could not be shown."""
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union): return any(_fits(value, one) for one in arguments)
  if origin is dict: return isinstance(value, dict) and all(_fits(one, arguments[1] | None) for one in value.values())
  if origin is tuple: return isinstance(value, tuple) and all(_fits(one, arguments[0]) for one in value)
  if hint not in (int, float): return isinstance(value, hint)
  return isinstance(value, (int, float)) and not isinstance(value, bool) and not abs(value) > LARGEST


def hardware() -> str:
  """The devices in use, with the processor's name where they are its cores: '8 x NVIDIA H100 80GB HBM3'."""
  import jax
  devices = jax.devices()
  if devices[0].platform != 'cpu': return f'{len(devices)} x {devices[0].device_kind}'
  cpuinfo = Path('/proc/cpuinfo')
  lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
  names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
  shown = f', shown as {len(devices)} devices' if len(devices) > 1 else ''
  return f'{names[0] if names else platform.machine()}, {os.cpu_count()} threads{shown}'


def versions() -> dict[str, str]:
  """Python and the packages that figures depend on."""
  return {'python': platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def quantity(value: float | None, unit: str = '', base: int = 1000) -> str:
  """Three digits and a prefix: 12345678 -> '12.3 M'; base 1024 for bytes: '11.8 MiB'; '–' for None."""
  if value is None: return '–'
  power = 0
  while abs(value) >= (999.5 if base == 1000 else 1023.5) and power < 5: value, power = value / base, power + 1
  prefix = ('', 'k', 'M', 'G', 'T', 'P')[power] if base == 1000 else ('', 'Ki', 'Mi', 'Gi', 'Ti', 'Pi')[power]
  number = f'{value:.3g}' if abs(value) < 999.5 else f'{value:.0f}'
  return f'{number} {prefix}{unit}'.strip()


def duration(seconds: float | None) -> str:
  """'250 us', '3.2 ms', '41 s', '12 min 5 s', '3 h 20 min'; '–' for None."""
  if seconds is None: return '–'
  if seconds < 1e-3: return f'{seconds * 1e6:.3g} us'
  if seconds < 1: return f'{seconds * 1e3:.3g} ms'
  if seconds < 60: return f'{seconds:.3g} s'
  if seconds < 3600: return f'{int(seconds // 60)} min {int(seconds % 60)} s'
  return f'{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min'


def number(value: float | None, digits: int = 3) -> str:
  """'1.234', or '–' for None."""
  return '–' if value is None else f'{value:.{digits}f}'


def _unless_all(row: Row, count: int | None) -> str:
  """A number of parameters where it is not that of all."""
  return quantity(None if count == row.size.parameters else count)


# Heading -> text of a row; the order of a table's columns.
COLUMNS = {
  'bits/byte': lambda row: number(row.quality.bits_per_byte),
  'perplexity': lambda row: number(row.quality.perplexity, 2),
  'parameters': lambda row: quantity(row.size.parameters),
  'not zero': lambda row: _unless_all(row, row.size.nonzero_parameters),
  'active': lambda row: quantity(row.size.active_parameters),
  'bits each': lambda row: number(row.size.bits_per_parameter, 2),
  'on disk': lambda row: quantity(row.size.bytes_on_disk, 'B', 1024),
  'in memory': lambda row: quantity(row.size.bytes_in_memory, 'B', 1024),
  'FLOPs/token': lambda row: quantity(row.size.flops_per_token),
  'tokens/s': lambda row: quantity(row.speed.tokens_per_second),
  'latency': lambda row: duration(row.speed.latency_seconds),
  'peak memory': lambda row: quantity(row.speed.peak_memory_bytes, 'B', 1024),
  'J/token': lambda row: '–' if row.effort.joules_per_token is None else f'{row.effort.joules_per_token:.3g}',
  'time': lambda row: duration(row.effort.wall_seconds),
}


def cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
  """Headings and a list of texts a row; columns that no row has a figure for are left out."""
  columns = {name: [text(row) for row in rows] for name, text in COLUMNS.items()}
  columns = {name: texts for name, texts in columns.items() if set(texts) != {'–'}}
  return list(columns), [list(texts) for texts in zip(*columns.values())] if columns else [[] for _ in rows]


def table(rows: dict[str, Row]):
  """To print with rich: a column a row of the ledger (a terminal holds several of those, not a dozen figures side by
  side), and below it what all rows share.

  rows: by label ('moe / train').
  """
  import rich.box
  import rich.console
  import rich.table
  from rich.text import Text
  headings, texts = cells(list(rows.values()))
  grid, shared = rich.table.Table(box=rich.box.SIMPLE_HEAD), []
  grid.add_column('')
  for label in rows: grid.add_column(Text(label), justify='right', overflow='fold')
  for heading, *line in zip(headings, *texts): grid.add_row(heading, *line)
  for heading, of in (('hardware', lambda row: row.origin.hardware), ('energy', lambda row: row.effort.energy_source)):
    line = [of(row) or '–' for row in rows.values()]
    if set(line) == {'–'}: continue
    if len(set(line)) == 1: shared.append(Text(f'  {heading}: {line[0]}'))
    else: grid.add_row(heading, *map(Text, line))
  return rich.console.Group(grid, *shared)
