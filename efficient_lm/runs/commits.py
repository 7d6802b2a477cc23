"""What a stage leaves, as one commit: the model's arrays, its structure, its row, notes and table of weights.

A commit is one step of `Checkpoints`, whose record holds all but the arrays; it appears as a whole, by a rename, or not at
all.
"""
import contextlib
import dataclasses

import jax
from flax import nnx

from efficient_lm.compression import rewriting
from efficient_lm.config import fields
from efficient_lm.errors import CheckpointError, ConfigError, IncompatibleError
from efficient_lm.models.described import described
from efficient_lm.parallel.processes import on_first
from efficient_lm.parallel.sharding import placed, single_device_mesh
from efficient_lm.runs import ledger, record, structure, writing
from efficient_lm.runs.checkpoint import Checkpoints
from efficient_lm.system import workdir as workdirs


def commit(workdir, planned: record.Planned, step: int, model, row: ledger.Row, sample: str | None = None):
  """Saves what a stage has left and returns when it is on disk. `step`: of all trainings so far; `sample`: of its text.
  Raises WriteError."""
  entries = {'key': planned.key, 'step': step, 'row': ledger.as_json(row), 'structure': structure.described(model),
             'spec': _spec(model), 'weights': [dataclasses.asdict(line) for line in rewriting.table(model)],
             'sample': sample}
  folder = record.stage_folder(workdir, planned)
  with writing.needed(folder): on_first(workdirs.folder, workdir, 'stages')
  with contextlib.closing(Checkpoints(folder, keep=1)) as checkpoints:
    checkpoints.save(step, {'model': model}, wait=True, record=entries)


def _spec(model):
  """What a config would say of the model; None where it has parts of a user's own."""
  try: return fields.to_json(described(model))
  except (IncompatibleError, AttributeError): return None


def abstract(workdir, planned: record.Planned):
  """Shapes of the model that a stage has left. Raises CheckpointError for classes that are not at hand, and for what is no
  structure of a model."""
  try:
    model = structure.rebuilt(record.committed(workdir, planned)['structure'])
    if not isinstance(model, nnx.Module): raise ValueError('it is no module')
    return model
  except (ConfigError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    folder = record.stage_folder(workdir, planned)
    raise CheckpointError(f'{folder} has no structure of a model: {" ".join(str(error).split())[:200]}') from error


def load(workdir, planned: record.Planned, mesh=None):
  """The model that a stage has left, on `mesh` (default: one device), whatever mesh it was made on."""
  mesh = mesh or single_device_mesh()
  checkpoints = Checkpoints(record.stage_folder(workdir, planned), keep=1)
  with jax.set_mesh(mesh), contextlib.closing(checkpoints):   # whatever mesh the caller is in
    return checkpoints.restore_model(placed(abstract(workdir, planned), mesh))


def write_ledger(workdir, plan) -> list[ledger.Row]:
  """ledger.json of all that has been committed, and the rows."""
  rows = ledger.committed(workdir, plan)
  on_first(ledger.write, workdir, rows)
  return rows
