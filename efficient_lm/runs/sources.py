"""Runs as sources (`config.sources`): models that others start from, learn from, or are compared with."""
import contextlib
import dataclasses
import os
from collections.abc import Iterator

from efficient_lm.config import experiment, presets
from efficient_lm.errors import ConfigError
from efficient_lm.runs import record

LONGEST = 32   # runs of which each starts from the next
_asked: list[str] = []   # folders of runs that are being asked for what they start from, the first one first


@contextlib.contextmanager
def _once(path: str) -> Iterator[None]:
  """Raises ConfigError for a run that starts, in the end, from itself: what it starts from would be asked without end."""
  real = os.path.realpath(path)
  if real in _asked: raise ConfigError('run', path, 'starts, in the end, from itself')
  if len(_asked) >= LONGEST:
    raise ConfigError('run', path, f'is asked for after {LONGEST} others, of which each starts from the next')
  _asked.append(real)
  try: yield
  finally: _asked.remove(real)


@dataclasses.dataclass(kw_only=True)
class FromRun:
  """The model that an earlier run left in its workdir `path`, after its last stage, or after stage number `stage`."""
  path: str
  stage: int | None = None

  def check(self):
    if not self.path: yield 'path', self.path, 'must name the workdir of a run'
    if self.stage is not None and self.stage < 0: yield 'stage', self.stage, 'must be 0 or more'

  @property
  def label(self) -> str:
    """What it is called in files and messages."""
    return self.path if self.stage is None else f'{self.path}, stage {self.stage}'

  @property
  def here(self) -> bool:
    """Whether it can be read."""
    return os.path.isfile(os.path.join(self.path, 'config.json'))

  def spec(self):
    """Raises ConfigError where there is no such run."""
    with _once(self.path):
      trained = experiment.read(self.path)
      return record.left_spec(self.path, self.stage) or experiment.model_of(trained, self.path)

  def abstract(self):
    """Raises CheckpointError where the run has not come so far."""
    from efficient_lm.runs import loading
    with _once(self.path): return loading.abstract_model(self.path, self.stage)

  def load(self, mesh=None):
    """On `mesh` (default: on one device). Raises CheckpointError where the run has not come so far."""
    from efficient_lm.runs import loading
    with _once(self.path): return loading.load_model(self.path, mesh, self.stage)

  def tokenizer(self):
    """Raises CheckpointError where the run has not started."""
    return record.tokenizer(self.path)

  def key(self) -> str:
    """That of the stage that left the model. Raises CheckpointError."""
    from efficient_lm.runs import loading
    return loading.key(self.path, self.stage)


def trained(variant: str = 'tiny') -> FromRun:
  """The dense baseline of `config.presets`, where `make baseline` keeps its run. Raises ConfigError for a variant that there
  is none of."""
  experiment.choose(variant, presets.SIZES)
  return FromRun(path='runs/baseline' if variant == 'tiny' else f'runs/baseline-{variant}')
