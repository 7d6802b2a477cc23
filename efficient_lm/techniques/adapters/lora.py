"""LoRA: a model is fine-tuned by thin matrices beside its weights, which stay as they are."""
import dataclasses

from efficient_lm.compression.rules import LAYERS, check_pattern
from efficient_lm.errors import IncompatibleError


@dataclasses.dataclass(kw_only=True)
class Lora:
  """Trains alpha / rank * down @ up beside each weight whose path matches `where`, and nothing else: all other parameters,
  norms, embedding and head too, are frozen while this training goes (Hu et al. 2021, arXiv 2106.09685). At its first step
  the model computes what it did before. The optimizer's state has the size of the adapters.

  What is pruned stays so: an adapter lies under its weight's mask. Beside weights in few bits it is QLoRA (Dettmers et al.
  2023, arXiv 2305.14314). The stage Merge() adds adapters to their weights; without it they stay."""
  rank: int = 8
  alpha: float = 16.0
  where: str = LAYERS

  touches = 'model'

  def check(self):
    yield from check_pattern(self, 'where')
    if self.rank < 1: yield 'rank', self.rank, 'must be at least 1'
    if not self.alpha > 0: yield 'alpha', self.alpha, 'must be positive'

  def __call__(self, learner, key):
    import jax

    from efficient_lm import tree
    from efficient_lm.compression import coverage, rewriting
    from efficient_lm.weights.low_rank import LowRank, held, low_rank
    from efficient_lm.weights.masked import Masked
    from efficient_lm.weights.weight import Weight
    found = dict(tree.select(learner.model, Weight, self.where))
    keys = dict(zip(found, jax.random.split(key, max(len(found), 1))))

    for path, weight in found.items(): rewriting.named(path, _refuse_pruned, weight)

    def adapted(path, weight):
      if isinstance(weight, Masked): return weight.around(lambda inner: adapted(path, inner))
      if dict(tree.select(weight, LowRank)): raise IncompatibleError('has an adapter already: the stage Merge() adds it')
      if weight.axes[0] in 'VT': raise IncompatibleError(f'is looked up: narrow where = {self.where!r}')
      _refuse_large(self.rank, weight)
      return low_rank(weight, self.rank, self.alpha / self.rank, keys[path])

    note = coverage.coverage(learner.model, self.where).describe(f'Lora (rank {self.rank})')
    model = rewriting.apply_where(held(learner.model), self.where, adapted)
    return learner.replace(model=model, notes=(*learner.notes, note))

  def finish(self, model, opt_state):
    """The model with its parameters to be trained again, by whatever follows."""
    from efficient_lm.weights.low_rank import released
    return released(model)


def _refuse_pruned(weight):
  if weight.pruned: raise IncompatibleError('is pruned by another technique of the same training: adapt it in the next one')


def _refuse_large(rank: int, weight):
  from efficient_lm.weights.layout import matrix_shape
  outputs, inputs = matrix_shape(weight)
  if rank >= min(outputs, inputs):
    raise IncompatibleError(f'has {outputs} outputs and {inputs} inputs, and rank = {rank} must be below both')
