"""What scores of importance sum: over weights, gradients, activations, layers and experts. Calibration goes layer by layer,
as `compression.calibration` has it."""
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm import tree
from efficient_lm.compression import calibration
from efficient_lm.compression.coverage import is_multiplied
from efficient_lm.compression.dimensions import Space, depth_of, pattern_of
from efficient_lm.errors import IncompatibleError
from efficient_lm.models.moe.layer import MoE
from efficient_lm.models.moe.rows import sort_rows, take
from efficient_lm.models.transformer import Block, Unrolled
from efficient_lm.parallel.sharding import wait_on_cpu
from efficient_lm.weights.weight import Weight

Scores = dict[Space, np.ndarray]


# ------------------------------------------------------------------ over weights

def touched(model, space: Space) -> list[str]:
  """Paths of the weights that an index of the space is an entry of; of a layer, all that it has."""
  if space.kind != 'layers': return list(space.weights)
  return [path for path, _ in tree.select(model, Weight) if path.startswith(f'{space.owner}/')]


def ending(model, space: Space) -> list[str]:
  """Those by which an index acts: that read it, or, of experts and layers, that they write with."""
  weights = dict(tree.select(model, Weight))
  if space.kind == 'experts': return [path for path in space.weights if path.endswith('/down')]
  if space.kind == 'layers': return [path for path in touched(model, space) if weights[path].axes.endswith('D')]
  tied = model.own_head is None
  return [path for path in space.weights if space.letter in weights[path].inputs and is_multiplied(weights[path], tied)]


def of_weights(model, value: Callable, spaces: Iterable[Space]) -> dict[str, Any]:
  """value(path, weight) of each weight that one of the spaces touches."""
  wanted = {path for space in spaces for path in touched(model, space)}
  return {path: value(path, weight) for path, weight in tree.select(model, Weight) if path in wanted}


def summed(model, space: Space, values: Mapping[str, Any], paths: list[str]) -> np.ndarray:
  """(*lead, size): the sums of what weights at these paths have at each index."""
  axes = {path: weight.axes for path, weight in tree.select(model, Weight)}
  total = np.zeros((*space.lead, space.size))
  for path in paths:
    array = jnp.asarray(values[path], jnp.float32)
    if space.kind == 'layers': total += _by_layer(model, space, path, array)
    else:
      dim = array.ndim - len(axes[path]) + axes[path].index(space.letter)
      rest = tuple(i for i in range(array.ndim) if i >= len(space.lead) and i != dim)
      total += np.asarray(jnp.sum(array, rest))
  return total


def _by_layer(model, space: Space, path: str, array) -> np.ndarray:
  _, number, _, place, *_ = path.split('/')
  if not isinstance(model.stacks[int(number)], Unrolled): return np.asarray(jnp.sum(array.reshape(space.size, -1), -1))
  return np.where(np.arange(space.size) == int(place), float(jnp.sum(array)), 0)


def loss(model, batch):
  """The mean negative log-likelihood of each token given those before it in its document."""
  outputs = model(batch['inputs_BT'], batch['positions_BT'], batch['segments_BT'])
  nll_BT, _ = outputs.head.nll(outputs.hidden_BTD[:, :-1], batch['inputs_BT'][:, 1:])
  segments_BT = batch['segments_BT']
  real_BT = (segments_BT[:, 1:] > 0) & (segments_BT[:, 1:] == segments_BT[:, :-1])
  return jnp.sum(nll_BT * real_BT) / jnp.maximum(jnp.sum(real_BT), 1)


_loss = jax.jit(loss)


def mean_loss(model, batches) -> float:
  """Over batches of equally many tokens, in nats a token."""
  return float(np.mean([float(wait_on_cpu(_loss(model, batch))) for batch in batches]))


@jax.jit
def _products(model, batch):
  """weight * gradient, by path."""
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  gradients = jax.grad(lambda params: loss(nnx.merge(graph, params, rest), batch))(params)
  slopes = dict(tree.select(nnx.merge(graph, gradients, rest), Weight))
  return {path: weight.materialize() * slopes[path].materialize() for path, weight in tree.select(model, Weight)
          if jax.tree.leaves(nnx.state(weight, nnx.Param))}


def taylor(model, spaces: list[Space], batches) -> Scores:
  """See `scores.Taylor`."""
  total: Scores = {}
  for batch in batches:
    products = wait_on_cpu(_products(model, batch))
    for space in spaces:
      total[space] = total.get(space, 0) + np.abs(summed(model, space, products, ending(model, space)))
  if not total: raise IncompatibleError(calibration.EMPTY)
  return total


