"""How much of a model a technique reaches. The silent failure of efficiency work is the large weight left as it was."""
import dataclasses
import math

from efficient_lm.models.moe.layer import MoE
from efficient_lm.tree import select, size
from efficient_lm.weights.biased import Biased
from efficient_lm.weights.weight import Weight

LARGE = 0.01   # a weight is named when it is left out and holds at least this share of the parameters


@dataclasses.dataclass(frozen=True)
class Coverage:
  """Shares (0 to 1) of all parameters and of the forward pass's matrix FLOPs that lie in the selected weights; `left`:
  the paths of large weights that were not selected."""
  parameters: float
  flops: float
  left: tuple[str, ...]

  def describe(self, technique: str) -> str:
    """One line for the start-up report."""
    left = f'; left as they are: {", ".join(self.left)}' if self.left else ''
    return f'{technique} reaches {self.parameters:.1%} of parameters, {self.flops:.1%} of matrix FLOPs{left}'


def active_share(model, path: str) -> float:
  """Share of a weight that one token is multiplied with: below 1 only for weights stacked by expert."""
  for name, moe in select(model, MoE):
    if path.startswith(f'{name}/experts/'): return moe.active_experts / moe.num_experts
  return 1.0


def is_multiplied(weight: Weight, tied: bool) -> bool:
  """Whether there is a product of it: not of tables that are only looked up, an embedding that is no head and positions."""
  return weight.axes != 'TD' and (tied or weight.axes != 'VD')


def num_biases(model) -> int:
  """Parameters of weights that lie beside their matrices."""
  return sum(size(weight.bias) for _, weight in select(model, Biased))


def coverage(model, where: str) -> Coverage:
  """Of the weights whose path matches the regular expression `where`. Works on shapes as on arrays."""
  chosen = {path for path, _ in select(model, Weight, where)}
  # A weight counts as the matrix that it stands for, however it is stored.
  counts = {path: math.prod(weight.shape) for path, weight in select(model, Weight)}
  tied = getattr(model, 'own_head', True) is None
  cost = {path: weight.num_multiplied * active_share(model, path) * is_multiplied(weight, tied)
          for path, weight in select(model, Weight)}
  total = sum(counts.values()) + size(model) - sum(size(weight) for _, weight in select(model, Weight)) + num_biases(model)
  left = tuple(path for path, count in counts.items() if path not in chosen and count >= LARGE * total)
  return Coverage(sum(counts[path] for path in chosen) / total,
                  sum(cost[path] for path in chosen) / max(sum(cost.values()), 1), left)
