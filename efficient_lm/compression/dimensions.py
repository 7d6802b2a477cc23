"""The dimensions of a model that can be made smaller, each with all the arrays that share it, and their removal.

`compression.coupling` says which weights hand channels to which. Here the same graph is read the other way: an index of a
dimension is an entry of every array that has the dimension's letter within the module, or modules, that own it, the biases,
masks and norms among them. So a residual channel is a column of the embedding and a row of every projection that reads it; a
key-value head is an entry of keys, values and their biases and norms, and its query heads are entries of queries and output.
What is taken out of all of them together leaves a smaller model of the same kind.
"""
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm import tree
from efficient_lm.compression.coupling import NORMS
from efficient_lm.compression.rewriting import named, require_float
from efficient_lm.compression.shape import Shape, router_of
from efficient_lm.errors import IncompatibleError
from efficient_lm.models.attention import GroupedQueryAttention, LatentAttention
from efficient_lm.models.mlp import FeedForward, PlainFeedForward
from efficient_lm.models.moe.layer import MoE
from efficient_lm.models.transformer import Repeated, Stack, Unrolled
from efficient_lm.parallel.sharding import axes_of, shardings
from efficient_lm.weights import invariants
from efficient_lm.weights.biased import Biased
from efficient_lm.weights.low_precision import LowPrecision
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.weight import Dense, Weight

KNOWN = (Dense, Biased, Masked, LowPrecision)   # weights whose arrays can be cut
# In which order dimensions are taken out of an array: indices of what stays of each expert's units are as many as experts.
ORDER = ('width', 'hidden', 'expert_hidden', 'heads', 'kv_heads', 'experts', 'layers')


@dataclasses.dataclass(frozen=True)
class Space:
  """A dimension that arrays share.

  kind: the size of `Shape` that speaks of it. owner: path of the module whose it is, '' for the residual stream. letter: by
  which arrays have it. size: its indices. lead: dimensions in front, each of whose members has indices of its own: layers of
  a stack, experts. weights: paths of the Weights that have it; others: of other Variables, norms among them.
  """
  kind: str
  owner: str
  letter: str
  size: int
  lead: tuple[int, ...] = ()
  weights: tuple[str, ...] = ()
  others: tuple[str, ...] = ()


def spaces(model) -> list[Space]:
  """All of a model of arrays or of shapes, in the order of computation but for the residual stream, which comes first, and
  layers, which come last."""
  found = [_space(model, 'width', '', 'D', model.embed.shape[-1])]
  for path, layer in tree.select(model, (GroupedQueryAttention, LatentAttention)):
    stack = layer.output.stack
    if isinstance(layer, GroupedQueryAttention):
      found.append(_space(model, 'kv_heads', path, 'K', layer.key.shape[-2], stack))
    found.append(_space(model, 'heads', path, 'N', layer.output.shape[-3], stack))
  for path, layer in tree.select(model, (FeedForward, PlainFeedForward)):
    found.append(_space(model, 'hidden', path, 'F', layer.up.shape[-1], layer.up.stack))
  for path, layer in tree.select(model, MoE):
    stack = layer.router.stack
    found.append(_space(model, 'experts', path, 'E', layer.num_experts, stack, apart=f'{path}/shared/'))
    found.append(_space(model, 'expert_hidden', f'{path}/experts', 'F', layer.experts.up.shape[-1],
                        (*stack, layer.num_experts)))
  for i, stack in enumerate(model.stacks):
    size = stack.num_repeats if isinstance(stack, Repeated) else depth_of(stack)
    found.append(Space('layers', f'stacks/{i}', 'L', size))
  return found


def depth_of(stack) -> int:
  """Layers of a stack of any kind."""
  return len(stack.blocks) if isinstance(stack, Unrolled) else stack.num_layers


def pattern_of(stack) -> int:
  """How many layers go together."""
  return len(stack.blocks) if isinstance(stack, Repeated) else 1


def _space(model, kind: str, owner: str, letter: str, size: int, lead: tuple[int, ...] = (), apart: str = ' ') -> Space:
  inside = lambda path: path.startswith(f'{owner}/' if owner else '') and not path.startswith(apart)
  weights = tuple(path for path, weight in tree.select(model, Weight) if inside(path) and letter in weight.axes)
  others = tuple(path for path, node in _beside(model) if inside(path) and letter in axes_of(node))
  return Space(kind, owner, letter, size, lead, weights, others)


