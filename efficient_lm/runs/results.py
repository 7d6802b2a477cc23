"""What folders hold of runs: configs, metrics, rows, samples, tables of weights. Reads files only, and loads nothing
heavy."""
import dataclasses
import json
from pathlib import Path

import numpy as np

from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.interop.folder import holds_model
from efficient_lm.runs import ledger, record, tracking


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
    found = [(row['step'], row[name]) for row in self.metrics if isinstance(row.get(name), (int, float))]
    steps, values = zip(*found) if found else ((), ())
    values = np.asarray(values, float)
    return np.asarray(steps), np.where(np.abs(values) > np.finfo(np.float32).max, np.copysign(np.inf, values), values)

  @property
  def baselines(self) -> dict[str, float]:
    """Bits per byte of compressors on the text that the run is measured on."""
    return next((row.quality.baselines for row in self.rows if row.quality.baselines), {})

  @property
  def load_LE(self):
    """The expert load last logged, or None."""
    return next((row['load'] for row in reversed(self.metrics) if row.get('load')), None)


def load(folder) -> Result:
  """Raises ConfigError when `folder` is not a run's, or its files are not what a run writes."""
  folder = Path(folder)
  if not any((folder / name).is_file() for name in ('config.json', 'metrics.jsonl', 'ledger.json')):
    raise ConfigError('run', str(folder), 'holds no config.json, metrics.jsonl or ledger.json; name the workdir of a run')
  if holds_model(str(folder)): raise ConfigError('run', str(folder), 'is a Hugging Face folder: it has no rows to report')
  config = folder / 'config.json'
  samples = sorted((folder / 'samples').glob('*.txt'), key=lambda path: (path.stat().st_mtime_ns, path.name))
  try:
    return Result(folder.resolve().name, json.loads(config.read_text(encoding='utf-8')) if config.is_file() else {},
                  tracking.read(folder / 'metrics.jsonl'), ledger.read(folder / 'ledger.json'),
                  samples[-1].read_text(encoding='utf-8', errors='replace') if samples else '', _weights(folder))
  except (ValueError, CheckpointError) as error: raise ConfigError('run', str(folder), f'cannot be read: {error}') from error


def _weights(folder: Path) -> dict[str, list[dict]]:
  """Of each stage that has been committed; runs of earlier versions have files of them."""
  known = record.read(folder)
  if known is None:
    return {path.parent.name.replace('_', ' '): json.loads(path.read_text(encoding='utf-8'))
            for path in sorted((folder / 'stages').glob('*/weights.json'))}
  left = {planned.name: record.committed(folder, planned) for planned in known.plan}
  return {name: commit['weights'] for name, commit in left.items() if commit}


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
