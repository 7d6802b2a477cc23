"""Rotations by Hadamard matrices: they spread what a few channels carry over many, and cost a few small products.

H of size b, a power of two, is Sylvester's: entries +-1, rows orthogonal. H / sqrt(b) is symmetric and its own inverse. A
dimension that is not a power of two is rotated in blocks of one that divides it.
"""
import jax.numpy as jnp
import numpy as np

from efficient_lm.weights.quantized import Layout
from efficient_lm.weights.weight import Weight, Wrapper

FACTOR = 64   # a larger matrix is the Kronecker product of such, applied one after the other


def block_of(size: int, most: int = 2 ** 30) -> int:
  """The largest power of two that divides `size` and is at most `most`."""
  return min(size & -size, 2 ** (most.bit_length() - 1))


def sylvester(size: int) -> np.ndarray:
  """H of a power of two, float32."""
  H = np.ones((1, 1), np.float32)
  while H.shape[0] < size: H = np.block([[H, H], [H, -H]])
  return H


def hadamard(x, block: int):
  """x (..., K) with each `block` successive numbers rotated; twice is the identity, up to rounding."""
  K = x.shape[-1]
  if block & (block - 1) or K % block: raise ValueError(f'blocks of {block} do not rotate {K} numbers: a power of two that '
                                                        f'divides them is needed')
  factors = []
  while block > FACTOR: factors, block = [*factors, FACTOR], block // FACTOR
  factors.append(block)
  size = np.prod(factors)
  y = x.reshape(*x.shape[:-1], K // size, *factors)
  for i, factor in enumerate(factors):
    turned = jnp.tensordot(y, jnp.asarray(sylvester(factor), x.dtype), (i - len(factors), 0), precision='highest')
    y = jnp.moveaxis(turned, -1, i - len(factors))
  return (y * size ** -.5).astype(x.dtype).reshape(x.shape)


class Rotated(Wrapper):
  """Multiplies rotated inputs: `inner` holds the rotated weight, so that together they are worth what it was before. For
  inputs that nothing before can rotate, such as those of a gated layer's last product (the online rotation of QuaRot,
  Ashkboos et al. 2024, arXiv 2404.00456, section 4)."""

  def __init__(self, inner: Weight, block: int):
    self.inner, self.block = inner, block

  @property
  def kind(self): return f'{self.inner.kind}, inputs rotated'

  def materialize(self):
    layout = Layout.of(self.inner)
    matrix_NK = layout.matrix(self.inner.materialize())
    return layout.array(hadamard(matrix_NK.astype(jnp.float32), self.block).astype(matrix_NK.dtype))

  def rounded(self, x, axes: str): return x   # what is rounded is rotated before

  def narrowed(self, dtype): return Rotated(self.inner.narrowed(dtype), self.block)

  def contract(self, equation, x, dtype=None):
    if not equation.split(',')[0].endswith(self.inputs): return super().contract(equation, x, dtype)
    merged = x.shape[:x.ndim - len(self.inputs)]
    return self.inner.contract(equation, hadamard(x.reshape(*merged, -1), self.block).reshape(x.shape), dtype)

  def contract_grouped(self, x_MD, sizes_E):
    return self.inner.contract_grouped(hadamard(x_MD, self.block), sizes_E)


def within(weight: Weight, change):
  """`change` applied to what a rotation holds, which is what is observed and rounded; to the weight itself without one."""
  return Rotated(within(weight.inner, change), weight.block) if isinstance(weight, Rotated) else change(weight)


def innermost(weight: Weight) -> Weight:
  """What `within` changes."""
  return innermost(weight.inner) if isinstance(weight, Rotated) else weight
