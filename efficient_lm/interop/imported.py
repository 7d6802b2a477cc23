"""Checkpoints of others as sources (`config.sources`), whatever files they lie in."""
import dataclasses
from typing import Any, ClassVar

from efficient_lm.interop import families

DTYPES = (None, 'float32', 'bfloat16', 'float16')


@dataclasses.dataclass(kw_only=True)
class Imported:
  """The model at `path`. `dtype`: of the computation; `parameters`: that its arrays are held in. Subclasses read their
  files: `config`, `checkpoint`, `here`, `tokenizer`, `key`; `place` says what a path is, for messages."""
  path: str
  dtype: str | None = None
  parameters: str | None = None

  place: ClassVar[str]

  def check(self):
    if not self.path: yield 'path', self.path, f'must name {self.place}'
    for field in ('dtype', 'parameters'):
      value = getattr(self, field)
      if value not in DTYPES: yield field, value, 'must be float32, bfloat16 or float16, or None'

  @property
  def label(self) -> str:
    """What it is called in files and messages."""
    held = [f'{field} {value}' for field, value in (('computed in', self.dtype), ('held in', self.parameters)) if value]
    return ', '.join([self.path, *held])

  def config(self) -> tuple[dict[str, Any], str]:
    """A config.json, and how messages call it. Raises ConfigError, CheckpointError, IncompatibleError."""
    raise NotImplementedError

  def checkpoint(self):
    """The `interop.checkpoint.Checkpoint`, none of its tensors read. Raises as `config` does."""
    raise NotImplementedError

  @property
  def context(self) -> int:
    """Tokens of a text that the model was made for. Raises as `config` does."""
    config, _ = self.config()
    found = config.get('n_positions') or config.get('max_position_embeddings')
    return found if isinstance(found, int) and found > 0 else 2048

  def spec(self):
    """Raises as `config` does, and ConfigError for a config that says what no model here does."""
    model = families.spec_of(*self.config())
    return model if self.dtype is None else dataclasses.replace(model, dtype=self.dtype)

  def abstract(self):
    """Raises as `spec` does, and CheckpointError for tensors that are damaged, or not those of the config."""
    from efficient_lm.interop import load
    return load.abstract(self.spec(), self.checkpoint(), self.parameters)

  def load(self, mesh=None):
    """On `mesh` (default: on one device). Raises as `abstract` does."""
    from efficient_lm.interop import load
    return load.load(self.spec(), self.checkpoint(), mesh, self.parameters)
