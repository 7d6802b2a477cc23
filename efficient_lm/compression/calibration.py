"""What compressions after training share: statistics of a model's activations on a few batches, and the walk from layer to
layer in which each is changed by what it sees.

Two ways to collect: `statistics` runs the whole model once a batch, as it is. `layer_by_layer` keeps the hidden states of
all calibration tokens and carries them through layers that have been changed already, so that a layer is calibrated on what
it will be given. All layers of a stack have the same shapes, and one compiled function does for all.
"""
import dataclasses
import functools
from typing import Any

from efficient_lm.errors import Misfit
from efficient_lm.lazy import lazy

axes = lazy('efficient_lm.axes')
jax = lazy('jax')
jnp = lazy('jax.numpy')
layers = lazy('efficient_lm.models.layers')
losses = lazy('efficient_lm.training.losses')
nnx = lazy('flax.nnx')
observed = lazy('efficient_lm.weights.observed')
rotation = lazy('efficient_lm.weights.rotated')
transformer = lazy('efficient_lm.models.transformer')
tree = lazy('efficient_lm.tree')
weights = lazy('efficient_lm.weights.weight')
wiring = lazy('efficient_lm.compression.coupling')


EMPTY = 'calibration has no data: the iterator of batches is empty'


class Method:
  """How matrices are rounded after training. Subclasses are dataclasses that a config can hold.

  needs: names of the statistics that it wants of each weight's inputs (`efficient_lm.observed`); none: no calibration.
  carries_rounded: whether layers are calibrated on the outputs of rounded layers before them, or of float ones.
  true_sequential: whether that holds of the products within a layer, too.
  """
  needs: tuple[str, ...] = ()
  carries_rounded = True
  true_sequential = False

  def prepare(self, layer, found: dict[str, dict], formats: dict[str, Any]):
    """A float layer that computes the same and is easier to round, and the statistics of its weights.

    found: by path, those of each weight that is to be rounded, to `formats`."""
    return layer, found

  def encode(self, w_NK, format, statistics: dict):
    """A matrix (..., N, K) as `formats.Encoded`, by the statistics of its inputs; compiled once for each shape."""
    raise NotImplementedError


def first_batches(batches, sequences: int) -> list[dict]:
  """As many batches as hold `sequences` rows, the last one whole. Raises Misfit if there are none or too few."""
  kept, count = [], 0
  for batch in batches:
    kept.append(batch)
    count += batch['inputs_BT'].shape[0]
    if count >= sequences: return kept
  if not count: raise Misfit(EMPTY)
  raise Misfit(f'calibration asks for {sequences} sequences, but the data has {count}: lower `sequences`')


# ------------------------------------------------------------------ collecting

def watch(model, wanted: dict[str, tuple[str, ...]]):
  """The model with the weights at these paths observed, inside of a rotation where there is one."""
  change = lambda path, weight: weight if path not in wanted else rotation.within(
    weight, lambda inner: observed.Observed(inner, wanted[path]))
  return tree.rewrite(model, weights.Weight, change)


def collect(function, watched) -> dict[str, dict]:
  """Statistics by path and name of what observed weights see in function(watched), whose result is any tree of arrays."""
  graph, statistics, rest = nnx.split(watched, observed.Statistic, ...)

  def run(statistics):
    result = function(nnx.merge(graph, statistics, rest))
    return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(result))

  return _read(nnx.merge(graph, jax.grad(run)(statistics), rest))


def unseen(model, wanted: dict[str, tuple[str, ...]]) -> dict[str, dict]:
  """The statistics of no data: zeros."""
  return _read(watch(model, wanted))


def _read(watched) -> dict[str, dict]:
  inner = {path: rotation.innermost(weight) for path, weight in tree.select(watched, weights.Weight)}
  return {path: {name: variable.get_value() for name, variable in weight.statistics.items()}
          for path, weight in inner.items() if isinstance(weight, observed.Observed)}


def join(a: dict[str, dict], b: dict[str, dict]) -> dict[str, dict]:
  """Statistics of two sets of batches as those of both."""
  return {path: {name: observed.joined(name, a[path][name], b[path][name]) for name in a[path]} for path in a}


def statistics(model, batches, wanted: dict[str, tuple[str, ...]]) -> dict[str, dict]:
  """Of the whole model as it is. Layers of a stack, and experts, are dimensions in front of each statistic. `batches` is
  any iterable of batches, on the mesh if there is one; it is read once. Raises Misfit if it is empty."""
  watched, run, found = watch(model, wanted), compiled(_of_batch), None
  for batch in batches:
    new = axes.settle(run(watched, batch))
    found = new if found is None else join(found, new)
  if found is None: raise Misfit(EMPTY)
  return check_finite(found)


def _of_batch(watched, batch):
  return collect(lambda model: losses.outputs_of(model, batch).hidden_BTD, watched)


