"""Shapes that a budget of parameters, FLOPs, bytes or seconds allows, found among those of a grid. Light: JAX is loaded when
a model is asked about."""
import bisect
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
  texts of `sequence_length`, of `bytes` in memory, each a share of what the model has, up to 1.0, or a number; or that read
  such a text within `latency`, a share of the model's own seconds, measured on the devices at hand. With several, the stage
  takes the one whose loss on its text is the lowest, before any training (Minitron, arXiv 2407.14679, section 2.3,
  trains each a little)."""
  parameters: float | None = None
  flops: float | None = None
  bytes: float | None = dataclasses.field(default=None, metadata={'wide': True})
  latency: float | None = None
  grid: Grid = dataclasses.field(default_factory=lambda: Grid(width=EIGHTHS, layers=EIGHTHS, hidden=EIGHTHS, multiple=8))
  trials: int = 4
  sequence_length: int = 1024

  def check(self):
    if self.trials < 1: yield 'trials', self.trials, 'must be at least 1'
    if self.sequence_length < 1: yield 'sequence_length', self.sequence_length, 'must be at least 1'
    if not self.limits and self.latency is None: yield 'parameters', None, 'give parameters, flops, bytes or latency'
    if self.latency is not None and not 0 < self.latency <= 1: yield 'latency', self.latency, 'must be above 0, up to 1.0'
    for name in self.limits: yield from check_size(name, getattr(self, name))

  @property
  def limits(self) -> list[str]:
    """Names of the costs that it limits."""
    return [name for name in COSTS if getattr(self, name) is not None]

  def resolve(self, model, mesh=None) -> tuple[Shape, ...]:
    """Candidates for a model of arrays or of shapes, the largest first. Seconds are measured on `mesh`; without one, FLOPs
    stand for them. Raises IncompatibleError where none is small enough, or where the model lacks a dimension of the grid."""
    whole, fitting = self._fitting(model)
    if self.latency is None: found = [shape for _, shape in fitting]
    elif mesh is not None: found = self._measured(model, [shape for _, shape in fitting], mesh)
    else: found = [shape for cost, shape in fitting if cost <= self.latency * whole['flops']] or [fitting[-1][1]]
    return tuple(found[:self.trials])

  def notes(self, model, smaller, mesh) -> tuple[str, ...]:
    """How fast what was found is, where seconds were asked for: measured of it, once more."""
    if self.latency is None: return ()
    from efficient_lm.compression.latency import Reading
    share = Reading(model, self.sequence_length, mesh).share(smaller)
    return (f'reads {self.sequence_length} tokens in {share:.0%} of the seconds, asked for: {self.latency:.0%}',)

  def _fitting(self, model) -> tuple[dict[str, float], list[tuple[float, Shape]]]:
    """What the model costs; and shapes that meet all limits that are counted, with what they cost most of, the largest
    first."""
    from efficient_lm.compression.shape import is_share
    whole = self.costs(model)
    limits = {name: getattr(self, name) * (whole[name] if is_share(getattr(self, name)) else 1) for name in self.limits}
    fitting, smallest, refused = [], None, None
    for shape in self.grid.shapes():
      try: cost = self.costs(model, shape)
      except IncompatibleError as error:
        refused = refused or error
        continue
      used = max((cost[name] / limit for name, limit in limits.items()), default=0)
      if used <= 1: fitting.append((cost['flops'] if self.latency is not None else used, shape))
      if smallest is None or used < smallest[0]: smallest = used, cost, shape
    if smallest is None: raise refused
    if not fitting:
      asked = ', '.join(f'{name} = {getattr(self, name):g}' for name in self.limits)
      found = ', '.join(f'{smallest[1][name] / whole[name]:.0%} of {whole[name]:.4g} {name}' for name in self.limits)
      raise IncompatibleError(f'no shape of the grid meets {asked}: the smallest, {smallest[2].text}, takes {found}')
    return whole, sorted(fitting, key=lambda pair: -pair[0])

  def _measured(self, model, shapes: list[Shape], mesh) -> list[Shape]:
    """Of shapes by falling FLOPs, which seconds mostly follow, the first that read fast enough. Where they begin is found by
    halving."""
    from efficient_lm.compression.latency import Reading
    reading, known = Reading(model, self.sequence_length, mesh), {}
    def fits(shape):
      if shape not in known: known[shape] = reading.share(self._smaller(model, shape, mesh))
      return known[shape] <= self.latency
    place = bisect.bisect_left(shapes, True, key=fits)
    found = list(itertools.islice(filter(fits, shapes[place:]), self.trials))
    if found: return found
    fastest = min(known, key=known.get)
    raise IncompatibleError(f'no shape of the grid meets latency = {self.latency:g}: {fastest.text} takes '
                            f'{known[fastest]:.0%} of the seconds')

  def costs(self, model, shape: Shape | None = None) -> dict[str, float]:
    """Of a model, or of what a shape would leave of it: all but seconds."""
    from efficient_lm.compression import counting
    from efficient_lm.tree import num_bytes
    if shape is not None: model = self._smaller(model, shape)
    counted = self.flops is not None or self.latency is not None
    flops = counting.flops_per_token(model, self.sequence_length).forward if counted else 0
    return dict(parameters=counting.parameters(model).total, flops=flops, bytes=num_bytes(model))

  def _smaller(self, model, shape: Shape, mesh=None):
    """What a shape leaves of a model, whichever parts those are: on a mesh, or from shapes."""
    from efficient_lm.compression import dimensions, selection
    left = dimensions.counts(model, shape)
    removal = dimensions.Removal(model, selection.chosen(model, left, selection.unscored(left)))
    return removal.shapes(model) if mesh is None else dimensions.removed(model, removal, mesh)