def _beside(model):
  """(path, Variable) of all that no Weight holds."""
  leaf = lambda node: isinstance(node, Weight) or tree.is_variable(node)
  for path, node in jax.tree_util.tree_leaves_with_path(model, is_leaf=leaf):
    if not isinstance(node, Weight) and tree.is_variable(node): yield tree.path_name(path), node


# ------------------------------------------------------------------ how many stay

def counts(model, shape: Shape) -> dict[Space, int]:
  """How many indices stay of each space that a shape makes smaller. Raises IncompatibleError for a size that the model does
  not have, or cannot have."""
  found, by_kind = {}, {}
  for space in spaces(model): by_kind.setdefault(space.kind, []).append(space)
  for name in shape.asked:
    if name not in by_kind: raise IncompatibleError(f'{name}: the model has none')
  for kind in ('width', 'hidden', 'experts', 'expert_hidden'):
    for space in by_kind.get(kind, ()): found[space] = shape.size(kind, space.size)
  groups = {space.owner: space for space in by_kind.get('kv_heads', ())}
  for space in by_kind['heads']:
    group = groups.get(space.owner)
    heads, left = shape.of_heads(space.size, space.size if group is None else group.size, latent=group is None)
    found[space] = heads
    if group is not None: found[group] = left
  patterns = [pattern_of(stack) for stack in model.stacks]
  left = shape.of_stacks([depth_of(stack) for stack in model.stacks], patterns)
  for space, count, pattern in zip(by_kind['layers'], left, patterns): found[space] = count // pattern
  for path, layer in tree.select(model, MoE):
    for space in by_kind['experts']:
      if space.owner == path: router_of(layer.route, space.size, found[space])
  return {space: count for space, count in found.items() if count < space.size}


# ------------------------------------------------------------------ taking the rest away

Take = Callable[[Any, int, Any, tuple[int, ...]], Any]


def _taken(array, dim: int, index, lead: tuple[int, ...]):
  """The entries of a dimension that `index` (*lead, count) names, other ones for each member of the leading dimensions."""
  if not lead: return jnp.take(array, index, axis=dim)
  shape = [*lead, *[1] * (array.ndim - len(lead))]
  shape[dim] = index.shape[-1]
  return jnp.take_along_axis(array, index.reshape(shape), axis=dim)


def _shaped(array, dim: int, index, lead: tuple[int, ...]):
  """What `_taken` makes, as a shape."""
  del lead
  return jax.ShapeDtypeStruct((*array.shape[:dim], index.shape[-1], *array.shape[dim + 1:]), array.dtype)


