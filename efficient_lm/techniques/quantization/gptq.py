"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): quantize column by column, and let the columns that follow make up for
it."""
import dataclasses
from typing import Any

from efficient_lm.compression.method import Method


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Gptq(Method):
  """Quantizes with the Gram matrix of each weight's inputs, of each expert's own (`compression.solver`). `act_order`: most
  active inputs first. `damping`: added to the Hessian's diagonal, in parts of its mean. `block`: columns between two updates
  of all that follow, which changes the speed only. `true_sequential`: within a layer too, each product is calibrated on the
  outputs of quantized ones before it (for a forward pass more for each). `range`: of the scales, None for the format's own.
  Pruned entries stay zero."""
  act_order: bool = True
  damping: float = 0.01
  block: int = 128
  true_sequential: bool = False
  range: Any = None

  needs = ('gram',)

  def check(self):
    if self.damping < 0: yield 'damping', self.damping, 'must be 0 or more'
    if self.block < 1: yield 'block', self.block, 'must be at least 1'

  def encode(self, w_OI, format, statistics, keep_OI=None):
    from efficient_lm.compression.solver import gptq
    return gptq(w_OI, statistics['gram'], format, keep_OI=keep_OI, range=self.range, act_order=self.act_order,
                block=self.block, damping=self.damping)
