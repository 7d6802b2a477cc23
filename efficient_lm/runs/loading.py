"""Models that runs have left, by the run's folder alone."""
from efficient_lm.runs import commits, derived, record


def load_model(workdir, mesh=None, stage: int | None = None):
  """The model of a run's last stage, or of stage number `stage`, on `mesh` (default: one device).

  A run whose first training is still under way has no such model yet: its newest checkpoint is loaded. Raises
  CheckpointError where there is neither, or the run has not come to its last stage.
  """
  known = record.read(workdir)
  if known is None or derived.under_way(workdir, known, stage): return derived.load_model(workdir, mesh)
  return commits.load(workdir, record.chosen(workdir, stage), mesh)


def abstract_model(workdir, stage: int | None = None):
  """Its shapes."""
  known = record.read(workdir)
  if known is None or derived.under_way(workdir, known, stage): return derived.abstract_model(workdir)
  return commits.abstract(workdir, record.chosen(workdir, stage))


def key(workdir, stage: int | None = None) -> str:
  """That of the stage that left it. Raises CheckpointError where none did."""
  return derived.key(workdir) if record.read(workdir) is None else record.chosen(workdir, stage).key