class Removal:
  """All but some indices of some spaces of a model are taken out of it.

  kept: of each space (*lead, count) indices in ascending order, of layers (count,)."""

  def __init__(self, model, kept: Mapping[Space, Any]):
    self.kept = {space: kept[space] for space in sorted(kept, key=lambda space: ORDER.index(space.kind))}
    self.layers = {space.owner: index for space, index in self.kept.items() if space.kind == 'layers'}
    self.axes = {path: weight.axes for path, weight in tree.select(model, Weight)}
    self.unrolled = {f'stacks/{i}' for i, stack in enumerate(model.stacks) if isinstance(stack, Unrolled)}
    self.patterns = {f'stacks/{i}': pattern_of(stack) for i, stack in enumerate(model.stacks)}
    self.dim = model.embed.shape[-1]
    for space in self.kept:
      for path, weight in tree.select(model, Weight):
        if path in space.weights: named(path, require_removable, weight, space)

  def __call__(self, model):
    """The smaller model, which computes what the whole one does with all that is removed set to zero, but for the epsilon of
    norms over the residual stream (see `rescaled`). Works on shapes under `jax.eval_shape`."""
    model = self._cut(model, _taken)
    model = rescaled(model, self.kept, self.dim)
    return self._settled(model)

  def shapes(self, model):
    """The shapes of that, quickly."""
    model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model)
    return self._settled(self._cut(model, _shaped))

  def _cut(self, model, take: Take):
    def change(path, node):
      if not tree.is_variable(node): return node
      name, axes = tree.path_name(path), axes_of(node)
      for space, index in self.kept.items():
        if not _has(space, name, axes): continue
        node = jax.tree.map(lambda array: take(array, _dim(array, axes, space), index, space.lead), node)
      return node
    return jax.tree_util.tree_map_with_path(change, model, is_leaf=tree.is_variable)

  def _settled(self, model):
    """With what modules say of sizes beside their arrays."""
    stacks = [self._stack(f'stacks/{i}', stack) for i, stack in enumerate(model.stacks)]
    model = jax.tree.map(lambda leaf: leaf, model)
    model.stacks = nnx.List([stack for stack in stacks if stack is not None])
    if _scales_by_width(model, self.dim): model.embed_scale = math.sqrt(model.embed.shape[-1])
    model = _changed(model, GroupedQueryAttention, _attention)
    return _changed(model, MoE, _mixture)

  def _stack(self, path: str, stack):
    index = self.layers.get(path)
    if index is None: return stack
    if not len(index): return None
    stack = jax.tree.map(lambda leaf: leaf, stack)
    if isinstance(stack, Unrolled):
      stack.blocks = nnx.List([stack.blocks[int(i)] for i in index])
      return stack
    cut = lambda leaf: (jax.ShapeDtypeStruct((len(index), *leaf.shape[1:]), leaf.dtype)
                        if isinstance(leaf, jax.ShapeDtypeStruct) else leaf[jnp.asarray(index)])
    stack.blocks = jax.tree.map(cut, stack.blocks)
    if isinstance(stack, Repeated): stack.num_repeats = len(index)
    elif isinstance(stack, Stack): stack.num_layers = len(index)
    return stack

  def follow(self, promised: dict[str, tuple]) -> dict[str, tuple]:
    """What was promised of the whole model's weights, of those that are left."""
    found = {}
    for path, ones in promised.items():
      if (new := self._moved(path)) is not None: found[new] = tuple(self._followed(path, one) for one in ones)
    return found

  def _followed(self, path: str, one):
    if isinstance(one, invariants.Experts):
      left = [index.shape[-1] for space, index in self.kept.items() if space.kind == 'experts' and path in space.weights]
      return invariants.Experts(left[0]) if left else one
    if not isinstance(one, invariants.Zeros): return one
    keep, axes = one.keep, self.axes[path]
    for space, index in self.kept.items():
      if path in space.weights: keep = _taken(keep, _dim(keep, axes, space), index, space.lead)
    layers = self.layers.get('/'.join(path.split('/')[:2]))
    return invariants.Zeros(keep if layers is None or keep.ndim == len(axes) else keep[jnp.asarray(layers)])

  def _moved(self, path: str) -> str | None:
    """Where a weight is once layers are gone; None: nowhere."""
    words = path.split('/')
    if words[0] != 'stacks': return path
    gone = [int(owner.split('/')[1]) for owner, index in self.layers.items() if not len(index)]
    owner, number = '/'.join(words[:2]), int(words[1])
    if number in gone: return None
    if owner in self.layers and owner in self.unrolled:
      left = [int(i) for i in self.layers[owner]]
      if int(words[3]) not in left: return None
      words[3] = str(left.index(int(words[3])))
    words[1] = str(number - sum(one < number for one in gone))
    return '/'.join(words)


def removed(model, removal: Removal, mesh=None):
  """The smaller model, laid out over the mesh as a model of its shapes is."""
  smaller = removal(model)
  return smaller if mesh is None else jax.device_put(smaller, shardings(smaller, mesh))


def require_fits(model, mesh):
  """Raises IncompatibleError for sizes that the mesh cannot cut, as a config is refused that asks for such a model."""
  if mesh.empty: return
  for axis, kinds in (('expert', ('experts',)), ('tensor', ('heads', 'hidden', 'expert_hidden'))):
    shards = mesh.shape.get(axis, 1)
    for space in spaces(model):
      if space.kind in kinds and space.size % shards:
        raise IncompatibleError(f'{space.owner}: {space.kind} = {space.size} are left, which mesh.{axis} = {shards} does '
                                f'not divide')


