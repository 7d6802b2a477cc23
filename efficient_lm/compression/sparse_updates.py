"""The optimizer under which masks hold exactly, and move: a wrapper of any other one.

What is under a mask is zero after every update, exactly: parameter plus update is 0. A method says when masks are drawn and
how (`techniques.pruning`): it has

  due(step) -> bool          whether the mask is drawn anew after `step` updates
  draw(moment) -> bool array the new mask of one weight; `shrunk` and `exchanged` below are what methods make it of
  score                      of `compression.scores`
  from_start                 whether arrays come with the zeros of their first mask (see `masks.started`)
  sparse_gradients           whether the optimizer sees no gradient of what is under a mask
  grows                      whether weights come back: from zero, and with the optimizer's state of a training's first step
  keeps_dense                whether what is under a mask is kept and trained on, by the gradient at zero (straight-through,
                             Bengio et al. 2013, arXiv 1308.3432): the parameters are the masked weights, the state has the
                             others, which come back as what they have become
"""
import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from efficient_lm.compression.selection import lowest
from efficient_lm.tree import is_variable, path_name
from efficient_lm.weights.layout import Layout, matrix_shape
from efficient_lm.weights.weight import MASKED_BEFORE, PRUNED_BY


class PruneState(NamedTuple):
  """inner: the wrapped optimizer's state, or a Carried with it; step: updates made, int32; keep: True where a weight lives,
  None elsewhere."""
  inner: Any
  step: Any
  keep: Any


class Carried(NamedTuple):
  """inner: the wrapped optimizer's state; memory: what the score remembers of each pruned array; dense: pruned arrays with
  what is under their masks. Both None where a method has none."""
  inner: Any
  memory: Any
  dense: Any


@dataclasses.dataclass(frozen=True)
class Groups:
  """One pruned array as groups of units (see `structures`), and the share of them that is zero in the end."""
  structure: Any
  layout: Layout
  share: float

  def units(self, array, pool=None):
    """(…, U)."""
    return self.structure.units(self.layout, array, pool)

  def spread(self, units, shape):
    """The inverse: an array of that shape."""
    return self.structure.spread(self.layout, units, shape)

  def count(self, ramp, size: int):
    """How many of `size` units are zero when `ramp`, 0 to 1, of those are that will be."""
    return self.structure.count(self.share, ramp, size)


@dataclasses.dataclass(frozen=True)
class Moment:
  """One pruned array when its mask is drawn. keep: the mask so far; values: after the step, before the new mask; gradient:
  that of the step; memory: the score's; key: for this array and step."""
  groups: Groups
  step: Any
  keep: Any
  values: Any
  gradient: Any = None
  memory: Any = None
  key: Any = None


def shrunk(moment: Moment, scores, ramp, free: bool = False):
  """A mask in which `ramp` times the share of each group is gone, those of the lowest scores; what is gone stays so, and
  counts, unless the choice is `free`."""
  units, live = moment.groups.units(scores), moment.groups.units(moment.keep, jnp.any)
  if not free: units = jnp.where(live, units, -jnp.inf)
  keep = ~lowest(units, moment.groups.count(ramp, units.shape[-1]))
  return moment.groups.spread(keep if free else keep & live, moment.values.shape)


def exchanged(moment: Moment, share, growth):
  """A mask of as many as before: of those that live in a group, floor(share * their number) of the smallest magnitudes go,
  and as many of the others, of the highest `growth`, come in their place (Evci et al. 2020, algorithm 1)."""
  live = moment.groups.units(moment.keep, jnp.any)
  count = jnp.floor(share * jnp.sum(live, -1, keepdims=True, dtype=jnp.int32)).astype(jnp.int32)
  size = moment.groups.units(jnp.abs(moment.values).astype(jnp.float32))
  stays = live & ~lowest(jnp.where(live, size, jnp.inf), count)
  rest = lowest(jnp.where(stays, -jnp.inf, moment.groups.units(growth)), live.shape[-1] - count)
  return moment.groups.spread(stays | ~rest, moment.values.shape)


