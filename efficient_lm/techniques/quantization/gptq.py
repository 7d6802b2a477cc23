"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): quantize column by column, and let the columns that follow make up for
it. With a sparsity, SparseGPT and GPTQ in one pass (Frantar and Alistarh 2023, arXiv 2301.00774, section 3.5)."""
import dataclasses
from typing import Any

from efficient_lm.compression.method import Method
from efficient_lm.compression.patterns import PerMatrix, SparsityPattern
from efficient_lm.errors import IncompatibleError
from efficient_lm.models.added import added


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Gptq(Method):
  """Quantizes with the Gram matrix of each weight's inputs, of each expert's own (`compression.solver`). `act_order`: most
  active inputs first. `damping`: added to the Hessian's diagonal, in parts of its mean. `block`: columns between two updates
  of all that follow, which changes the speed only. `true_sequential`: within a layer too, each product is calibrated on the
  outputs of quantized ones before it (for a forward pass more for each). `range`: of the scales, None for the format's own.
  Pruned entries stay zero. `sparsity`, or a `pattern` that says it, NofM(…): so many entries of each matrix of the layers
  are pruned in the same pass, as SparseGpt() prunes them, before what is left is rounded."""
  act_order: bool = True
  damping: float = 0.01
  block: int = 128
  true_sequential: bool = False
  range: Any = None
  sparsity: float | None = added()
  pattern: Any = added()

  needs = ('gram',)

  @property
  def prunes(self):
    return PerMatrix() if self.pattern is None and self.sparsity is not None else self.pattern

  def check(self):
    if self.damping < 0: yield 'damping', self.damping, 'must be 0 or more'
    if self.block < 1: yield 'block', self.block, 'must be at least 1'
    if self.pattern is not None and not isinstance(self.pattern, SparsityPattern):
      yield 'pattern', self.pattern, 'must be a sparsity pattern, such as NofM() or PerOutput()'
    elif self.prunes is not None:
      for fix in self.prunes.problems(self.sparsity): yield 'sparsity', self.sparsity, fix

  def check_fits(self, weight, format):
    from efficient_lm.weights.layout import matrix_shape
    if self.prunes is None: return
    if format is None: raise IncompatibleError('has no format for its weights to be pruned in: PruneOnce(…) prunes floats')
    if not format.has_zero: raise IncompatibleError(f'{format.name} has no zero, and what is pruned must be: choose Int(…)')
    self.prunes.check_fits(*matrix_shape(weight), self.prunes.share(self.sparsity))

  def encode(self, w_OI, format, statistics, keep_OI=None):
    from efficient_lm.compression.solver import Choice, gptq
    choice = None if self.prunes is None else Choice(self.prunes, self.prunes.share(self.sparsity))
    return gptq(w_OI, statistics['gram'], format, keep_OI=keep_OI, choice=choice, range=self.range, act_order=self.act_order,
                block=self.block, damping=self.damping)

  def without_data(self, w_OI, format, keep_OI=None):
    from efficient_lm.compression.scores import Magnitude
    if self.prunes is None: return super().without_data(w_OI, format)
    _, keep_OI = Magnitude().pruned(w_OI, keep_OI, {}, self.prunes, self.prunes.share(self.sparsity))
    return super().without_data(w_OI * keep_OI, format)