def require_removable(weight: Weight, space: Space):
  """Raises IncompatibleError for a weight that indices of the space cannot be taken out of."""
  require_float(weight)
  inner = weight
  while True:
    if not isinstance(inner, KNOWN): raise IncompatibleError(f'is a {type(inner).__name__}: remove dimensions before that')
    if isinstance(inner, Masked) and inner.pattern is not None and space.letter in inner.inputs:
      raise IncompatibleError(f'has {inner.pattern} along its inputs, which would not stay: remove dimensions before that')
    if not hasattr(inner, 'inner'): return
    inner = inner.inner


def _has(space: Space, path: str, axes: str) -> bool:
  if space.letter not in axes: return False
  return path in space.others or any(path.startswith(f'{weight}/') for weight in space.weights)


def _dim(array, axes: str, space: Space) -> int:
  return array.ndim - len(axes) + axes.index(space.letter)


def _changed(model, kind: type, change):
  is_kind = lambda node: isinstance(node, kind)
  return jax.tree.map(lambda node: change(jax.tree.map(lambda leaf: leaf, node)) if is_kind(node) else node, model,
                      is_leaf=is_kind)


def _attention(layer: GroupedQueryAttention) -> GroupedQueryAttention:
  layer.cache_shape = tuple(layer.key.shape[-2:])
  return layer


def _mixture(layer: MoE) -> MoE:
  left = layer.router.shape[-1]
  layer.route, layer.num_experts = router_of(layer.route, layer.num_experts, left), left
  return layer


# ------------------------------------------------------------------ norms see fewer numbers

def rescaled(model, kept: Mapping[Space, Any], dim: int):
  """The model, whose arrays have been cut, with the scales of norms over removed dimensions multiplied by sqrt(D / D').

  Where channels are zero, a norm still divides by the mean square over all D of them; where they are gone, by that over D',
  which is D / D' times as large. So a norm with this factor gives what it gave, but for its epsilon, which weighs D' / D as
  much. A LayerNorm does so where what is left sums to zero; else it subtracts another mean, and no scale makes up for it.
  (Minitron, arXiv 2407.14679, leaves the scales as they are.) An embedding that is multiplied by sqrt(D), as Gemma's, is
  multiplied by sqrt(D') from here on, and its array makes up for that."""
  for space, index in kept.items():
    if space.kind not in ('width', 'heads', 'kv_heads'): continue
    factor = math.sqrt(space.size / index.shape[-1])
    change = functools.partial(_with_scale, space=space, factor=factor)
    model = jax.tree_util.tree_map_with_path(change, model, is_leaf=lambda node: isinstance(node, NORMS))
  if _scales_by_width(model, dim): model = _embedded_wider(model, dim)
  return model


def _with_scale(path, node, *, space: Space, factor: float):
  if not isinstance(node, NORMS) or f'{tree.path_name(path)}/scale' not in space.others: return node
  node = jax.tree.map(lambda leaf: leaf, node)
  node.scale = jax.tree.map(lambda scale: scale * factor, node.scale)
  return node


def _scales_by_width(model, dim: int) -> bool:
  return model.embed_scale != 1 and model.embed_scale == math.sqrt(dim) and model.embed.shape[-1] != dim


def _embedded_wider(model, dim: int):
  """With an embedding multiplied by what its scale is to lose; a head that is the same array reads less of the last norm."""
  factor = math.sqrt(dim / model.embed.shape[-1])
  times = lambda node, factor: jax.tree.map(lambda array: array * factor, node)
  model = jax.tree.map(lambda leaf: leaf, model)
  is_param = lambda node: isinstance(node, nnx.Param)
  model.embed = jax.tree.map(lambda node: times(node, factor) if is_param(node) else node, model.embed, is_leaf=is_param)
  if model.own_head is None:
    model.norm = jax.tree.map(lambda leaf: leaf, model.norm)
    model.norm.scale = times(model.norm.scale, 1 / factor)
    if getattr(model.norm, 'bias', None) is not None: model.norm.bias = times(model.norm.bias, 1 / factor)
  return model
