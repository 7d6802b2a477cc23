"""Rotations by Hadamard matrices, which spread what a few channels carry over many and cost a few small products.

H of size b, a power of two, is Sylvester's: entries +-1 and orthogonal rows. H / sqrt(b) is symmetric and its own inverse. A
dimension that is not a power of two is rotated in blocks of one that divides it (QuaRot, Ashkboos et al. 2024, arXiv
2404.00456, section 3).
"""
import jax.numpy as jnp
import numpy as np

FACTOR = 64   # a larger matrix is the Kronecker product of matrices up to this size, applied one after the other


def sylvester(size: int) -> np.ndarray:
  """H, (size, size) float32. Raises ValueError where `size` is not a power of two."""
  if size < 1 or size & (size - 1): raise ValueError(f'a Hadamard matrix of {size} rows: must be a power of two')
  H = np.ones((1, 1), np.float32)
  while H.shape[0] < size: H = np.block([[H, H], [H, -H]])
  return H


def hadamard(x, block: int):
  """x H / sqrt(block) in blocks of `block` successive numbers of the last dimension; twice is the identity, up to rounding.

  Args:
    x: (..., I), float; the result has its dtype, in which the products are computed.
    block: numbers that are rotated together, a power of two that divides I.

  Raises:
    ValueError: `block` is not a power of two, or does not divide I.
  """
  I = x.shape[-1]
  if block < 1 or block & (block - 1) or I % block:
    raise ValueError(f'blocks of {block} do not rotate {I} numbers: a power of two that divides them is needed')
  size, factors = block, []
  while block > FACTOR: factors, block = [*factors, FACTOR], block // FACTOR
  factors.append(block)
  y = x.reshape(*x.shape[:-1], I // size, *factors)
  for i, factor in enumerate(factors):
    product = jnp.tensordot(y, jnp.asarray(sylvester(factor), x.dtype), (i - len(factors), 0), precision='highest')
    y = jnp.moveaxis(product, -1, i - len(factors))
  return (y * jnp.float32(size ** -.5)).astype(x.dtype).reshape(x.shape)
