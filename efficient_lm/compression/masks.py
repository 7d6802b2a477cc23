"""Masks by magnitude while training, and the optimizer that keeps what they prune at exactly zero."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from efficient_lm import tree
from efficient_lm.compression.patterns import lowest
from efficient_lm.errors import IncompatibleError
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.low_rank import Held
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.weight import MASKED_BEFORE, PRUNED_BY, Dense, Weight


class PruneState(NamedTuple):
  """inner: the wrapped optimizer's state; step: updates made, int32; keep: True where a weight lives, None elsewhere."""
  inner: Any
  step: Any
  keep: Any


def magnitude_mask(values, share, letters: str):
  """bool, True where a value is not among the floor(share * size) smallest magnitudes of its own matrix.

  The letters but E are the matrix: each layer and each expert loses the same share. Of equal magnitudes the first go.
  """
  matrix_dims = len(letters.replace('E', ''))
  matrix = values.reshape(*values.shape[:values.ndim - matrix_dims], -1)
  count = jnp.floor(share * matrix.shape[-1]).astype(jnp.int32)
  return ~lowest(jnp.abs(matrix), count).reshape(values.shape)


# ------------------------------------------------------------------ while training

def next_number(model) -> int:
  """A number for a pruning technique, other than those before it."""
  used = {dense.tags.get(PRUNED_BY, -1) for _, dense in tree.select(model, Dense)}
  return max(used, default=-1) + 1


def tagged(weight: Weight, number: int) -> Weight:
  """The weight with its array tagged as pruned by technique `number` of this training. A mask that it has is taken off: its
  zeros are in the array, and stay."""
  if weight.pruned: raise IncompatibleError('is pruned by another technique of the same training')
  if dict(tree.select(weight, Held)): raise IncompatibleError('is frozen by Lora: prune it before or afterwards')
  for _, quantized in tree.select(weight, FakeQuantized):
    if quantized.weights is not None and not quantized.weights.format.has_zero:
      name = quantized.weights.format.name
      raise IncompatibleError(f'{name} has no zero, and what is pruned cannot stay zero: choose Int(…)')
  masked = {PRUNED_BY: number, MASKED_BEFORE: bool(dict(tree.select(weight, Masked)))}
  if masked[MASKED_BEFORE]: weight = tree.rewrite(weight, Masked, lambda _, one: one.cleaned().inner)
  return tree.rewrite(weight, Dense, lambda _, dense: dense.replaced(dense.materialize(), **masked))


def pruned(inner, share_at, redraws, number: int):
  """Projects each update so that parameter plus update is exactly zero wherever the mask is, of arrays tagged `number`.

  After the steps that `redraws` names the masks are drawn anew from the magnitudes, share_at(step) of them zero: selecting
  at each step would cost more than the training. What is zero to begin with stays so.
  """
  inner = optax.with_extra_args_support(inner)

  def masks(params, share, keep=None):
    """For each pruned array a bool array, for each other one None."""
    def of(variable, *old):
      if variable.get_metadata().get(PRUNED_BY) != number: return None
      letters, masked = variable.get_metadata()['axes'], variable.get_metadata()[MASKED_BEFORE]
      if not old: return jax.tree.map(lambda p: p != 0 if masked else jnp.ones(p.shape, bool), variable)
      return jax.tree.map(lambda p, k: k & magnitude_mask(p, share, letters), variable, *old)
    rest = () if keep is None else (keep,)
    return jax.tree.map(of, params, *rest, is_leaf=lambda node: node is None or tree.is_variable(node))

  def init(params):
    return PruneState(inner.init(params), jnp.zeros((), jnp.int32), masks(params, 0.0))

  def update(grads, state, params, **extra):
    updates, inner_state = inner.update(grads, state.inner, params, **extra)
    step = state.step + 1
    moved = jax.tree.map(jnp.add, params, updates)
    keep = lax.cond(redraws(step), lambda: masks(moved, share_at(step), state.keep), lambda: state.keep)
    project = lambda mask, u, p: u if mask is None else jax.tree.map(lambda m, u, p: jnp.where(m, u, -p), mask, u, p)
    updates = jax.tree.map(project, keep, updates, params, is_leaf=lambda node: node is None or tree.is_variable(node))
    return updates, PruneState(inner_state, step, keep)

  return optax.GradientTransformationExtraArgs(init, update)


def masked(model, opt_state):
  """The model with all tagged arrays as Masked weights, by the masks of the optimizer's state; itself if none is tagged."""
  if not any(weight.pruned for _, weight in tree.select(model, Weight)): return model
  keep = {tree.path_name(path): variable for state in _prune_states(opt_state)
          for path, variable in jax.tree_util.tree_leaves_with_path(state.keep, is_leaf=tree.is_variable)}

  def change(path, dense):
    return Masked(dense.untagged(), keep[f'{path}/array'].get_value()) if dense.pruned else dense
  return tree.rewrite(model, Dense, change)


def _prune_states(opt_state):
  """All PruneStates, also those within another."""
  is_state = lambda node: isinstance(node, PruneState)
  for state in filter(is_state, jax.tree.leaves(opt_state, is_leaf=is_state)):
    yield state
    yield from _prune_states(state.inner)
