"""Weights whose inputs are rotated by Hadamard matrices (`ops.hadamard`) as they are multiplied."""
import jax.numpy as jnp

from efficient_lm.ops.hadamard import hadamard
from efficient_lm.weights.biased import Biased
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.weight import Weight, Wrapper


def block_of(size: int, most: int = 2 ** 30) -> int:
  """The largest power of two that divides `size` and is at most `most`."""
  return min(size & -size, 2 ** (most.bit_length() - 1))


class Rotated(Wrapper):
  """Multiplies rotated inputs: `inner` holds the rotated weight, so the product is that of the weight before. For inputs
  that nothing before can rotate, such as those of a gated layer's last product (the online rotation of QuaRot, Ashkboos et
  al. 2024, arXiv 2404.00456, section 4)."""

  def __init__(self, inner: Weight, block: int):
    self.inner, self.block = inner, block

  @property
  def kind(self): return f'{self.inner.kind}, inputs rotated'

  def materialize(self):
    layout = Layout.of(self.inner)
    matrix_OI = layout.matrix(self.inner.materialize())
    return layout.array(hadamard(matrix_OI.astype(jnp.float32), self.block).astype(matrix_OI.dtype))

  def prepare_input(self, x, axes: str): return x   # `inner` quantizes what has been rotated

  def cast(self, dtype): return Rotated(self.inner.cast(dtype), self.block)

  def for_decoding(self):
    inner = self.inner.for_decoding()
    return self if inner is self.inner else Rotated(inner, self.block)

  def invariants(self):
    """Those of the rotated matrix are its own: zeros of it are none of the weight's."""
    return tuple(one for one in self.inner.invariants() if one.kind not in ('zeros', 'pattern'))

  def contract(self, equation, x, dtype=None):
    if not equation.split(',')[0].endswith(self.inputs): return super().contract(equation, x, dtype)
    merged = x.shape[:x.ndim - len(self.inputs)]
    return self.inner.contract(equation, hadamard(x.reshape(*merged, -1), self.block).reshape(x.shape), dtype)

  def contract_grouped(self, x_MD, sizes_E):
    return self.inner.contract_grouped(hadamard(x_MD, self.block), sizes_E)


def within(weight: Weight, change):
  """`change` applied to what a bias and a rotation hold, which is what is observed and quantized; to the weight itself
  without them."""
  if isinstance(weight, Biased): return weight.around(lambda inner: within(inner, change))
  return Rotated(within(weight.inner, change), weight.block) if isinstance(weight, Rotated) else change(weight)


def innermost(weight: Weight) -> Weight:
  """What `within` changes."""
  return innermost(weight.inner) if isinstance(weight, (Biased, Rotated)) else weight
