"""The product of a quantized matrix in plain JAX: the number of bits decides what is multiplied, one product a plane.

Rounded activations and one scale an output: the product of integers is exact in int32 (of float8, accumulated in float32),
and scales are applied to the result. All else: each plane is dequantised to the dtype of x and multiplied in floating
point, which is exact work saved in no other way without a kernel.
"""
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops import dispatch
from efficient_lm.ops.quantized_matmul.storage import FLOAT8, QuantizedMatrix, dequantize, planes, quantize_rows

FEW_ROWS = 64   # up to here XLA:CPU multiplies integers faster with the weight on the left


def quantized_matmul(x_MK, w: QuantizedMatrix, activations: str | None = None):
  """See the API."""
  if activations is None: return _float(x_MK, w).astype(x_MK.dtype)
  q_MK, scale_M1 = quantize_rows(x_MK, jnp.dtype(activations))
  if w.group != w.shape[1]: return (_float(q_MK.astype(x_MK.dtype), w) * scale_M1).astype(x_MK.dtype)
  y_MN = sum(_integer(part, plane) for part, plane in zip(split(q_MK, w.bits), planes(w.values, w.bits)))
  y_MN = y_MN.astype(jnp.float32)
  if w.zero_QN is not None: y_MN -= jnp.sum(q_MK, axis=-1, keepdims=True, dtype=jnp.int32) * w.zero_QN
  return (y_MN * scale_M1 * w.scale_QN).astype(x_MK.dtype)


def input_gradient(g_MN, w: QuantizedMatrix):
  """g @ w in the dtype of g, accumulated in float32: through the dequantised weight, as if rounding were the identity."""
  return jnp.matmul(g_MN, dequantize(w, g_MN.dtype), preferred_element_type=jnp.float32).astype(g_MN.dtype)


def split(x_MK, bits: int) -> list:
  """The inputs that meet each plane of `planes`."""
  per_byte = 8 // bits
  return [x_MK[:, first::per_byte] for first in range(per_byte)]


def _float(x_MK, w: QuantizedMatrix):
  """Float32 x @ w^T. Scales keep float32 until they have been applied; the weight is then rounded once to x's dtype."""
  y_MN = 0
  for x_part_MK, plane_NK in zip(split(x_MK, w.bits), planes(w.values, w.bits)):
    part = QuantizedMatrix(plane_NK, w.scale_QN, w.zero_QN)   # a plane has as many groups as the whole
    y_MN += _outputs_first(x_part_MK, dequantize(part, x_MK.dtype), jnp.float32)
  return y_MN


def _integer(x_MK, w_NK):
  """x @ w^T of int8 in int32, or of float8 in float32."""
  M, on_cpu = x_MK.shape[0], dispatch.device().platform == 'cpu'
  if x_MK.dtype == FLOAT8:
    # XLA:CPU has no such product; float8 is exact in bfloat16, but float32 is faster there.
    if on_cpu: x_MK, w_NK = x_MK.astype(jnp.float32), w_NK.astype(jnp.float32)
    return _outputs_first(x_MK, w_NK, jnp.float32)
  if not on_cpu or M > FEW_ROWS: return _outputs_first(x_MK, w_NK, jnp.int32)
  # A product with a single column falls into a slow loop (2048 x 2048: 0.9 ms; with two columns 0.3 ms; float32 0.6 ms).
  x_MK = jnp.pad(x_MK, ((0, max(2 - M, 0)), (0, 0)))
  return _outputs_first(w_NK, x_MK, jnp.int32).T[:M]


def _outputs_first(a, b, dtype):
  return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
