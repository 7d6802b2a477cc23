"""Masks of a training: the first ones, and what is left of them; `sparse_updates` is the optimizer under which they hold."""
import jax
import jax.numpy as jnp

from efficient_lm import tree
from efficient_lm.compression.patterns import lowest
from efficient_lm.compression.sparse_updates import Parameter, PruneState, moments, shrunk
from efficient_lm.compression.target import Target
from efficient_lm.errors import IncompatibleError
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.invariants import Pattern
from efficient_lm.weights.low_rank import Held, LowRank
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.weight import MASKED_BEFORE, PRUNED_BY, PRUNED_TO, Dense, Weight


def magnitude_mask(values, share, letters: str):
  """bool, True where a value is not among the floor(share * size) smallest magnitudes of its own matrix.

  The letters but E are the matrix: each layer and each expert loses the same share. Of equal magnitudes the first go.
  """
  matrix_dims = len(letters.replace('E', ''))
  matrix = values.reshape(*values.shape[:values.ndim - matrix_dims], -1)
  gone = lowest(jnp.abs(matrix), jnp.floor(share * matrix.shape[-1]).astype(jnp.int32))
  return ~gone.reshape(values.shape)


# ------------------------------------------------------------------ while training

def next_number(model) -> int:
  """A number for a pruning technique, other than those before it."""
  used = {dense.tags.get(PRUNED_BY, -1) for _, dense in tree.select(model, Dense)}
  return max(used, default=-1) + 1


def tagged(weight: Weight, number: int, pattern: Pattern | None = None) -> Weight:
  """The weight with its array tagged as pruned by technique `number` of this training, in the end to `pattern`. A mask that
  it has is taken off: its zeros are in the array, and stay."""
  if weight.pruned: raise IncompatibleError('is pruned by another technique of the same training')
  if dict(tree.select(weight, Held)): raise IncompatibleError('is frozen by Lora: prune it before or afterwards')
  if dict(tree.select(weight, LowRank)): raise IncompatibleError('has an adapter, which no mask would reach: Merge() first')
  for _, quantized in tree.select(weight, FakeQuantized):
    if quantized.weights is not None and not quantized.weights.format.has_zero:
      name = quantized.weights.format.name
      raise IncompatibleError(f'{name} has no zero, and what is pruned cannot stay zero: choose Int(…)')
  masked = {PRUNED_BY: number, MASKED_BEFORE: bool(dict(tree.select(weight, Masked)))}
  if pattern is not None: masked[PRUNED_TO] = pattern
  if masked[MASKED_BEFORE]: weight = tree.rewrite(weight, Masked, lambda _, one: one.cleaned().inner)
  return tree.rewrite(weight, Dense, lambda _, dense: dense.replaced(dense.materialize(), **masked))


def require_whole(weight: Weight):
  """Raises IncompatibleError for a weight with a mask, where zeros are to come back."""
  if dict(tree.select(weight, Masked)):
    raise IncompatibleError('is masked already, and a mask that moves would not keep those zeros: choose Prune(…)')


def started(model, target: Target, number: int, score, key):
  """The model with the arrays that are tagged `number` zero where the first of their masks is, which `score` draws."""
  tagged = {path: one for path, one in tree.select(model, Dense) if one.tags.get(PRUNED_BY) == number}
  of = lambda one: Parameter.of(one.array)

  @jax.jit
  def drawn(arrays):
    moment = moments({path: of(one) for path, one in tagged.items()}, target, 0, key)

    def masked(path, array):
      keep = array != 0 if tagged[path].tags[MASKED_BEFORE] else jnp.ones(array.shape, bool)
      now = moment(path, array, keep=keep)
      return jnp.where(shrunk(now, score.at(now), 1.), array, 0)
    return {path: masked(path, array) for path, array in arrays.items()}

  arrays = drawn({path: one.materialize() for path, one in tagged.items()})
  return tree.rewrite(model, Dense, lambda path, one: one.replaced(arrays[path]) if path in arrays else one)


def masked(model, opt_state):
  """The model with all tagged arrays as Masked weights, by the masks of the optimizer's state; itself if none is tagged."""
  if not any(weight.pruned for _, weight in tree.select(model, Weight)): return model
  keep = {tree.path_name(path): variable for state in _prune_states(opt_state)
          for path, variable in jax.tree_util.tree_leaves_with_path(state.keep, is_leaf=tree.is_variable)}

  def change(path, dense):
    if not dense.pruned: return dense
    return Masked(dense.untagged(), keep[f'{path}/array'].get_value(), dense.tags.get(PRUNED_TO))
  return tree.rewrite(model, Dense, change)


def _prune_states(opt_state):
  """All PruneStates, also those within another."""
  is_state = lambda node: isinstance(node, PruneState)
  for state in filter(is_state, jax.tree.leaves(opt_state, is_leaf=is_state)):
    yield state
    yield from _prune_states(state.inner)
