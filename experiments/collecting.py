"""What the experiments collect alike: the finished runs of a folder, what these have in common, and a file of results."""
import dataclasses
import datetime
import json
import re
import sys
from pathlib import Path

from efficient_lm.errors import ConfigError
from efficient_lm.runs import record, results


def finished(folder) -> list[results.Result]:
  """Every run below `folder`, by name. Raises ConfigError for one that has not come to its last stage, as its last row is
  not of the model that it is to make."""
  workdirs = sorted(path.parent for path in Path(folder).glob('*/run.json'))
  if not workdirs: raise ConfigError('folder', str(folder), 'holds no runs')
  for workdir in workdirs:
    for planned in record.read(workdir).plan:
      if record.committed(workdir, planned) is None:
        raise ConfigError('run', str(workdir), f'has not come to its stage {planned.name}: run it again')
  return results.load_all(workdirs)


def in_common(runs: list[results.Result]) -> dict:
  """Hardware, versions and text of all rows, and the date. Raises ConfigError where rows differ in these: figures of
  several machines do not make one table."""
  origins = [(run.name, dataclasses.asdict(row.origin) | {'seed': None}) for run in runs for row in run.rows]
  first, shared = origins[0]
  for name, origin in origins:
    if origin != shared: raise ConfigError('run', name, f'has another machine, versions or text than {first}')
  return {'date': today(), 'hardware': shared['hardware'], 'versions': shared['versions'],
          'corpus': shared['corpus_hash'], 'baselines': runs[0].baselines}


def today() -> str:
  """2026-11-28."""
  return datetime.date.today().isoformat()


def write(found: dict, folder):
  """results.json in `folder`."""
  (Path(folder) / 'results.json').write_text(json.dumps(found, indent=1, allow_nan=False) + '\n', encoding='utf-8')


def read(folder) -> dict | None:
  """results.json of `folder`; None where there is none."""
  file = Path(folder) / 'results.json'
  return json.loads(file.read_text(encoding='utf-8')) if file.is_file() else None


def row_by_row(folder, head: dict, variants: dict, names: list[str], measured, table) -> dict:
  """The results of `folder` with `measured(name)` for each of `names`, by default for each of `variants` that has no row
  yet. Every row is written as soon as it is known, with the README's table of them, `table(results)`; the others stay. Ends
  the program where something in `head`, what all rows depend on, has changed since they were measured."""
  import jax
  found = read(folder) or head | {'rows': {}}
  for key in head:
    if key != 'date' and found[key] != head[key]:
      sys.exit(f'{folder}/results.json: has another {key}; delete it to measure all rows anew')
  for name in names or [name for name in variants if name not in found['rows']]:
    rows = found['rows'] | {name: measured(name)}
    found |= {'date': today(), 'rows': {name: rows[name] for name in variants if name in rows}}
    write(found, folder)
    write_table(table(found), folder)
    jax.clear_caches()
  return found


def write_table(table: str, folder):
  """In place of the first table of the README in `folder`."""
  readme = Path(folder) / 'README.md'
  text = re.sub(r'(^\|.*\n)+', lambda _: table + '\n', readme.read_text(encoding='utf-8'), count=1, flags=re.M)
  readme.write_text(text, encoding='utf-8')


def markdown(headings: list[str], lines: list[list[str]]) -> str:
  """A table."""
  return '\n'.join(f'| {" | ".join(cells)} |' for cells in (headings, ['---'] * len(headings), *lines))
