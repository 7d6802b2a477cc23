"""What a stage leaves, as one commit: the model's arrays, its structure, its row, notes and table of weights.

A commit is one step of `Checkpoints`, whose record holds all but the arrays; it appears as a whole, by a rename, or not at
all.
"""
import contextlib
import dataclasses

import jax

from efficient_lm.compression import rewriting
from efficient_lm.parallel.sharding import placed, single_device_mesh
from efficient_lm.runs import ledger, record, structure, writing
from efficient_lm.runs.checkpoint import Checkpoints


def commit(workdir, planned: record.Planned, step: int, model, row: ledger.Row):
  """Saves what a stage has left and returns when it is on disk. `step`: of all trainings so far. Raises
  WriteError."""
  entries = {'key': planned.key, 'step': step, 'row': ledger.as_json(row), 'structure': structure.described(model),
             'weights': [dataclasses.asdict(line) for line in rewriting.table(model)]}
  folder = record.stage_folder(workdir, planned)
  with writing.needed(folder): folder.parent.mkdir(exist_ok=True)
  with contextlib.closing(Checkpoints(folder, keep=1)) as checkpoints:
    checkpoints.save(step, {'model': model}, wait=True, record=entries)


def abstract(workdir, planned: record.Planned):
  """Shapes of the model that a stage has left. Raises CheckpointError for classes that are not at hand."""
  return structure.rebuilt(record.committed(workdir, planned)['structure'])


def load(workdir, planned: record.Planned, mesh=None):
  """The model that a stage has left, on `mesh` (default: one device), whatever mesh it was made on."""
  mesh = mesh or single_device_mesh()
  checkpoints = Checkpoints(record.stage_folder(workdir, planned), keep=1)
  with jax.set_mesh(mesh), contextlib.closing(checkpoints):   # whatever mesh the caller is in
    return checkpoints.restore_model(placed(abstract(workdir, planned), mesh))


def bytes_on_disk(workdir, planned: record.Planned) -> int:
  """Of the model's arrays, as they are stored."""
  folder = record.stage_folder(workdir, planned) / str(record.committed(workdir, planned)['step']) / 'model'
  return sum(file.stat().st_size for file in folder.rglob('*') if file.is_file())


def write_ledger(workdir, plan) -> list[ledger.Row]:
  """ledger.json of all that has been committed, and the rows."""
  rows = []
  for planned in plan:
    left = record.committed(workdir, planned)
    if left is None: break
    row = ledger.row_of(left['row'])
    rows.append(dataclasses.replace(row, size=dataclasses.replace(row.size, bytes_on_disk=bytes_on_disk(workdir, planned))))
  if jax.process_index() == 0: ledger.write(workdir, rows)
  return rows
