"""The product of activations with a frozen quantized matrix: 8, 4 or 2 bits, activations rounded or not."""
import functools

import jax
import jax.numpy as jnp

from efficient_lm.lazy import lazy
from efficient_lm.ops import dispatch, mosaic
from efficient_lm.ops.quantized_matmul import reference, xla
from efficient_lm.ops.quantized_matmul.storage import (
  QuantizedMatrix,
  dequantize,
  pack_int2,
  pack_int4,
  quantize,
  quantize_rows,
  unpack_int2,
  unpack_int4,
)

__all__ = ['QuantizedMatrix', 'dequantize', 'pack_int2', 'pack_int4', 'quantize', 'quantize_rows', 'quantized_matmul',
           'unpack_int2', 'unpack_int4']

pallas_tpu = lazy('efficient_lm.ops.quantized_matmul.pallas_tpu')
pallas_gpu = lazy('efficient_lm.ops.quantized_matmul.pallas_gpu')


def quantized_matmul(x_MK, w: QuantizedMatrix, *, activations: str | None = None, implementation: str = 'auto'):
  """y_MN = x_MK @ w_NK^T, with w_NK = (q_NK - zero) * scale. Differentiable in x; w is frozen, its gradient is zero.

  Args:
    x_MK: floating point.
    w: the matrix, outputs first; see `QuantizedMatrix` for its storage and `quantize` to make one.
    activations: None multiplies x as it is (W8A16, W4A16). 'int8' (W8A8, W4A8, W2A8) or, for a float8 matrix,
      'float8_e4m3fn' first rounds each row of x to a grid that just holds its largest magnitude. The gradient by x is g @ w
      in each case, and that of the plain path beside any kernel.
    implementation: 'auto' or a name of IMPLEMENTATIONS.

  Returns:
    y_MN in the dtype of x, accumulated in int32 (integers times integers) or float32.

  Raises:
    ValueError: shapes or dtypes do not go together.
  """
  if x_MK.shape[1] != w.shape[1]: raise ValueError(f'x has {x_MK.shape[1]} inputs and w {w.shape[1]}: they must be the same')
  if activations is not None:
    wanted = 'float8_e4m3fn' if w.values.dtype == jnp.float8_e4m3fn else 'int8'
    if activations != wanted:
      raise ValueError(f"activations={activations!r} with a matrix of {w.values.dtype}: choose None or {wanted!r}")
  return _product(x_MK, w, activations, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x_MK, w, activations, implementation):
  return dispatch.run('quantized_matmul', IMPLEMENTATIONS, implementation, x_MK, w, activations)


def _forward(x_MK, w, activations, implementation):
  return _product(x_MK, w, activations, implementation), w


def _backward(activations, implementation, w, g_MN):
  gradient = reference.input_gradient if implementation == 'reference' else xla.input_gradient
  return gradient(g_MN, w), None


_product.defvjp(_forward, _backward)

IMPLEMENTATIONS = {
  'pallas_gpu': mosaic.kernel(pallas_gpu, 'quantized_matmul', 'hopper'),
  'pallas_tpu': mosaic.kernel(pallas_tpu, 'quantized_matmul', 'tpu'),
  'xla': dispatch.Implementation(xla.quantized_matmul),
  'reference': dispatch.Implementation(reference.quantized_matmul),
}
