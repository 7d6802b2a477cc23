"""Quantization of rows in plain JAX, arranged for XLA: products with a reciprocal, and the Hadamard product as matmuls.

A Hadamard matrix of a power of two is a Kronecker product of smaller ones, H_ab = H_a ⊗ H_b: two products of
about sqrt(n) columns each do 2 sqrt(n) instead of n multiplications a number, and are still products for a matrix unit.
"""
import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.quantize.grid import as_values, hadamard_matrix, step_of

# Blocks up to this are one product.
WHOLE = 64


def quantize(x_MD, *, dtype, norm_D=None, eps: float = 1e-6, hadamard: int | None = None):
  """See the API."""
  y_MD = x_MD.astype(jnp.float32)
  if norm_D is not None:
    y_MD = y_MD * lax.rsqrt(jnp.mean(y_MD * y_MD, axis=-1, keepdims=True) + eps) * norm_D.astype(jnp.float32)
  if hadamard is not None: y_MD = rotate(y_MD, hadamard)
  scale_M1 = step_of(jnp.max(jnp.abs(y_MD), axis=-1, keepdims=True), dtype)
  return as_values(y_MD * (1 / scale_M1), dtype), scale_M1[:, 0]


def rotate(y_MD, size: int):
  """y H / sqrt(size) in blocks of `size`: orthonormal and its own inverse; float32."""
  left = 1 if size <= WHOLE else 2 ** (size.bit_length() // 2)
  right = size // left
  y = y_MD.reshape(-1, left, right)
  precision = jax.lax.Precision.HIGHEST
  y = lax.dot_general(y, jnp.asarray(hadamard_matrix(right) * size ** -.5), (((2,), (0,)), ((), ())), precision=precision)
  if left > 1: y = jnp.einsum('MLR,LP->MPR', y, jnp.asarray(hadamard_matrix(left)), precision=precision)
  return y.reshape(y_MD.shape)
