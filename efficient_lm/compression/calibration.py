"""Calibration: statistics of a model's activations on a few batches, collected layer by layer.

The hidden states of all calibration tokens are kept and carried from one layer to the next, so that no more than one layer's
activations are needed at a time. `layer_by_layer` carries them through layers that have been changed already: a layer is
calibrated on what it will be given. All layers of a stack have the same shapes, and one compiled function does for all.
Padding, segment 0, counts for nothing: its hidden states are zero before every layer, and where biases make something of
these, it is not observed.
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm import tree
from efficient_lm.compression.coupling import couplings
from efficient_lm.errors import IncompatibleError
from efficient_lm.models import transformer
from efficient_lm.parallel.memory import available
from efficient_lm.parallel.sharding import wait_on_cpu
from efficient_lm.weights import observed
from efficient_lm.weights.rotated import innermost, within
from efficient_lm.weights.weight import Weight

EMPTY = 'calibration has no data: the iterator of batches is empty'


def first_batches(batches, sequences: int) -> list[dict]:
  """As many batches as hold `sequences` rows, the last one whole. Raises IncompatibleError if there are none or too few, and
  for more than memory holds."""
  kept, count = [], 0
  for batch in batches:
    needed = tree.num_bytes(batch) // len(batch['inputs_BT']) * sequences
    if needed > available(jax.devices()):
      raise IncompatibleError(f'calibration asks for {sequences} sequences, whose {needed:.2g} bytes no device here holds: '
                              f'lower `sequences`')
    kept.append(batch)
    count += batch['inputs_BT'].shape[0]
    if count >= sequences: return kept
  if not count: raise IncompatibleError(EMPTY)
  raise IncompatibleError(f'calibration asks for {sequences} sequences, but the data has {count}: lower `sequences`')


def num_tokens(batches) -> int:
  """Of all batches, without padding."""
  return sum(int(jnp.sum(batch['segments_BT'] > 0)) for batch in batches)


# ------------------------------------------------------------------ collecting

def watch(model, wanted: dict[str, tuple[str, ...]]):
  """The model with the weights at these paths observed, inside of a rotation where there is one."""
  change = lambda path, weight: weight if path not in wanted else within(
    weight, lambda inner: observed.Observed(inner, wanted[path]))
  return tree.rewrite(model, Weight, change)


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
  inner = {path: innermost(weight) for path, weight in tree.select(watched, Weight)}
  return {path: {name: variable.get_value() for name, variable in weight.statistics.items()}
          for path, weight in inner.items() if isinstance(weight, observed.Observed)}


def join(a: dict[str, dict], b: dict[str, dict]) -> dict[str, dict]:
  """Statistics of two sets of batches as those of both."""
  return {path: {name: observed.joined(name, a[path][name], b[path][name]) for name in a[path]} for path in a}


def check_finite(found: dict[str, dict]) -> dict[str, dict]:
  """What it is given. Raises IncompatibleError for statistics that are not finite: the model overflows on this data."""
  for path, named in found.items():
    for name, value in named.items():
      if not bool(jnp.isfinite(jnp.sum(value))): raise IncompatibleError(f'{path}: its inputs are not finite ({name})')
  return found


# ------------------------------------------------------------------ layer by layer

@dataclasses.dataclass(frozen=True)
class Hidden:
  """Of one batch: the residual stream before a layer, and what attention asks for."""
  x_BTD: Any
  positions_BT: Any
  segments_BT: Any


@jax.jit
def _embedded(model, tokens_BT, positions_BT):
  return model.embedded(tokens_BT, positions_BT)


def embedded(model, batch) -> Hidden:
  """What the first layer reads."""
  x_BTD = _embedded(model, batch['inputs_BT'], batch['positions_BT'])
  return Hidden(x_BTD, batch['positions_BT'], batch['segments_BT'])


def _run(layer, x_BTD, positions_BT, segments_BT):
  x_BTD = jnp.where(segments_BT[..., None] > 0, x_BTD, 0)
  return layer(x_BTD, positions_BT, segments_BT)[0]


_advanced = jax.jit(_run)


@jax.jit
def _of_layer(watched, x_BTD, positions_BT, segments_BT):
  watched = observed.of_real(watched, segments_BT > 0)
  return collect(lambda layer: _run(layer, x_BTD, positions_BT, segments_BT), watched)


def advance(layer, hidden: list[Hidden]) -> list[Hidden]:
  """The hidden states after a layer."""
  after = (wait_on_cpu(_advanced(layer, one.x_BTD, one.positions_BT, one.segments_BT)) for one in hidden)
  return [dataclasses.replace(one, x_BTD=x_BTD) for one, x_BTD in zip(hidden, after)]


def layer_statistics(layer, hidden: list[Hidden], wanted: dict[str, tuple[str, ...]]) -> dict[str, dict]:
  """Of one layer on these hidden states, by path in the layer."""
  watched, found = watch(layer, wanted), None
  for one in hidden:
    new = wait_on_cpu(_of_layer(watched, one.x_BTD, one.positions_BT, one.segments_BT))
    found = new if found is None else join(found, new)
  return check_finite(found)


def layer_by_layer(model, batches, change):
  """The model with each layer replaced by `change(path, layer, hidden) -> (layer, hidden after it)`.

  path: the name of the layer's weights in front of their own ('stacks/0/blocks'), the same for all layers of a stack that
  is scanned, or for those at one place of a repeated pattern. Stacks stay stacks: such layers have to come back with equal
  structure.
  """
  hidden, stacks = [embedded(model, batch) for batch in batches], []
  if not hidden: raise IncompatibleError(EMPTY)
  for i, stack in enumerate(model.stacks):
    changed = []
    for path, layer in layers_of(i, stack):
      layer, hidden = change(path, layer, hidden)
      changed.append(layer)
    stacks.append(_rebuilt(stack, changed))
  model = jax.tree.map(lambda leaf: leaf, model)
  model.stacks = nnx.List(stacks)
  return model


def statistics(model, batches, wanted: dict[str, tuple[str, ...]]) -> dict[str, dict]:
  """Of the weights of a model's layers, as it is: by path, layers of a stack, and experts, as dimensions in front of each
  statistic. `batches` is any iterable of batches, on the mesh if there is one. Raises IncompatibleError if it is empty."""
  hidden, found = [embedded(model, batch) for batch in batches], {}
  if not hidden: raise IncompatibleError(EMPTY)
  for i, stack in enumerate(model.stacks):
    for prefix, layer in layers_of(i, stack):
      own = {path.removeprefix(f'{prefix}/'): names for path, names in wanted.items() if path.startswith(f'{prefix}/')}
      for path, named in (layer_statistics(layer, hidden, own) if own else {}).items():
        found.setdefault(f'{prefix}/{path}', []).append(named)
      hidden = advance(layer, hidden)
  scanned = [f'stacks/{i}/blocks/' for i, stack in enumerate(model.stacks) if not isinstance(stack, transformer.Unrolled)]
  stacked = lambda path, layers: _stacked(layers) if path.startswith(tuple(scanned)) else layers[0]
  return {path: stacked(path, layers) for path, layers in found.items()}


def layers_of(i: int, stack):
  """(path, layer) of each layer of stack number i, in their order."""
  if isinstance(stack, transformer.Stack):
    for j in range(stack.num_layers): yield f'stacks/{i}/blocks', _at(stack.blocks, j)
  elif isinstance(stack, transformer.Repeated):
    for j in range(stack.num_repeats):
      yield from ((f'stacks/{i}/blocks/{place}', _at(block, j)) for place, block in enumerate(stack.blocks))
  else: yield from ((f'stacks/{i}/blocks/{j}', block) for j, block in enumerate(stack.blocks))


@jax.jit
def _at(blocks, i):
  return jax.tree.map(lambda leaf: leaf[i], blocks)


@jax.jit
def _stacked(layers):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def _rebuilt(stack, changed):
  stack = jax.tree.map(lambda leaf: leaf, stack)
  if isinstance(stack, transformer.Stack): stack.blocks = _stacked(changed)
  elif isinstance(stack, transformer.Repeated):
    places = len(stack.blocks)
    stack.blocks = nnx.List([_stacked(changed[place::places]) for place in range(places)])
  else: stack.blocks = nnx.List(changed)
  return stack


# ------------------------------------------------------------------ who reads the same input

def sharing(layer) -> dict[str, str]:
  """For each weight of a layer, the first of those that multiply the very same rows: it is observed for all of them.
  Experts see the rows that they are sent, and share with each other only."""
  found = {path: path for path, _ in tree.select(layer, Weight)}
  axes_of = {path: weight.axes for path, weight in tree.select(layer, Weight)}
  for coupling in couplings(layer):
    for experts in (False, True):
      alike = [path for path in coupling.consumers if axes_of[path].startswith('E') == experts]
      for path in alike: found[path] = alike[0]
  return found


def in_turn(layer, paths) -> list[list[str]]:
  """`paths` in the order in which a layer computes, those together that read the same input. What is unknown comes first."""
  groups = [set(coupling.consumers) for coupling in couplings(layer)]
  rest = [path for path in paths if not any(path in group for group in groups)]
  turns = [rest, *([path for path in paths if path in group] for group in groups)]
  return [turn for turn in turns if turn]
