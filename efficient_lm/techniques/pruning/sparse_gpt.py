"""SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): what is kept makes up for what goes."""
import dataclasses

from efficient_lm.compression.scores import Score


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class SparseGpt(Score):
  """Prunes column by column with the Gram matrix of each weight's inputs, of each expert's own: the optimal brain surgeon
  (`compression.solver`). Masks are chosen on the way, for `block` columns at once or for every group of an N:M pattern, by
  w^2 / [H^-1]; `damping`: added to the Hessian's diagonal, in parts of its mean; `act_order`: most active inputs first,
  which the paper has not. A layer is calibrated on what pruned layers before it give. To quantize in the same pass:
  Quantize(method=Gptq(sparsity=…))."""
  block: int = 128
  damping: float = 0.01
  act_order: bool = False

  needs, updates = ('gram',), True

  def check(self):
    if self.damping < 0: yield 'damping', self.damping, 'must be 0 or more'
    if self.block < 1: yield 'block', self.block, 'must be at least 1'

  def pruned(self, w_OI, keep_OI, found, pattern, share):
    from efficient_lm.compression.solver import Choice, solve
    return solve(w_OI, found['gram'], keep_OI=keep_OI, choice=Choice(pattern, share), act_order=self.act_order,
                 block=self.block, damping=self.damping)