# ------------------------------------------------------------------ over activations

def activations(model, spaces: list[Space], batches) -> Scores:
  """See `scores.Activations`."""
  wanted, read = {}, {space: _read(model, space) for space in spaces}
  for paths in read.values(): wanted |= {path: ('magnitude',) for path in paths}
  seen, found = calibration.statistics(model, batches, wanted), {}
  for space, paths in read.items():
    # Inputs that are merged, such as heads and their numbers, are summed over what stands behind the index.
    values = [np.asarray(seen[path]['magnitude'], np.float64) for path in paths]
    found[space] = sum(value.reshape(-1, *space.lead, space.size, value.shape[-1] // space.size).sum((0, -1))
                       for value in values)
  return found


def _read(model, space: Space) -> list[str]:
  """Weights whose inputs are the activations of the space, one of those that read the same."""
  if space.kind == 'heads': return [f'{space.owner}/output']
  if space.kind != 'width': return [f'{space.owner}/down']
  found = []
  for prefix, layer in tree.select(model, Block):
    weights, first = dict(tree.select(layer, Weight)), calibration.sharing(layer)
    found += [f'{prefix}/{path}' for path, weight in weights.items()
              if first[path] == path and weight.inputs == 'D' and weight.axes.startswith('D')]
  return found


@jax.jit
def _influence(before_BTD, after_BTD, segments_BT):
  """The sum of 1 - cosine over tokens, and their number."""
  a, b, real_BT = before_BTD.astype(jnp.float32), after_BTD.astype(jnp.float32), segments_BT > 0
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  cosine_BT = jnp.sum(a * b, -1) / jnp.maximum(norms, 1e-30)
  return jnp.sum((1 - cosine_BT) * real_BT), jnp.sum(real_BT)


def block_influence(model, spaces: list[Space], batches) -> Scores:
  """See `scores.BlockInfluence`."""
  hidden, found = [calibration.embedded(model, batch) for batch in batches], {}
  if not hidden: raise IncompatibleError(calibration.EMPTY)
  for i, stack in enumerate(model.stacks):
    each, before = [], hidden
    for number, (_, layer) in enumerate(calibration.layers_of(i, stack), 1):
      hidden = calibration.advance(layer, hidden)
      if number % pattern_of(stack): continue
      pairs = [_influence(one.x_BTD, other.x_BTD, one.segments_BT) for one, other in zip(before, hidden)]
      each.append(float(sum(total for total, _ in pairs)) / max(int(sum(count for _, count in pairs)), 1))
      before = hidden
    assert len(each) * pattern_of(stack) == depth_of(stack)
    found[f'stacks/{i}'] = np.array(each)
  return {space: found[space.owner] for space in spaces}


# ------------------------------------------------------------------ over experts

class Echo(nnx.Module):
  """Stands in place of a feed-forward layer and reports what it is given."""

  def __call__(self, x_BTD, segments_BT=None, cached: bool = False):
    """Zeros, and x_BTD."""
    return jnp.zeros_like(x_BTD), x_BTD


@jax.jit
def _given(layer, x_BTD, positions_BT, segments_BT):
  """x_BTD of the feed-forward layer in a block whose own is an Echo."""
  return layer(jnp.where(segments_BT[..., None] > 0, x_BTD, 0), positions_BT, segments_BT)[1]


def mixture_inputs(layer, hidden: list[calibration.Hidden]) -> list[calibration.Hidden]:
  """What the mixture of a block is given, after its norm."""
  echo = jax.tree.map(lambda leaf: leaf, layer)
  echo.mlp, echo.mlp_out_norm = Echo(), None
  given = (wait_on_cpu(_given(echo, one.x_BTD, one.positions_BT, one.segments_BT)) for one in hidden)
  return [dataclasses.replace(one, x_BTD=x_BTD) for one, x_BTD in zip(hidden, given)]


def of_experts(model, spaces: list[Space], batches, score: Callable, flat: bool = False) -> Scores:
  """score(mixture, x_BTD, segments_BT) -> (sums_E, counts_E), summed over batches: the mean of each expert of each layer,
  or, where counts are None, the sum. flat: sums are of any length, not one for each expert."""
  hidden, found = [calibration.embedded(model, batch) for batch in batches], {}
  if not hidden: raise IncompatibleError(calibration.EMPTY)
  for i, stack in enumerate(model.stacks):
    for prefix, layer in calibration.layers_of(i, stack):
      if isinstance(layer.mlp, MoE):
        pairs = [score(layer.mlp, one.x_BTD, one.segments_BT) for one in mixture_inputs(layer, hidden)]
        sums_E = sum(np.asarray(one, np.float64) for one, _ in pairs)
        if pairs[0][1] is not None: sums_E = sums_E / np.maximum(sum(np.asarray(count) for _, count in pairs), 1)
        found.setdefault(f'{prefix}/mlp', []).append(sums_E)
      hidden = calibration.advance(layer, hidden)
  return {space: np.stack(found[space.owner]).reshape(*space.lead, -1 if flat else space.size) for space in spaces}


@jax.jit
def frequency(mixture: MoE, x_BTD, segments_BT):
  """How many tokens chose each expert."""
  return mixture.routing(x_BTD, segments_BT > 0).rows_by_expert(mixture.num_experts), None


@jax.jit
def reap(mixture: MoE, x_BTD, segments_BT):
  """Sums of gate * |output| over the tokens that chose each expert, and their numbers."""
  chosen, num_experts = mixture.routing(x_BTD, segments_BT > 0), mixture.num_experts
  gate_R = (chosen.gate_BTA if hasattr(chosen, 'gate_BTA') else chosen.gate_BEC).reshape(-1)
  order_R, slot_R, sizes_E = sort_rows(chosen.expert_R, num_experts, chosen.expert_R.size)
  rows_RD = chosen.spread(x_BTD.reshape(-1, x_BTD.shape[-1]), order_R, slot_R)
  norm_R = jnp.linalg.norm(mixture.experts(rows_RD, sizes_E).astype(jnp.float32), axis=-1)
  expert_R = take(chosen.expert_R, order_R)
  return jax.ops.segment_sum(norm_R * take(gate_R, order_R), expert_R, num_experts), sizes_E


@jax.jit
def reconstruction(mixture: MoE, x_BTD, segments_BT):
  """The squared error of the output without each expert, summed over tokens."""
  real_BT, num_experts = segments_BT > 0, mixture.num_experts
  logits_BTE = mixture.router.contract('BTD,DE->BTE', x_BTD.astype(jnp.float32))
  bias_E = None if mixture.load_bias is None else mixture.load_bias.get_value()
  y_BTED = mixture.experts.all(x_BTD).astype(jnp.float32)
  def output(out_E):
    # Low enough never to be chosen; a bias, which groups add to scores, no lower than leaves these their digits.
    bias = None if bias_E is None else jnp.where(out_E, bias_E - 64, bias_E)
    routing = mixture.route(jnp.where(out_E, -1e30, logits_BTE), bias, real_BT)
    return jnp.einsum('BTED,BTE->BTD', y_BTED, routing.dense_gates(num_experts))
  whole_BTD = output(jnp.zeros(num_experts, bool))
  error = lambda e: jnp.sum((output(jnp.arange(num_experts) == e) - whole_BTD) ** 2)
  return jax.lax.map(error, jnp.arange(num_experts)), None


# ------------------------------------------------------------------ over gates

@jax.jit
def _ratios(mixture: MoE, x_BTD, segments_BT):
  """Each gate of a token over its largest, (B, T, A - 1) of all but that; NaN for padding."""
  gate_BTA = jnp.sort(mixture.routing(x_BTD).gate_BTA, -1)
  return jnp.where(segments_BT[..., None] > 0, gate_BTA[..., :-1] / gate_BTA[..., -1:], jnp.nan)


def gate_ratios(model, batches) -> dict[str, np.ndarray]:
  """By path of a mixture, whose layers lie together: a token's gates over its largest, (tokens, A - 1), ascending."""
  hidden, found = [calibration.embedded(model, batch) for batch in batches], {}
  for i, stack in enumerate(model.stacks):
    for prefix, layer in calibration.layers_of(i, stack):
      if isinstance(layer.mlp, MoE) and layer.mlp.route.causal:
        each = [np.asarray(_ratios(layer.mlp, one.x_BTD, one.segments_BT)) for one in mixture_inputs(layer, hidden)]
        found.setdefault(f'{prefix}/mlp', []).extend(one.reshape(-1, one.shape[-1]) for one in each)
      hidden = calibration.advance(layer, hidden)
  real = {path: np.concatenate(each) for path, each in found.items()}
  return {path: ratios[~np.isnan(ratios).any(-1)] for path, ratios in real.items()}


def median(ratios) -> float:
  """Of the smallest gate over the largest; 0 where a token has but one."""
  return float(np.median(ratios[:, 0])) if ratios.size else 0.0


def share_below(ratios, beta: float) -> float:
  """Of all choices, those that are skipped."""
  return float(np.sum(ratios < beta)) / max(len(ratios) * (ratios.shape[-1] + 1), 1)
