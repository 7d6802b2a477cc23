"""Models whose shapes follow from a config: of a training that is under way, and of runs of earlier versions, which recorded
none. Those kept the state of their only training in `checkpoints/`, and the models of what followed in
`stages/<n>_<stage>/`.
"""
import contextlib
from pathlib import Path

import jax
from flax import nnx

from efficient_lm.config import experiment as experiments
from efficient_lm.errors import CheckpointError
from efficient_lm.parallel.sharding import placed, single_device_mesh
from efficient_lm.runs import record
from efficient_lm.runs.checkpoint import Checkpoints
from efficient_lm.training.learner import trained_shapes

CHECKPOINTS = 'checkpoints'   # of a run's first training


def start_shapes(experiment, workdir=None):
  """Shapes of the model that a run starts from: what it has kept of it, or the source's, or those of its description."""
  if experiment.start is None:
    return jax.eval_shape(lambda key: experiment.model.build(rngs=nnx.Rngs(params=key)), jax.random.key(0))
  known = workdir and record.read(workdir)
  if known and record.committed(workdir, known.plan[0]):
    from efficient_lm.runs import commits
    return commits.abstract(workdir, known.plan[0])
  return experiment.start.abstract()


def under_way(workdir, known: record.Record, stage: int | None = None) -> bool:
  """Whether what is asked of a run is the model of its first training, which has saved a state and not come to its end."""
  numbers = [int(planned.folder.partition('_')[0]) for planned in known.plan]
  asked = numbers[-1] if stage is None else stage
  if asked != 1 or 1 not in numbers or record.committed(workdir, known.plan[numbers.index(1)]): return False
  return bool(saved_steps(Path(workdir) / CHECKPOINTS))


def saved_steps(folder: Path) -> list[int]:
  """Steps whose state lies in a folder of checkpoints, oldest first."""
  return sorted(int(entry.name) for entry in folder.glob('*') if entry.name.isdecimal())


def key(workdir) -> str:
  """A name of the model in a run of an earlier version."""
  folder, _ = _result(workdir)
  manifests = [(folder / str(step) / record.MANIFEST).read_text(encoding='utf-8') for step in saved_steps(folder)[-1:]]
  return record.key_of('earlier version', *manifests)


def abstract_model(workdir):
  """Shapes of what `load_model` loads."""
  return _result(workdir)[1]


def load_model(workdir, mesh=None):
  """The newest saved model, that of the last stage if an earlier version's run has some, on `mesh` (default: one device)."""
  mesh, (folder, shapes) = mesh or single_device_mesh(), _result(workdir)
  checkpoints = Checkpoints(folder)
  with jax.set_mesh(mesh), contextlib.closing(checkpoints):   # whatever mesh the caller is in
    return checkpoints.restore_model(placed(shapes, mesh))


def _result(workdir):
  """The folder of checkpoints, and the shapes of the model in them."""
  experiment = experiments.read(str(workdir))
  model = jax.eval_shape(lambda model: trained_shapes(model, experiment.train, experiment.techniques),
                         start_shapes(experiment, workdir))
  folder, begun = Path(workdir) / CHECKPOINTS, record.read(workdir) is not None
  if begun or not experiment.stages: return folder, model
  for stage in experiment.stages: model = jax.eval_shape(stage.abstract, model)
  folder = Path(workdir) / 'stages' / f'{len(experiment.stages)}_{type(experiment.stages[-1]).__name__.lower()}'
  if not folder.is_dir(): raise CheckpointError(f'no {folder}: the run has not come to its last stage; run it again')
  return folder, model
