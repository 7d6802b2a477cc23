"""TEAL (Liu et al. 2024, arXiv 2408.14690): training-free activation sparsity, as a stage."""
import dataclasses

from efficient_lm.compression.rules import LAYERS, check_pattern


@dataclasses.dataclass(kw_only=True)
class Teal:
  """Zeroes the smallest inputs of each weight whose path matches `where`: those whose magnitude is at most a threshold, one
  a matrix (and layer), below which a share of `sparsity` of its inputs lay in `sequences` of calibration text. Weights keep
  their values, in few bits too. All have one share: the greedy choice of shares by block (section 4.2) is left out.

  It saves time where single sequences are decoded on a CPU, of floats, from a share of `thresholded.WORTH` on; below, zeros
  are multiplied as other numbers. No byte is saved."""
  sparsity: float
  sequences: int = 16
  where: str = LAYERS

  def check(self):
    yield from check_pattern(self, 'where')
    if not 0 < self.sparsity < 1: yield 'sparsity', self.sparsity, 'must be between 0 and 1'
    if self.sequences < 1: yield 'sequences', self.sequences, 'must be at least 1'

  def __call__(self, model, context):
    """The model with thresholds, and a line on what it reaches."""
    from efficient_lm.compression import calibration
    from efficient_lm.compression.coverage import coverage
    batches = calibration.first_batches(context.batches(self.sequences), self.sequences)
    found = calibration.statistics(model, batches, self._wanted(model))
    note = coverage(model, self.where).describe(f'Teal ({self.sparsity:.0%} of inputs)')
    return self._changed(model, found), (f'{note}; {calibration.num_tokens(batches)} tokens of calibration',)

  def abstract(self, model):
    """The same structure, from shapes alone."""
    from efficient_lm.compression import calibration
    return self._changed(model, calibration.unseen(model, self._wanted(model)))

  def _wanted(self, model) -> dict[str, tuple[str, ...]]:
    from efficient_lm import tree
    from efficient_lm.compression import rewriting
    from efficient_lm.errors import IncompatibleError
    from efficient_lm.weights.weight import Weight
    paths = {path for path, _ in tree.select(model, Weight, self.where)}
    for path, weight in tree.select(model, Weight, self.where):
      rewriting.named(path, _refuse, weight)
      if not path.startswith('stacks/'): raise IncompatibleError(f'{path}: calibration sees the weights of layers alone')
    if not paths: rewriting.apply_where(model, self.where, lambda path, weight: weight)   # which says what there is
    return dict.fromkeys(paths, ('histogram', 'count'))

  def _changed(self, model, found):
    from efficient_lm.compression import rewriting
    from efficient_lm.weights.layout import matrix_shape
    from efficient_lm.weights.observed import quantile
    from efficient_lm.weights.thresholded import Thresholded

    def change(path, weight):
      histogram, rows = found[path]['histogram'], found[path]['count'][..., 0]
      zeros = rows * matrix_shape(weight)[1] - histogram.sum(-1)
      return Thresholded(weight, quantile(histogram, zeros, self.sparsity), self.sparsity)
    return rewriting.apply_where(model, self.where, change)


def _refuse(weight):
  """Raises IncompatibleError for what cannot have thresholds of its own."""
  from efficient_lm import tree
  from efficient_lm.errors import IncompatibleError
  from efficient_lm.weights.rotated import Rotated
  from efficient_lm.weights.thresholded import Thresholded
  if dict(tree.select(weight, Thresholded)): raise IncompatibleError('has thresholds already')
  if dict(tree.select(weight, Rotated)): raise IncompatibleError('has rotated inputs: their magnitudes are all alike')
  if weight.axes.startswith('E'): raise IncompatibleError('is stacked by expert: choose `where` without experts')
