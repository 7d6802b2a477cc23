"""What folders hold of runs: configs, metrics, rows, samples, tables of weights. Reads files only, and loads nothing
heavy."""
import dataclasses
import itertools
import logging
from pathlib import Path

import numpy as np

from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.interop.folder import holds_model
from efficient_lm.runs import ledger, record, tracking
from efficient_lm.system import sealed

log = logging.getLogger(__name__)
LONGEST = 1 << 20   # bytes of a sample


@dataclasses.dataclass(frozen=True)
class Result:
  """What a folder holds of a run; `name` is the folder's. `weights`: of each stage, lines of `rewriting.table`."""
  name: str
  config: dict
  metrics: list[dict]
  rows: list[ledger.Row]
  sample: str
  weights: dict[str, list[dict]] = dataclasses.field(default_factory=dict)

  def curve(self, name: str):
    """Steps and values of the rows that have `name`; those beyond float32, which nothing here computes with and no plot can
    show, as infinities."""
    return _curve(self._logged(name), name)

  def curves(self, name: str) -> list[tuple]:
    """The same apart by stages, between which the model, and the loss that it is trained by, may have changed."""
    return [_curve(list(rows), name) for _, rows in itertools.groupby(self._logged(name), lambda row: row.get('stage'))]

  def _logged(self, name: str) -> list[dict]: return [row for row in self.metrics if isinstance(row.get(name), (int, float))]

  @property
  def baselines(self) -> dict[str, float]:
    """Bits per byte of compressors on the text that the run is measured on."""
    return next((row.quality.baselines for row in self.rows if row.quality.baselines), {})

  @property
  def load_LE(self):
    """The expert load last logged, layers x experts, or None."""
    last = next((row['load'] for row in reversed(self.metrics) if row.get('load')), None)
    try: return None if last is None or np.asarray(last, float).ndim != 2 else last
    except (ValueError, TypeError, OverflowError): return None


def _curve(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
  steps, values = np.asarray([row['step'] for row in rows]), np.asarray([row[name] for row in rows], float)
  return steps, np.where(np.abs(values) > np.finfo(np.float32).max, np.copysign(np.inf, values), values)


def load(folder) -> Result:
  """Raises ConfigError when `folder` is not a run's, or its files are not what a run writes."""
  folder = Path(folder)
  if not any((folder / name).is_file() for name in ('config.json', 'metrics.jsonl', 'ledger.json')):
    raise ConfigError('run', str(folder), 'holds no config.json, metrics.jsonl or ledger.json; name the workdir of a run')
  if holds_model(str(folder)): raise ConfigError('run', str(folder), 'is a Hugging Face folder: it has no rows to report')
  config = folder / 'config.json'
  try:
    known = record.read(folder)
    left = {planned.name: record.committed(folder, planned) for planned in known.plan} if known else {}
    left = {name: commit for name, commit in left.items() if commit}
    found = Result(folder.resolve().name, sealed.read(config) if config.is_file() else {},
                   tracking.read(folder / 'metrics.jsonl'), ledger.of_run(folder, known), _sample(folder, known, left),
                   _weights(folder, known, left))
  except (ValueError, OSError, CheckpointError) as error:
    raise ConfigError('run', str(folder), f'cannot be read: {error}') from error
  _tell_of_what_is_missing(found, left, folder)
  return found


def _tell_of_what_is_missing(found: Result, left: dict[str, dict], folder: Path):
  """Warns of what a run writes before it commits a stage, and is not there although stages have been committed."""
  if left and not found.config: log.warning('%s is missing', folder / 'config.json')
  ended = {row.get('stage') for row in found.metrics if row.get(tracking.END)}
  missing = [name for name in left if int(name.partition(' ')[0]) not in ended]
  if missing: log.warning('%s lacks rows: what was measured after stage %s, at least', folder / 'metrics.jsonl', missing[0])


def _sample(folder: Path, known, left: dict[str, dict]) -> str:
  """What the last stage of a run has left; of one that has not come so far, or is of an earlier version, the newest file."""
  last = left.get(known.plan[-1].name, {}).get('sample') if known else None
  if isinstance(last, str): return last
  samples = [path for path in (folder / 'samples').glob('*.txt') if path.is_file()]
  if not samples: return ''
  with max(samples, key=lambda path: (path.stat().st_mtime_ns, path.name)).open('rb') as file: text = file.read(LONGEST)
  return text.decode('utf-8', 'replace')


def _weights(folder: Path, known, left: dict[str, dict]) -> dict[str, list[dict]]:
  """Of each stage that has been committed; runs of earlier versions have files of them. Raises ValueError,
  CheckpointError."""
  if known is None: tables = {path.parent.name.replace('_', ' '): (path, sealed.load(path))
                              for path in sorted((folder / 'stages').glob('*/weights.json'))}
  else: tables = {planned.name: (record.stage_folder(folder, planned), left[planned.name].get('weights'))
                  for planned in known.plan if planned.name in left}
  for path, lines in tables.values():
    if not _is_table(lines): raise ValueError(f'{path} has no table of weights')
  return {name: lines for name, (_, lines) in tables.items()}


def _is_table(lines) -> bool:
  kinds = {'path': str, 'kind': str, 'product': str, 'num_bytes': int, 'float_bytes': int}
  return isinstance(lines, list) and all(
    isinstance(line, dict) and all(type(line.get(name)) is kind for name, kind in kinds.items()) and line['float_bytes'] > 0
    for line in lines)


def load_all(folders) -> list[Result]:
  """Of several runs, whose names tell them apart: by as much of their paths as that takes."""
  found, paths = [load(folder) for folder in folders], [Path(folder).resolve() for folder in folders]
  for i, path in enumerate(paths):
    others = [other for other in paths if other != path]
    alone = lambda n: all(other.parts[-n:] != path.parts[-n:] for other in others)
    depth = next((n for n in range(1, len(path.parts) + 1) if alone(n)), 1)
    found[i] = dataclasses.replace(found[i], name='/'.join(path.parts[-depth:]))
  return found


def labelled(results: list[Result]) -> dict[str, ledger.Row]:
  """All rows by a label that tells them apart: the stage, or the run, or both."""
  if len(results) == 1: return {row.stage: row for row in results[0].rows}
  return {result.name if len(result.rows) == 1 else f'{result.name} / {row.stage}': row
          for result in results for row in result.rows}
