"""Structured pruning: heads, hidden units, residual channels, layers and experts are taken out of a trained model, which is
smaller and faster from then on, and of the same kind. As a stage, to stand in front of a training that recovers."""
import dataclasses
from typing import Any

from efficient_lm.compression.group_scores import Activations, BlockInfluence, Reap
from efficient_lm.errors import IncompatibleError


@dataclasses.dataclass(kw_only=True)
class Shrink:
  """Leaves what `to` says: a `Shape`, or a `Budget` that finds one. Of each dimension stays what the first of `scores` that
  ranks it says is needed most, all of them read off the whole model; layers and experts each choose for themselves.
  `sequences` of text are read where a score, or a budget with several candidates, asks for text. `merge`: how experts that
  go are joined to those that stay, None: they are dropped."""
  to: Any
  scores: tuple[Any, ...] = (Activations(), BlockInfluence(), Reap())
  sequences: int = 128
  merge: Any = None

  def check(self):
    if not hasattr(self.to, 'resolve'): yield 'to', self.to, 'must be a Shape(…) or a Budget(…)'
    if self.sequences < 1: yield 'sequences', self.sequences, 'must be at least 1'
    for i, score in enumerate(self.scores):
      if not getattr(score, 'kinds', ()):
        yield f'scores[{i}]', score, 'must be a score of groups, such as Activations() or Magnitude()'
    if self.merge is not None and not hasattr(self.merge, 'kept'):
      yield 'merge', self.merge, 'must be a MergeExperts(…), or None: experts are dropped'

  def __call__(self, model, context):
    """The smaller model, and what it has lost."""
    import jax

    from efficient_lm.compression import calibration, dimensions, importance, selection
    shapes = self.to.resolve(model, context.mesh)
    left = [dimensions.counts(model, shape) for shape in shapes]
    if not any(left): return model, ('Shrink: nothing is to be removed',)
    for one in left: dimensions.Removal(model, selection.chosen(model, one, selection.unscored(one)))   # or it refuses
    ranked, batches = self._ranked(left), []
    if len(shapes) > 1 or self.merge or any(score.calibrated for score, _ in ranked):
      batches = calibration.first_batches(context.batches(self.sequences), self.sequences)
    scores = {}
    for i, (score, spaces) in enumerate(ranked):
      scores |= score.score(model, spaces, batches, jax.random.fold_in(context.key, i))
    found, best = {}, None
    for shape, one in zip(shapes, left):
      whole, kept = self._merged(model, selection.chosen(model, one, scores), batches)
      removal = dimensions.Removal(whole, kept)
      smaller = dimensions.removed(whole, removal, context.mesh)
      found[shape] = importance.mean_loss(smaller, batches) if len(shapes) > 1 else None
      if best is None or found[shape] < found[best[0]]: best = shape, removal, smaller
    _, removal, smaller = best
    context.follow(removal.follow)   # masks are cut as the arrays beneath them
    notes = _notes(model, smaller, removal, ranked, batches, found)
    return smaller, (*notes, *self.to.notes(model, smaller, context.mesh))

  def abstract(self, model):
    """The smaller model, from shapes alone. Of several candidates the first: which is taken is known when it has been."""
    import jax

    from efficient_lm.compression import dimensions, selection
    shape = self.to.resolve(model)[0]
    left = dimensions.counts(model, shape)
    self._ranked([left])
    if not left: return model
    kept = selection.chosen(model, left, selection.unscored(left))
    smaller = dimensions.Removal(model, kept)(model)
    dimensions.require_fits(smaller, jax.sharding.get_abstract_mesh())
    return smaller

  def _ranked(self, left) -> list[tuple[Any, list]]:
    """Each score, with the spaces that it ranks. Raises IncompatibleError for one that none does."""
    found = {}
    for space in dict.fromkeys(space for one in left for space in one):
      if space.kind == 'kv_heads': continue   # by their query heads
      first = next((i for i, score in enumerate(self.scores) if space.kind in score.kinds), None)
      if first is None:
        names = ', '.join(type(score).__name__ for score in self.scores) or 'no score'
        raise IncompatibleError(f'{space.kind}: no score ranks them, but {names}: add Magnitude() to scores, say')
      found.setdefault(first, []).append(space)
    return [(self.scores[i], ranks) for i, ranks in found.items()]

  def _merged(self, model, kept, batches):
    """The model with experts joined to those that stay, and which they are; both as they are, where experts are dropped."""
    return (model, kept) if self.merge is None else self.merge.kept(model, kept, batches)


def _notes(model, smaller, removal, ranked, batches, found):
  """Lines on what is left, what chose it, and which layers are gone."""
  from efficient_lm import tree
  from efficient_lm.compression import calibration
  before, after = tree.size(model), tree.size(smaller)
  sizes = {}
  for space, index in removal.kept.items(): sizes.setdefault(space.kind, set()).add(f'{space.size} to {index.shape[-1]}')
  what = ', '.join(f'{kind} {" and ".join(sorted(changes))}' for kind, changes in sizes.items())
  names = ', '.join(type(score).__name__ for score, _ in ranked)
  tokens = f' on {calibration.num_tokens(batches)} tokens' if batches else ''
  yield f'Shrink leaves {after / before:.1%} of {before} parameters: {what}; by {names}{tokens}'
  for space, index in removal.kept.items():
    if space.kind != 'layers': continue
    gone = sorted(set(range(space.size)) - set(map(int, index)))
    yield f'{space.owner}: without its {"repeats" if removal.patterns[space.owner] > 1 else "layers"} {_listed(gone)}'
  if len(found) > 1:
    losses = '; '.join(f'{shape.text}: {loss:.3f}' for shape, loss in found.items())
    yield f'nats a token of the shapes within the budget, before any training: {losses}'


def _listed(numbers: list[int]) -> str:
  return ', '.join(map(str, numbers))
