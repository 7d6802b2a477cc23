"""Magnitude pruning during training, as a wrapper of the optimizer: the mask is its state, the zeros are exact."""
import dataclasses
import re
from typing import Any, NamedTuple

from efficient_lm.lazy import lazy

axes = lazy('efficient_lm.axes')
coverage = lazy('efficient_lm.compression.coverage')
jax = lazy('jax')
jnp = lazy('jax.numpy')
optax = lazy('optax')
tree = lazy('efficient_lm.tree')
weights = lazy('efficient_lm.weights.weight')


@dataclasses.dataclass(kw_only=True)
class Prune:
  """Sets the smallest weights of each matrix (of each layer, of each expert) to zero, a share that grows with the cubic
  schedule of Zhu and Gupta 2017 (eq. 1) from 0 at step `start` to `sparsity` at step `end`; the mask is drawn anew
  every `every` steps, for the last time at `end`, and holds in between and from there on. `sparsity` 0 changes
  nothing."""
  sparsity: float
  start: int
  end: int
  every: int = 10
  where: str = r'stacks/.*/(query|key|value|output|latent|gate|up|down)\w*$'

  touches = 'optimizer'

  def check(self):
    if not 0 <= self.sparsity < 1: yield 'sparsity', self.sparsity, 'must be a share of at least 0 and below 1'
    if self.start < 0: yield 'start', self.start, 'must be 0 or more steps'
    if self.every < 1: yield 'every', self.every, 'must be at least 1 step'
    if self.end <= self.start: yield 'end', self.end, f'must be after start = {self.start}'

  def __call__(self, learner, key):
    paths = {path for path, _ in tree.select(learner.model, weights.Weight, self.where)}
    if not paths: tree.rewrite(learner.model, weights.Weight, lambda _, weight: weight, self.where)   # says what there is
    if self.sparsity == 0: return learner
    note = coverage.coverage(learner.model, self.where).describe(f'Prune ({self.sparsity:.0%})')
    optimizer = pruned(learner.optimizer, self.share, self.redraws, self.where)
    return learner.replace(optimizer=optimizer, notes=(*learner.notes, note))

  def share(self, step):
    """Share of zeros after `step` steps: s * (1 - (1 - t)^3), t from 0 to 1 between start and end."""
    t = jnp.clip((step - self.start) / (self.end - self.start), 0, 1)
    return self.sparsity * (1 - (1 - t) ** 3)

  def redraws(self, step):
    """Whether the mask is drawn anew after `step` steps."""
    due = ((step - self.start) % self.every == 0) | (step == self.end)
    return due & (step > self.start) & (step <= self.end)


class PruneState(NamedTuple):
  """inner: the wrapped optimizer's state; step: updates made, int32; keep: True where a weight lives, None elsewhere."""
  inner: Any
  step: Any
  keep: Any


def pruned(inner, share_at, redraws, where: str):
  """Projects each update so that parameter plus update is exactly zero wherever the mask is.

  After the steps that `redraws` names the mask is drawn anew from the magnitudes, share_at(step) of them zero: sorting
  at each step would cost more than the training.
  """
  inner = optax.with_extra_args_support(inner)

  def masks(params, share):
    """For each pruned array a bool array, for each other one None."""
    def of(path, variable):
      metadata = variable.get_metadata()
      if not ('inputs' in metadata and _reaches(where, tree.path_name(path))): return None
      return jax.tree.map(lambda p: kept(p, share, metadata['axes']), variable)
    return jax.tree_util.tree_map_with_path(of, params, is_leaf=axes.is_variable)

  def init(params):
    return PruneState(inner.init(params), jnp.zeros((), jnp.int32), masks(params, 0.0))

  def update(grads, state, params, **extra):
    updates, inner_state = inner.update(grads, state.inner, params, **extra)
    step = state.step + 1
    moved = jax.tree.map(jnp.add, params, updates)
    keep = jax.lax.cond(redraws(step), lambda: masks(moved, share_at(step)), lambda: state.keep)
    project = lambda mask, u, p: u if mask is None else jax.tree.map(lambda m, u, p: jnp.where(m, u, -p), mask, u, p)
    updates = jax.tree.map(project, keep, updates, params, is_leaf=lambda node: node is None or axes.is_variable(node))
    return updates, PruneState(inner_state, step, keep)

  return optax.GradientTransformationExtraArgs(init, update)


def _reaches(where: str, path: str) -> bool:
  """Whether `where` matches the path of a Weight that holds this array, however deep techniques have nested it."""
  parts = path.split('/')
  return any(re.search(where, '/'.join(parts[:i])) for i in range(1, len(parts) + 1))


def kept(values, share, letters: str):
  """True where a value is not among the floor(share * size) smallest magnitudes of its own matrix.

  The letters but E are the matrix: each layer and each expert loses the same share. Of equal magnitudes the first go.
  """
  matrix_dims = len(letters.replace('E', ''))
  matrix = values.reshape(*values.shape[:values.ndim - matrix_dims], -1)
  rank = jnp.argsort(jnp.argsort(jnp.abs(matrix), axis=-1, stable=True), axis=-1)
  return (rank >= jnp.floor(share * matrix.shape[-1])).reshape(values.shape)
