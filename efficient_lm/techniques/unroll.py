"""Layers as weights of their own, a stage in front of one that treats them differently."""
import dataclasses
import re


@dataclasses.dataclass(kw_only=True)
class Unroll:
  """Takes stacks of layers apart: 'stacks/0/blocks/mlp/up' becomes 'stacks/0/blocks/0/mlp/up', and so on, and rules
  can give each layer a format of its own. Layers that are run by one loop have to be alike. It computes the same, and is
  compiled anew for every layer."""

  def __call__(self, model, context):
    return self.abstract(model), ('Unroll: every layer has weights of its own',)

  def abstract(self, model):
    from efficient_lm.errors import IncompatibleError
    from efficient_lm.models.transformer import Repeated, unrolled
    from efficient_lm.tree import select
    from efficient_lm.weights.weight import Weight
    for path, stack in select(model, Repeated):
      if any(one.kind in ('zeros', 'pattern') for _, weight in select(stack, Weight) for one in weight.invariants()):
        raise IncompatibleError(f'{path} is a pruned repeated pattern: unroll before pruning')
    return unrolled(model)

  def follow(self, invariants: dict[str, tuple]) -> dict[str, tuple]:
    """The zeros that a stack's weights promise are promised of each layer's, with all else that such a weight promises.
    (Bits alone do not tell how many layers there are; slices have them all the same.)"""
    followed = {}
    for path, promised in invariants.items():
      stack = re.fullmatch(r'(stacks/\d+/blocks)/(?!\d)(.*)', path)
      if not stack: followed[path] = promised; continue
      for i in range(_num_layers(promised)):
        followed[f'{stack[1]}/{i}/{stack[2]}'] = tuple(one.layer(i) if hasattr(one, 'layer') else one for one in promised)
    return followed


def _num_layers(promised) -> int:
  return next((one.keep.shape[0] for one in promised if hasattr(one, 'keep')), 0)
