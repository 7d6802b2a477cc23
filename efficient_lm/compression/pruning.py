"""Pruning of a trained model: masks by a score, a pattern and shares, at once or layer after layer."""
import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efficient_lm import tree
from efficient_lm.compression import calibration, hessian, rewriting
from efficient_lm.compression.allocation import Allocation, Matrices
from efficient_lm.compression.coupling import updated
from efficient_lm.compression.gradients import gradients
from efficient_lm.compression.patterns import SparsityPattern
from efficient_lm.compression.scores import Magnitude, Score
from efficient_lm.errors import IncompatibleError
from efficient_lm.models.transformer import Block
from efficient_lm.weights.biased import beneath, unbiased
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.low_precision import LowPrecision
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.rotated import Rotated
from efficient_lm.weights.weight import Dense, Weight

ROWS = 128   # of each matrix, about, that the output error is measured on


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What is pruned, and how: weights whose path matches `where` by a score, in a pattern, with so many zeros, shared out by
  an allocation. A matrix that saw fewer than `least` calibration tokens is pruned by magnitude."""
  where: str
  score: Score
  pattern: SparsityPattern
  sparsity: float
  allocation: Allocation
  least: int = 0

  @property
  def calibrated(self) -> bool:
    """Whether it asks for text."""
    return bool(self.score.needs or self.score.gradient or self.allocation.needs)

  @property
  def layerwise(self) -> bool:
    """Whether a layer is calibrated on what pruned layers before it give: not where all are compared as they were."""
    return bool(self.score.needs) and not self.allocation.compares

  def abstract(self, model):
    """The masked model, of shapes alone under `jax.eval_shape`. Raises IncompatibleError, with its path, for a weight that
    cannot be pruned so."""
    def change(path, weight):
      check_prunable(weight)
      matrices = Matrices.of(weight)
      self.pattern.check_fits(matrices.num_outputs, matrices.num_inputs, self.sparsity)
      if self.calibrated and not self.score.gradient and not path.startswith('stacks/'):
        raise IncompatibleError('is in no layer, and only these are calibrated: prune it by Magnitude(), in another stage')
      return masked(weight, {}, self.sparsity, score=Magnitude(), pattern=self.pattern)
    return rewriting.apply_where(self.prepared(model), self.where, change)

  def prepared(self, model):
    """The model as it will be run, where text is."""
    return rewriting.without_low_precision(model) if self.calibrated else model

  def __call__(self, model, batches, key):
    """The pruned model, and notes. batches: a list, empty where no text is asked for."""
    model = self.prepared(model)
    jax.eval_shape(self.abstract, model)   # refuses what does not fit before anything is calibrated
    found = self.at_once(model, batches, key)
    shares = self.shares(model, found, batches)
    if self.layerwise:
      layers = Layers(self, shares)
      model = calibration.layer_by_layer(model, batches, layers)
      notes = layers.notes(calibration.num_tokens(batches))
    else:
      change = lambda path, weight: masked(weight, found.get(path, {}), shares[path], self.least, score=self.score,
                                           pattern=self.pattern)
      model = rewriting.apply_where(model, self.where, change)
      notes = [f'calibrated on {calibration.num_tokens(batches)} tokens'] if self.calibrated else []
    return model, notes + self.spread(shares)

  # ---------------------------------------------------------------- what is known before anything is pruned

  def at_once(self, model, batches, key) -> dict[str, dict]:
    """Statistics of the model as it is, by path, of what the score wants of it: matrices as their scores have them."""
    paths = selected(model, self.where)
    key_of = lambda path: jax.random.fold_in(key, zlib.crc32(path.encode()))
    found = {path: {'key': key_of(path)} if self.score.drawn else {} for path in paths}
    if self.score.gradient:
      arrays = gradients(model, batches, self.where, self.score.gradient)
      for path, weight in paths.items(): found[path][self.score.gradient] = Layout.of(weight).matrix(arrays[path])
    if self.score.needs and self.allocation.compares:
      for path, named in inputs(model, paths, batches, (*self.score.needs, 'count')).items(): found[path] |= named
    return found

  def shares(self, model, found, batches) -> dict[str, np.ndarray]:
    """Of each matrix, by path: shapes are those in front of the matrices."""
    paths = selected(model, self.where)
    matrices, more = {path: Matrices.of(weight) for path, weight in paths.items()}, {}
    if self.allocation.compares:
      more['candidates'] = {path: _candidates(weight, found[path], score=self.score, pattern=self.pattern)
                            for path, weight in paths.items()}
    if self.allocation.needs:
      more['layers'] = by_layer(model, paths, inputs(model, paths, batches, self.allocation.needs))
    return self.allocation.shares(matrices, self.sparsity, **more)

  def spread(self, shares) -> list[str]:
    """What was allotted, in a line, where it differs."""
    if self.allocation.uniform: return []
    sizes = {path: (float(share.min()), float(share.max())) for path, share in shares.items()}
    least, most = min(sizes, key=lambda path: sizes[path][0]), max(sizes, key=lambda path: sizes[path][1])
    return [f'{type(self.allocation).__name__}: from {sizes[least][0]:.1%} zeros ({least}) to {sizes[most][1]:.1%} ({most})']


class Layers:
  """Prunes one layer after the other, as `calibration.layer_by_layer` brings them, and keeps account.

  gains: by path the squared output error that is left, in parts of what the same zeros leave without an update. fallen:
  matrices that saw too few tokens, as 'path layer.expert'.
  """

  def __init__(self, recipe: Recipe, shares: dict[str, np.ndarray]):
    self.recipe, self.shares, self.done = recipe, shares, {}
    self.gains, self.counts = {}, {}

  def __call__(self, prefix: str, layer, hidden):
    place = self.done[prefix] = self.done.get(prefix, -1) + 1
    weights = {path: weight for path, weight in tree.select(layer, Weight) if f'{prefix}/{path}' in self.shares}
    if not weights: return layer, calibration.advance(layer, hidden)
    first = calibration.sharing(layer)
    wanted = {first[path]: (*self.recipe.score.needs, 'count') for path in weights}
    seen = calibration.layer_statistics(layer, hidden, wanted)
    changes = {path: self.pruned(f'{prefix}/{path}', place, weight, seen[first[path]]) for path, weight in weights.items()}
    layer = updated(layer, changes)
    return layer, calibration.advance(layer, hidden)

  def pruned(self, path: str, place: int, weight: Weight, found: dict):
    share = self.shares[path]
    if share.ndim > weight.axes.startswith('E'): share = share[place]
    new = masked(weight, found, share, self.recipe.least, score=self.recipe.score, pattern=self.recipe.pattern)
    self.counts.setdefault(path, []).append(np.asarray(found['count'])[..., 0])
    if 'gram' in found: self.gains.setdefault(path, []).append(_gain(weight, new, found['gram']))
    return new

  def notes(self, tokens: int) -> list[str]:
    """What the calibration saw, and what it was good for."""
    gains = {path: float(np.mean(jax.device_get(gain))) for path, gain in self.gains.items()}
    helped = ''
    if gains:
      mean, worst = np.mean(list(gains.values())), max(gains, key=gains.get)
      helped = f': output error {mean:.2f} of that of the same zeros and no update, at worst {gains[worst]:.2f} ({worst})'
    few = [f'{path} {".".join(map(str, at))}' for path, counts in self.counts.items()
           for at in np.argwhere(np.stack(counts) < self.recipe.least)]
    fallen = [f'by magnitude, for want of {self.recipe.least} tokens: {", ".join(few)}'] if few else []
    return [f'calibrated on {tokens} tokens{helped}', *fallen]


# ------------------------------------------------------------------ one weight

def check_prunable(weight: Weight):
  """Raises IncompatibleError for a weight that a mask would not suit."""
  rewriting.require_float(weight)
  if dict(tree.select(weight, Rotated)): raise IncompatibleError('has rotated inputs: prune before rotating')


def masked(weight: Weight, found: dict, share, least: int = 0, *, score: Score, pattern: SparsityPattern) -> Weight:
  """A float weight under a mask, `share` of each of its matrices zero; a mask that it has stays in force, and so does a
  bias. Products of low-precision training end here: they were how gradients were computed."""
  def change(inner):
    if isinstance(inner, LowPrecision): return change(inner.inner)
    check_prunable(inner)
    layout, under = Layout.of(inner), isinstance(inner, Masked)
    keep_OI = layout.matrix(inner.keep.get_value()) if under else None
    matrix_OI, keep_OI = _pruned(layout.matrix(inner.materialize()), keep_OI, found, share, least, score=score,
                                 pattern=pattern)
    base, promised = (inner.inner, pattern.promised or inner.pattern) if under else (inner, pattern.promised)
    if score.updates: base = Dense(layout.array(matrix_OI), layout.axes, layout.inputs)
    return Masked(base, layout.array(keep_OI), promised).cleaned()
  return beneath(weight, change)


@functools.partial(jax.jit, static_argnames=('score', 'pattern'))
def _pruned(w_OI, keep_OI, found, share, least, *, score: Score, pattern: SparsityPattern):
  """A matrix and its mask by the score, or by magnitude where too few tokens were seen."""
  def by(score): return score.pruned(w_OI, keep_OI, found, pattern, share)
  if 'count' not in found: matrix_OI, keep_OI = by(score)
  else:
    enough = found['count'][..., None] >= least
    choose = lambda a, b: jnp.where(enough, a, b)
    (scored_OI, keep), plain = by(score), lambda: by(Magnitude())
    matrix_OI, keep_OI = lax.cond(jnp.all(enough), lambda: (scored_OI, keep), lambda: jax.tree.map(
      choose, (scored_OI, keep), jax.tree.map(lambda a, b: a.astype(b.dtype), plain(), (scored_OI, keep))))
  return matrix_OI.astype(w_OI.dtype), keep_OI


@jax.jit
def _gain(weight, new, gram_II):
  """The squared output error that an updated matrix leaves, over that of its mask alone, on some rows."""
  layout = Layout.of(unbiased(weight))
  matrix = lambda array: layout.matrix(array)[..., ::max(1, layout.matrix(array).shape[-2] // ROWS), :].astype(jnp.float32)
  old_OI, new_OI = matrix(weight.materialize()), matrix(new.materialize())
  keep_OI = matrix(unbiased(new).keep.get_value())
  error = lambda made_OI: jnp.sum(hessian.output_error(made_OI - old_OI, gram_II))
  return error(new_OI) / jnp.maximum(error(old_OI * keep_OI), jnp.finfo(jnp.float32).tiny)


# ------------------------------------------------------------------ all weights

def selected(model, where: str) -> dict[str, Weight]:
  """What is pruned, by path, without biases and products of low precision."""
  def plain(weight):
    weight = unbiased(weight)
    return weight.inner if isinstance(weight, LowPrecision) else weight
  return {path: plain(weight) for path, weight in tree.select(model, Weight, where)}


def inputs(model, paths, batches, names: tuple[str, ...]) -> dict[str, dict]:
  """Statistics of the inputs of these weights in the model as it is."""
  first = {f'{prefix}/{path}': f'{prefix}/{other}' for prefix, layer in tree.select(model, Block)
           for path, other in calibration.sharing(layer).items()}
  found = calibration.statistics(model, batches, {first[path]: names for path in paths})
  return {path: found[first[path]] for path in paths}


def by_layer(model, paths, found):
  """Of each layer, by path, its place in its stack (None for one that stands alone) and Wanda's scores."""
  for prefix, _ in tree.select(model, Block):
    own = {path: weight for path, weight in paths.items() if path.startswith(f'{prefix}/')}
    if not own: continue
    stack = next(iter(own.values())).stack
    for place in range(stack[0]) if stack else (None,):
      yield {path: (place, _wanda(*(x if place is None else x[place] for x in (
        Layout.of(weight).matrix(weight.materialize()), found[path]['square'])))) for path, weight in own.items()}


@jax.jit
def _wanda(w_OI, square_I):
  return jnp.abs(w_OI) * jnp.sqrt(square_I)[..., None, :]


@functools.partial(jax.jit, static_argnames=('score', 'pattern'))
def _candidates(weight, found: dict, *, score: Score, pattern: SparsityPattern) -> Any:
  """Scores of what falls together, (..., n), those that an earlier mask has taken first."""
  from efficient_lm.compression.patterns import GONE
  layout = Layout.of(weight)
  score_OI = score.of(layout.matrix(weight.materialize()), found)
  if isinstance(weight, Masked): score_OI = jnp.where(layout.matrix(weight.keep.get_value()), score_OI, GONE)
  candidates = pattern.candidates(score_OI)
  return candidates.reshape(*candidates.shape[:-2], -1)