@functools.cache
def compiled(function, **options):
  """jax.jit, made when it is first needed: nothing here loads JAX when it is imported."""
  return jax.jit(function, **options)


def check_finite(found: dict[str, dict]) -> dict[str, dict]:
  """What it is given. Raises Misfit for statistics that are not finite: the model overflows on this data."""
  for path, named in found.items():
    for name, value in named.items():
      if not bool(jnp.isfinite(jnp.sum(value))): raise Misfit(f'{path}: its inputs are not finite ({name})')
  return found


# ------------------------------------------------------------------ layer by layer

@dataclasses.dataclass(frozen=True)
class Hidden:
  """Of one batch: the residual stream before a layer, and what attention asks for."""
  x_BTD: Any
  positions_BT: Any
  segments_BT: Any


def embedded(model, batch) -> Hidden:
  """What the first layer reads."""
  x_BTD = compiled(_embedded)(model.embed, batch['inputs_BT']).astype(model.dtype)
  return Hidden(x_BTD, batch['positions_BT'], batch['segments_BT'])


def _embedded(embed, tokens_BT):
  return axes.constrain(embed.take(tokens_BT), 'BTD')


def _advanced(layer, x_BTD, positions_BT, segments_BT):
  return layer(x_BTD, positions_BT, segments_BT)[0]


def _of_layer(watched, x_BTD, positions_BT, segments_BT):
  return collect(lambda layer: _advanced(layer, x_BTD, positions_BT, segments_BT), watched)


def advance(layer, hidden: list[Hidden]) -> list[Hidden]:
  """The hidden states after a layer."""
  run = compiled(_advanced)
  after = (axes.settle(run(layer, one.x_BTD, one.positions_BT, one.segments_BT)) for one in hidden)
  return [dataclasses.replace(one, x_BTD=x_BTD) for one, x_BTD in zip(hidden, after)]


def layer_statistics(layer, hidden: list[Hidden], wanted: dict[str, tuple[str, ...]]) -> dict[str, dict]:
  """Of one layer on these hidden states."""
  watched, run = watch(layer, wanted), compiled(_of_layer)
  found = None
  for one in hidden:
    new = axes.settle(run(watched, one.x_BTD, one.positions_BT, one.segments_BT))
    found = new if found is None else join(found, new)
  return check_finite(found)


def layer_by_layer(model, batches, change):
  """The model with each layer replaced by `change(path, layer, hidden) -> (layer, hidden after it)`.

  path: the name of the layer's weights in front of their own ('stacks/0/blocks'), the same for all layers of a stack that
  is scanned. Stacks stay stacks: layers of one have to come back with equal structure.
  """
  hidden, stacks = [embedded(model, batch) for batch in batches], []
  if not hidden: raise Misfit(EMPTY)
  for i, stack in enumerate(model.stacks):
    scanned, changed = isinstance(stack, transformer.Stack), []
    for j in range(stack.num_layers if scanned else len(stack.blocks)):
      path = f'stacks/{i}/blocks' if scanned else f'stacks/{i}/blocks/{j}'
      layer, hidden = change(path, compiled(_at)(stack.blocks, j) if scanned else stack.blocks[j], hidden)
      changed.append(layer)
    stacks.append(_rebuilt(stack, changed, scanned))
  model = jax.tree.map(lambda leaf: leaf, model)
  model.stacks = nnx.List(stacks)
  return model


def _at(blocks, i):
  return jax.tree.map(lambda leaf: leaf[i], blocks)


def _stacked(changed):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *changed)


def _rebuilt(stack, changed, scanned: bool):
  stack = jax.tree.map(lambda leaf: leaf, stack)
  stack.blocks = compiled(_stacked)(changed) if scanned else nnx.List(changed)
  return stack


# ------------------------------------------------------------------ who reads the same input

def sharing(layer) -> dict[str, str]:
  """For each weight of a layer, the first of those that multiply the very same rows: it is observed for all of them.
  Experts see the rows that they are sent, and share with each other only."""
  found = {path: path for path, _ in tree.select(layer, weights.Weight)}
  axes_of = {path: weight.axes for path, weight in tree.select(layer, weights.Weight)}
  for fan in wiring.fans(layer):
    for experts in (False, True):
      alike = [path for path in fan.readers if axes_of[path].startswith('E') == experts]
      for path in alike: found[path] = alike[0]
  return found


def in_turn(layer, paths) -> list[list[str]]:
  """`paths` in the order in which a layer computes, those together that read the same input. What is unknown comes first."""
  fans = [set(fan.readers) for fan in wiring.fans(layer)]
  rest = [path for path in paths if not any(path in fan for fan in fans)]
  groups = [rest, *([path for path in paths if path in fan] for fan in fans)]
  return [group for group in groups if group]
