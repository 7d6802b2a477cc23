"""The product of activations with a frozen quantized matrix of 8, 4 or 2 bits. Activations may be rounded too.

Quantized weights (`weights.quantized`) multiply by this product.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops import dispatch, mosaic
from efficient_lm.ops.quantized_matmul import parted as of_parts
from efficient_lm.ops.quantized_matmul import reference, xla
from efficient_lm.ops.quantized_matmul.parted import PartedMatrix, in_parts
from efficient_lm.ops.quantized_matmul.storage import QuantizedMatrix, dequantize, quantize, quantize_rows

__all__ = ['PartedMatrix', 'QuantizedMatrix', 'dequantize', 'in_parts', 'quantize', 'quantize_rows', 'quantized_matmul']


def quantized_matmul(x_MI, w: QuantizedMatrix | PartedMatrix, *, activations: str | None = None,
                     implementation: str = 'auto'):
  """y_MO = x_MI @ w_OI^T, with w_OI = (q_OI - zero) * scale. Differentiable in x; w is frozen, and its gradient is zero.

  Args:
    x_MI: floating point.
    w: the matrix, its outputs first; see `QuantizedMatrix` for its storage and `quantize` to make one. A `PartedMatrix` is
      in the order in which a CPU decodes; it may hold floats, and its implementations are those of PARTED. They are not
      meant to be differentiated.
    activations: None multiplies x as it is (W8A16, W4A16). 'int8' (W8A8, W4A8, W2A8) or, for a float8 matrix,
      'float8_e4m3fn' first rounds each row of x by absmax. The gradient by x is g @ w in each case; there is no kernel for
      it, and plain JAX computes it.
    implementation: 'auto' or a name of IMPLEMENTATIONS, or of PARTED.

  Returns:
    y_MO in the dtype of x, accumulated in int32 (integers times integers) or float32.

  Raises:
    ValueError: x and w have different numbers of inputs, or the dtype of activations does not suit the matrix.
  """
  if x_MI.shape[1] != w.shape[1]: raise ValueError(f'x has {x_MI.shape[1]} inputs and w {w.shape[1]}: they must be the same')
  if activations is not None:
    wanted = 'float8_e4m3fn' if w.values.dtype == jnp.float8_e4m3fn else 'int8'
    if activations != wanted:
      raise ValueError(f"activations={activations!r} with a matrix of {w.values.dtype}: choose None or {wanted!r}")
  if isinstance(w, PartedMatrix):
    # Ties the matrix to the rows: from a loop over tokens, in which it is the same each time, XLA would move its widening to
    # before the loop, and keep all matrices of a model in float32.
    x_MI, w = lax.optimization_barrier((x_MI, w))
    return dispatch.run('quantized_matmul', PARTED, implementation, x_MI, w, activations)
  return _product(x_MI, w, activations, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x_MI, w, activations, implementation):
  return dispatch.run('quantized_matmul', IMPLEMENTATIONS, implementation, x_MI, w, activations)


def _forward(x_MI, w, activations, implementation):
  return _product(x_MI, w, activations, implementation), w


def _backward(activations, implementation, w, g_MO):
  gradient = reference.input_gradient if implementation == 'reference' else xla.input_gradient
  return gradient(g_MO, w), None


_product.defvjp(_forward, _backward)

def _pallas_tpu():
  from efficient_lm.ops.quantized_matmul import pallas_tpu
  return pallas_tpu


def _pallas_gpu():
  from efficient_lm.ops.quantized_matmul import pallas_gpu
  return pallas_gpu


IMPLEMENTATIONS = {
  'pallas_gpu': mosaic.kernel(_pallas_gpu, 'quantized_matmul', 'hopper'),
  'pallas_tpu': mosaic.kernel(_pallas_tpu, 'quantized_matmul', 'tpu'),
  'xla': dispatch.Implementation(xla.quantized_matmul),
  'reference': dispatch.Implementation(reference.quantized_matmul),
}
# What is fastest on a CPU depends on the number of rows: see `parted`.
PARTED = {
  'rows': dispatch.Implementation(of_parts.few_rows, refuses=of_parts.too_many_rows),
  'integers': dispatch.Implementation(of_parts.integers, refuses=of_parts.no_integers),
  'blocks': dispatch.Implementation(of_parts.blocks),
  'reference': dispatch.Implementation(of_parts.reference),
}