@dataclasses.dataclass(frozen=True)
class Matrices:
  """What a Layout asks of a weight, of the Variable that a parameter is."""
  shape: tuple[int, ...]
  axes: str
  inputs: str

  @classmethod
  def of(cls, variable):
    """Those that a Variable holds."""
    metadata = variable.get_metadata()
    return cls(_array(variable).shape, metadata['axes'], metadata['inputs'])

  @property
  def size(self) -> tuple[int, int, int]:
    """How many matrices, their outputs and inputs."""
    outputs, inputs = matrix_shape(self)
    return math.prod(self.shape) // (outputs * inputs), outputs, inputs


def moments(tagged: dict[str, Matrices], structure, sparsity: float, step, key) -> Callable:
  """made(path, values, **arrays) -> Moment, of one of the arrays that are pruned together."""
  shares = structure.shares(sparsity, {path: one.size for path, one in tagged.items()})

  def made(path, values, **arrays):
    own = None if key is None else jax.random.fold_in(jax.random.fold_in(key, step), zlib.crc32(path.encode()))
    groups = Groups(structure, Layout.of(tagged[path]), shares[path])
    return Moment(groups, step, values=values, key=own, **arrays)
  return made


def masked_updates(inner, method, structure, sparsity: float, number: int, key=None):
  """Wraps `inner` so that masks of arrays tagged `number` hold and are drawn as `method` says."""
  made = _Masked(optax.with_extra_args_support(inner), method, structure, sparsity, number, key)
  return optax.GradientTransformationExtraArgs(made.init, made.update)


@dataclasses.dataclass(frozen=True)
class _Masked:
  inner: Any
  method: Any
  structure: Any
  sparsity: float
  number: int
  key: Any

  def init(self, params):
    method = self.method
    memory = self._each(lambda _, p: method.score.start(_array(p)), params) if method.score.remembers else None
    dense = self._each(lambda _, p: jnp.copy(_array(p)), params) if method.keeps_dense else None
    state = self.inner.init(params)
    if method.score.remembers or method.keeps_dense: state = Carried(state, memory, dense)
    return PruneState(state, jnp.zeros((), jnp.int32), self._first_masks(params))

  def update(self, grads, state, params, **extra):
    method, carried = self.method, isinstance(state.inner, Carried)
    inner_state, memory, dense = state.inner if carried else (state.inner, None, None)
    whole = params if dense is None else _where_given(dense, params)
    seen = _by_mask(lambda keep, g: jnp.where(keep, g, 0), state.keep, grads) if method.sparse_gradients else grads
    updates, inner_state = self.inner.update(seen, inner_state, whole, **extra)
    step, moved = state.step + 1, jax.tree.map(jnp.add, whole, updates)
    if memory is not None:
      remembered = lambda _, p, g, m: method.score.remembered(_array(m), _array(p), _array(g))
      memory = self._each(remembered, whole, grads, memory)

    def drawn():
      keep = self._masks(step, moved, state.keep, grads, *([] if memory is None else [memory]))
      if method.keeps_dense or not method.grows: return keep, inner_state
      return keep, forgotten(inner_state, self.inner.init(params), _grown(state.keep, keep))

    keep, inner_state = lax.cond(method.due(step), drawn, lambda: (state.keep, inner_state))
    if dense is not None: dense = self._each(lambda _, p, old: _array(p).astype(_array(old).dtype), moved, whole)
    inner_state = Carried(inner_state, memory, dense) if carried else inner_state
    return _projected(updates, params, moved, state.keep, keep, method), PruneState(inner_state, step, keep)

  def _first_masks(self, params):
    moment = self._moments(params, 0)

    def of(path, variable):
      array = _array(variable)
      keep = array != 0 if variable.get_metadata()[MASKED_BEFORE] else jnp.ones(array.shape, bool)
      # Zeros are the smallest magnitudes: this finds the mask that the array was given.
      return shrunk(moment(path, array, keep=keep), jnp.abs(array), 1.) if self.method.from_start else keep
    return self._each(of, params)

  def _masks(self, step, moved, keep, grads, *memory):
    moment = self._moments(moved, step)

    def of(path, values, old, gradient, *remembered):
      return self.method.draw(moment(path, _array(values), keep=_array(old), gradient=_array(gradient),
                                     memory=_array(remembered[0]) if remembered else None))
    return self._each(of, moved, keep, grads, *memory)

  def _moments(self, params, step):
    tagged = {path_name(path): Matrices.of(node) for path, node in jax.tree_util.tree_leaves_with_path(
      params, is_leaf=_is_leaf) if self._prunes(node)}
    return moments(tagged, self.structure, self.sparsity, step, self.key)

  def _prunes(self, node) -> bool:
    return is_variable(node) and node.get_metadata().get(PRUNED_BY) == self.number

  def _each(self, function: Callable, params, *rest):
    """function(path, variable, others …), an array, as a variable of its place, for those tagged; None for all others."""
    def visit(path, node, *others):
      if not self._prunes(node): return None
      made = function(path_name(path), node, *others)
      return jax.tree.map(lambda _: made, node)
    return jax.tree_util.tree_map_with_path(visit, params, *rest, is_leaf=_is_leaf)


