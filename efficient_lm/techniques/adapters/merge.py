"""Adapters become part of their weights, the stage after LoRA."""
import dataclasses

from efficient_lm.errors import IncompatibleError


@dataclasses.dataclass(kw_only=True)
class Merge:
  """Adds each adapter to its weight: one matrix in floats, which costs nothing more than before. Zeros of a mask stay. A
  weight in few bits becomes floats, so that what it promised is lost: GivingUp(stage=Merge(), lost=('bits',)) says that this
  is meant."""
  def __call__(self, model, context):
    return self.abstract(model), ('Merge: adapters are added to their weights',)

  def abstract(self, model):
    from efficient_lm import tree
    from efficient_lm.weights.low_rank import LowRank
    from efficient_lm.weights.masked import Masked
    if not dict(tree.select(model, LowRank)):
      raise IncompatibleError('Merge: no weight has an adapter, so there is nothing to add')
    model = tree.rewrite(model, LowRank, lambda _, weight: weight.merged())
    masks = dict(tree.select(model, Masked))
    return tree.rewrite(model, Masked, lambda _, weight: weight.cleaned()) if masks else model
