"""Shapes that a budget of parameters, FLOPs or bytes allows, found among those of a grid. Light: JAX is loaded when a model
is asked about."""
import dataclasses
import itertools

from efficient_lm.compression.shape import SIZES, Shape, check_size
from efficient_lm.errors import IncompatibleError

EIGHTHS = (1.0, 0.875, 0.75, 0.625, 0.5)
COSTS = ('parameters', 'flops', 'bytes')


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Grid:
  """Sizes to choose from, as those of `Shape`; all combinations are tried. Empty: a dimension stays as it is."""
  width: tuple[float, ...] = ()
  layers: tuple[float, ...] = ()
  heads: tuple[float, ...] = ()
  kv_heads: tuple[float, ...] = ()
  hidden: tuple[float, ...] = ()
  experts: tuple[float, ...] = ()
  expert_hidden: tuple[float, ...] = ()
  multiple: int = 1

  def check(self):
    for name in SIZES:
      for i, size in enumerate(getattr(self, name)): yield from check_size(f'{name}[{i}]', size)
    if not self.named: yield 'width', self.width, 'must hold sizes, or those of another dimension must'

  @property
  def named(self) -> list[str]:
    """Names of the dimensions that vary."""
    return [name for name in SIZES if getattr(self, name)]

  def shapes(self) -> list[Shape]:
    """All combinations."""
    sizes = itertools.product(*(getattr(self, name) for name in self.named))
    return [Shape(**dict(zip(self.named, one)), multiple=self.multiple) for one in sizes]


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Budget:
  """The `trials` largest shapes of `grid` that cost no more than is said: of `parameters`, of forward `flops` a token in
  texts of `sequence_length`, of `bytes` in memory, each a share of what the model has, up to 1.0, or a number. With several,
  the stage takes the one whose loss on its text is the lowest, before any training (Minitron, arXiv 2407.14679, section 2.3,
  trains each a little)."""
  parameters: float | None = None
  flops: float | None = None
  bytes: float | None = dataclasses.field(default=None, metadata={'wide': True})
  grid: Grid = dataclasses.field(default_factory=lambda: Grid(width=EIGHTHS, layers=EIGHTHS, hidden=EIGHTHS, multiple=8))
  trials: int = 4
  sequence_length: int = 1024

  def check(self):
    if self.trials < 1: yield 'trials', self.trials, 'must be at least 1'
    if self.sequence_length < 1: yield 'sequence_length', self.sequence_length, 'must be at least 1'
    if not self.limits: yield 'parameters', self.parameters, 'give parameters, flops or bytes'
    for name in self.limits: yield from check_size(name, getattr(self, name))

  @property
  def limits(self) -> list[str]:
    """Names of the costs that it limits."""
    return [name for name in COSTS if getattr(self, name) is not None]

  def resolve(self, model) -> tuple[Shape, ...]:
    """Candidates for a model of arrays or of shapes, the largest first. Raises IncompatibleError where none is small
    enough, or the grid names a dimension that the model lacks."""
    from efficient_lm.compression.shape import is_share
    whole = self.costs(model)
    limits = {name: getattr(self, name) * (whole[name] if is_share(getattr(self, name)) else 1) for name in self.limits}
    fitting, smallest, refused = [], None, None
    for shape in self.grid.shapes():
      try: cost = self.costs(model, shape)
      except IncompatibleError as error:
        refused = refused or error
        continue
      used = max(cost[name] / limit for name, limit in limits.items())
      if used <= 1: fitting.append((used, shape))
      if smallest is None or used < smallest[0]: smallest = used, cost, shape
    if smallest is None: raise refused
    if not fitting:
      asked = ', '.join(f'{name} = {getattr(self, name):g}' for name in self.limits)
      found = ', '.join(f'{smallest[1][name] / whole[name]:.0%} of {whole[name]:.4g} {name}' for name in self.limits)
      raise IncompatibleError(f'no shape of the grid meets {asked}: the smallest, {smallest[2].text}, takes {found}')
    fitting.sort(key=lambda pair: -pair[0])
    return tuple(shape for _, shape in fitting[:self.trials])

  def costs(self, model, shape: Shape | None = None) -> dict[str, float]:
    """Of a model, or of what a shape would leave of it."""
    from efficient_lm.compression import counting, dimensions, selection
    from efficient_lm.tree import num_bytes
    if shape is not None:
      left = dimensions.counts(model, shape)
      model = dimensions.Removal(model, selection.chosen(model, left, selection.unscored(left))).shapes(model)
    flops = counting.flops_per_token(model, self.sequence_length).forward if self.flops is not None else 0
    return dict(parameters=counting.parameters(model).total, flops=flops, bytes=num_bytes(model))