def _projected(updates, params, moved, old, keep, method):
  """Updates that leave parameters exactly zero under the mask. What comes back starts at zero, or where it was kept."""
  def project(keep, old, u, p, m):
    if keep is None: return u
    if method.keeps_dense: change = lambda k, o, u, p, m: jnp.where(k, jnp.where(o, u, m), -p)
    elif method.grows: change = lambda k, o, u, p, m: jnp.where(k & o, u, -p)
    else: change = lambda k, o, u, p, m: jnp.where(k, u, -p)
    return jax.tree.map(change, keep, old, u, p, m)
  return jax.tree.map(project, keep, old, updates, params, moved, is_leaf=_is_leaf)


def forgotten(state, fresh, grown: dict[str, jax.Array | None]):
  """An optimizer's state that is as the state `fresh` where weights have come back.

  grown: by the path of each parameter, where its weights have; None where none can. Found are all arrays of the parameter's
  shape whose path ends with the parameter's, or with it and one more name, as codes of moments in eight bits do. What else a
  state has, such as sums over rows, stays as it is.
  """
  def change(path, leaf, new):
    names = path_name(path).split('/')
    ends = ('/'.join(names[i:stop]) for i in range(len(names)) for stop in (len(names), len(names) - 1))
    mask = next((grown[end] for end in ends if end in grown), None)   # of two that fit the longer one
    return jax.tree.map(lambda a, b: a if mask is None or a.shape != mask.shape else jnp.where(mask, b, a), leaf, new)
  return jax.tree_util.tree_map_with_path(change, state, fresh, is_leaf=is_variable)


def _grown(old, keep) -> dict[str, jax.Array | None]:
  """Where weights came back, by the path of the parameter."""
  leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda k, o: k & ~o, keep, old), is_leaf=_is_leaf)
  return {path_name(path): None if leaf is None else _array(leaf) for path, leaf in leaves}


# ------------------------------------------------------------------ trees of variables, of which some are pruned

def _is_leaf(node) -> bool: return node is None or is_variable(node)


def _array(variable):
  (array,) = jax.tree.leaves(variable)
  return array


def _by_mask(function: Callable, keep, tree):
  """function(mask, array) for what has a mask; the rest as it is."""
  return jax.tree.map(lambda mask, node: node if mask is None else jax.tree.map(function, mask, node), keep, tree,
                      is_leaf=_is_leaf)


def _where_given(some, others):
  """`some` where it has a variable, `others` elsewhere."""
  return jax.tree.map(lambda one, other: other if one is None else one, some, others, is_leaf=_is_leaf)
