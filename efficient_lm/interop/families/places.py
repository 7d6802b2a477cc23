"""Where the arrays of a model come from: for each path of its tree, the tensors it is made of and how they lie.

A family says what one layer is made of: `Part`s, by their path in a block, under the names that a layer's tensors have
behind its prefix. `of_layers` repeats them for every layer of every stack.
"""
import dataclasses
import math
from collections.abc import Callable

from efficient_lm.models import spec

Parts = dict[str, 'Part']


@dataclasses.dataclass(frozen=True)
class Part:
  """A tensor, or a slice of one, by `name`, in which '{e}' is the number of an expert: then there is one for each.

  layout: letters of its dimensions as they lie in memory, in the alphabet of the model's array and in groups that are one
  dimension in the file: 'NH D' is a matrix of N * H rows and D columns; the letter of experts is never among them.
  cut: (letter, first, whole): of the `whole` numbers that the tensor has along a letter, those from `first` on are meant.
  plus: is added to what is stored (1 for the norms of Gemma, which multiply by 1 + w).
  """
  name: str
  layout: str
  cut: tuple[str, int, int] | None = None
  plus: float = 0.0

  @property
  def letters(self) -> str: return self.layout.replace(' ', '')

  def sizes(self, sizes: dict[str, int]) -> list[int]:
    """Of the tensor, a number for each letter, where the array of the model has `sizes`."""
    return [self.cut[2] if self.cut and letter == self.cut[0] else sizes[letter] for letter in self.letters]

  def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
    """That the tensor must have in the file."""
    of_letter = dict(zip(self.letters, self.sizes(sizes)))
    return tuple(math.prod(of_letter[letter] for letter in group) for group in self.layout.split(' '))


@dataclasses.dataclass(frozen=True)
class Place:
  """What one array of the model is made of. Its dimensions are those of `lead` (layers, experts), then those of one tensor;
  `names` are in the order of `lead`, the last dimension running fastest."""
  names: tuple[str, ...]
  lead: tuple[int, ...]
  part: Part


def of_layers(model: spec.Transformer, prefix: str, parts: Callable[[spec.Layer, spec.Stack | spec.Repeated], Parts]):
  """{path: Place} of all stacks; `prefix`, such as 'model.layers.{l}.', begins the names of layer l; `parts` of a layer."""
  found, first = {}, 0
  for i, stack in enumerate(model.stacks):
    repeated = isinstance(stack, spec.Repeated)
    pattern = stack.layers if repeated else (spec.Layer(attention=stack.attention, mlp=stack.mlp),)
    for j, layer in enumerate(pattern):
      numbers = range(first + j, first + stack.num_layers, len(pattern))
      root = f'stacks/{i}/blocks/{j}/' if repeated else f'stacks/{i}/blocks/'
      for path, part in parts(layer, stack).items():
        experts = layer.mlp.num_experts if '{e}' in part.name else None
        found[root + path] = _stacked(part, prefix, numbers, experts)
    first += stack.num_layers
  return found


def alone(parts: Parts) -> dict[str, Place]:
  """Places of arrays that belong to no layer."""
  return {path: Place((part.name,), (), part) for path, part in parts.items()}


def _stacked(part: Part, prefix: str, numbers, experts: int | None) -> Place:
  if experts is None: return Place(tuple(prefix.format(l=l) + part.name for l in numbers), (len(numbers),), part)
  names = tuple(prefix.format(l=l) + part.name.format(e=e) for l in numbers for e in range(experts))
  return Place(names, (len(numbers), experts), part)


def biased(path: str, weight: Part, bias: Part | None) -> Parts:
  """Of a Weight, and of one that is wrapped with a bias."""
  if bias is None: return {f'{path}/array': weight}
  return {f'{path}/inner/array': weight, f'{path}/bias': bias}


def stacks_of(layers: list[spec.Layer], block=None) -> tuple[spec.Stack | spec.Repeated, ...]:
  """Layers in their order, as few stacks as show how they repeat: runs of equal ones where there are few of these, otherwise
  a repeated pattern and what is left of it."""
  block = block or spec.PreNorm()
  runs = _runs(layers)
  if len(runs) > 4:
    period = next(p for p in range(2, len(layers) + 1) if all(layers[i] == layers[i % p] for i in range(len(layers))))
    repeats = len(layers) // period
    if repeats > 1:
      pattern = spec.Repeated(num_repeats=repeats, layers=tuple(layers[:period]), block=block)
      return (pattern, *_stacks(_runs(layers[repeats * period:]), block))
  return _stacks(runs, block)


def _runs(layers) -> list[tuple[int, spec.Layer]]:
  runs = []
  for layer in layers:
    if runs and runs[-1][1] == layer: runs[-1] = (runs[-1][0] + 1, layer)
    else: runs.append((1, layer))
  return runs


def _stacks(runs, block) -> tuple[spec.Stack, ...]:
  return tuple(spec.Stack(num_layers=n, attention=layer.attention, mlp=layer.mlp, block=block) for n, layer in runs)
