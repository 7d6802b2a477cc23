"""Pruning of a trained model in one shot, as a stage: score x pattern x allocation.

  PruneOnce(sparsity=0.5)                                     the smallest magnitudes of each matrix
  PruneOnce(sparsity=0.5, score=Wanda(), allocation=Owl())    weights times activations, more in layers that bear it
  PruneOnce(pattern=NofM(n=2, m=4), score=SparseGpt())        2:4 by the optimal brain surgeon
"""
import dataclasses
from typing import Any

from efficient_lm.compression.allocation import Allocation, Uniform
from efficient_lm.compression.patterns import Blocks, NofM, PerMatrix, PerOutput, SparsityPattern
from efficient_lm.compression.rules import LAYERS, check_pattern
from efficient_lm.compression.scores import Magnitude, Score
from efficient_lm.models.added import added

COST = 'zeros are multiplied as all numbers are, and Pack() stores the model without them'
__all__ = ['Blocks', 'NofM', 'PerMatrix', 'PerOutput', 'PruneOnce']


@dataclasses.dataclass(kw_only=True)
class PruneOnce:
  """Masks the entries of the weights whose path matches `where` that the `score` takes for the least: in a `pattern` (None:
  among those that the score compares), so many that `sparsity` of all are zero (N:M says it itself), shared out by an
  `allocation`. Each layer and each expert is a matrix by itself. Scores that ask for text are calibrated on `sequences` of
  the training distribution, rounded up to whole batches; a matrix that saw fewer than `least_tokens` of their tokens, as an
  unpopular expert may, is pruned by magnitude, and named in the notes. A mask that is there stays in force: its zeros
  count."""
  sparsity: float | None = None
  pattern: Any = None
  where: str = LAYERS
  score: Any = added(make=Magnitude)
  allocation: Any = added(make=Uniform)
  sequences: int = added(128)
  least_tokens: int = added(64)

  def check(self):
    yield from check_pattern(self, 'where')
    parts = (('score', self.score, Score, 'a score, such as Magnitude() or Wanda()'),
             ('pattern', self.compared, SparsityPattern, 'a sparsity pattern, such as NofM() or PerOutput()'),
             ('allocation', self.allocation, Allocation, 'an allocation, such as Uniform() or Owl()'))
    wrong = [(name, value, f'must be {what}') for name, value, kind, what in parts if not isinstance(value, kind)]
    yield from wrong
    if wrong: return
    if not self.score.of_entries:
      yield 'score', self.score, 'ranks whole heads, units, layers or experts, or by steps of a training: choose another'
      return
    for fix in self.compared.problems(self.sparsity): yield 'sparsity', self.sparsity, fix
    if self.sequences < 1: yield 'sequences', self.sequences, 'must be at least 1'
    if self.least_tokens < 0: yield 'least_tokens', self.least_tokens, 'must be 0 or more'
    if not self.compared.free and not self.allocation.uniform:
      yield 'allocation', self.allocation, f'{self.compared} is the same share for every matrix: leave it out'
    if self.allocation.compares and self.score.updates:
      yield 'allocation', self.allocation, (f'{type(self.score).__name__}() has its scores as it goes, and none of all '
                                            'matrices at once: choose Uniform(), Erk() or Owl()')
    if self.allocation.compares and isinstance(self.compared, PerOutput):
      yield 'allocation', self.allocation, 'compares all matrices, and PerOutput() no two outputs: give pattern=PerMatrix()'

  @property
  def compared(self):
    """The pattern, the score's own where none is asked for."""
    return getattr(self.score, 'pattern', None) if self.pattern is None else self.pattern

  @property
  def recipe(self):
    from efficient_lm.compression.pruning import Recipe
    return Recipe(self.where, self.score, self.compared, self.compared.share(self.sparsity), self.allocation,
                  self.least_tokens)

  @property
  def across_processes(self) -> bool:
    """Several processes may perform it together where it asks for no text, draws nothing and compares no matrices."""
    needs = self.score.needs or self.score.gradient or self.score.drawn
    return not (needs or self.allocation.needs or self.allocation.compares)

  def __call__(self, model, context):
    import jax

    from efficient_lm.compression import calibration, search
    from efficient_lm.compression.coverage import coverage
    from efficient_lm.parallel.sharding import shardings
    recipe = self.recipe
    share = f'{recipe.sparsity:.0%}' if self.compared.free else str(self.compared)
    name = type(self.score).__name__.lower() if isinstance(self.score, Magnitude) else type(self.score).__name__
    note = f'{coverage(model, self.where).describe(f"PruneOnce ({share}, {name})")}; {COST}'
    jax.eval_shape(self.abstract, model)
    if not recipe.calibrated:
      pruned, notes = recipe(model, [], getattr(context, 'key', None))
      return pruned, (note, *notes)
    batches = calibration.first_batches(context.batches(self.sequences), self.sequences)
    pruned, notes = recipe(model, batches, context.key)
    notes.append(search.divergence_note(recipe.prepared(model), pruned, batches[:1]))
    if context.mesh is not None: pruned = jax.device_put(pruned, shardings(pruned, context.mesh))
    return pruned, (note, *notes)

  def abstract(self, model):
    """The masked model; of shapes, its shapes."""
    return self.recipe.abstract(model)
