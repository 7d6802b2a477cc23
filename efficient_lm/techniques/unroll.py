"""Layers as weights of their own, a stage in front of one that treats them differently."""
import dataclasses

from efficient_lm.lazy import lazy

transformer = lazy('efficient_lm.models.transformer')


@dataclasses.dataclass(kw_only=True)
class Unroll:
  """Takes stacks of equal layers apart: 'stacks/0/blocks/mlp/up' becomes 'stacks/0/blocks/0/mlp/up', and so on, and rules
  can give each layer a format of its own. Layers that are run by one loop have to be alike. It computes the same, and is
  compiled anew for every layer."""

  def __call__(self, model, context):
    return self.abstract(model), ('Unroll: every layer has weights of its own',)

  def abstract(self, model):
    return transformer.unrolled(model)
