"""A stage that may break a promise which an earlier one made: said in the config, and then in the ledger."""
import dataclasses
from typing import Any

KINDS = ('zeros', 'pattern', 'bits', 'experts')   # of `weights.invariants`


@dataclasses.dataclass(kw_only=True)
class GivingUp:
  """`stage`, which may lose the invariants named by `lost` ('zeros', 'pattern', 'bits', 'experts'). Without it, a stage that
  loses one is an error: a rotated model has no zeros left, whatever pruned it. What was lost is a note in the stage's
  row."""
  stage: Any
  lost: tuple[str, ...]

  def check(self):
    for kind in self.lost:
      if kind not in KINDS: yield 'lost', kind, f'must be one of {", ".join(KINDS)}'

  @property
  def gives_up(self) -> tuple[str, ...]: return self.lost

  @property
  def cannot_keep(self) -> tuple[str, ...]: return getattr(self.stage, 'cannot_keep', ())

  @property
  def name(self) -> str: return getattr(self.stage, 'name', type(self.stage).__name__)

  @property
  def across_processes(self) -> bool: return getattr(self.stage, 'across_processes', False)

  def follow(self, invariants):
    """Where the stage takes them."""
    return self.stage.follow(invariants) if hasattr(self.stage, 'follow') else invariants

  def abstract(self, model): return self.stage.abstract(model)

  def __call__(self, model, context): return self.stage(model, context)
