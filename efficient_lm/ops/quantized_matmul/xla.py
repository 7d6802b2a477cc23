"""The product of a quantized matrix in plain JAX: the sum of the products of its planes (`ops.packing`).

With rounded activations and one scale for each output, integers are multiplied and summed exactly in int32 (float8 numbers
in float32), and the scales are applied to the result. Otherwise each plane is dequantized to the dtype of x and multiplied
in floating point; only a kernel could avoid that.
"""
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops import dispatch
from efficient_lm.ops.packing import planes
from efficient_lm.ops.quantized_matmul.storage import FLOAT8, QuantizedMatrix, dequantize, quantize_rows

FEW_ROWS = 64   # Up to this number of rows XLA:CPU multiplies integers faster with the weight as the left operand.


def quantized_matmul(x_MI, w: QuantizedMatrix, activations: str | None = None):
  """See the API."""
  if activations is None: return _float(x_MI, w).astype(x_MI.dtype)
  q_MI, scale_M1 = quantize_rows(x_MI, jnp.dtype(activations))
  if w.group != w.shape[1]: return (_float(q_MI.astype(x_MI.dtype), w) * scale_M1).astype(x_MI.dtype)
  y_MO = sum(integer_product(part, plane) for part, plane in zip(split(q_MI, w.bits), planes(w.values, w.bits)))
  y_MO = y_MO.astype(jnp.float32)
  if w.zero_QO is not None: y_MO -= jnp.sum(q_MI, axis=-1, keepdims=True, dtype=jnp.int32) * w.zero_QO
  return (y_MO * scale_M1 * w.scale_QO).astype(x_MI.dtype)


def input_gradient(g_MO, w: QuantizedMatrix):
  """g @ w in the dtype of g, accumulated in float32, with the dequantized weight: rounding is treated as the identity."""
  return jnp.matmul(g_MO, dequantize(w, g_MO.dtype), preferred_element_type=jnp.float32).astype(g_MO.dtype)


def split(x_MI, bits: int) -> list:
  """The inputs of each plane of `packing.planes`."""
  per_byte = 8 // bits
  return [x_MI[:, first::per_byte] for first in range(per_byte)]


def _float(x_MI, w: QuantizedMatrix):
  """Float32 x @ w^T. Scales are applied in float32, and the weight is then rounded once to the dtype of x."""
  y_MO = 0
  for x_part_MI, plane_OI in zip(split(x_MI, w.bits), planes(w.values, w.bits)):
    part = QuantizedMatrix(plane_OI, w.scale_QO, w.zero_QO)   # a plane has as many groups as the whole
    y_MO += _outputs_first(x_part_MI, dequantize(part, x_MI.dtype), jnp.float32)
  return y_MO


def integer_product(x_MI, w_OI):
  """x @ w^T of int8 in int32, or of float8 in float32."""
  M, here = x_MI.shape[0], dispatch.device()
  if x_MI.dtype == FLOAT8:
    # XLA:CPU has no product of float8 numbers. They are exact in bfloat16 too, but float32 is faster there.
    if here.may_be_cpu: x_MI, w_OI = x_MI.astype(jnp.float32), w_OI.astype(jnp.float32)
    return _outputs_first(x_MI, w_OI, jnp.float32)
  if here.platform != 'cpu' or M > FEW_ROWS: return _outputs_first(x_MI, w_OI, jnp.int32)
  # A product with a single column falls into a slow loop (2048 x 2048: 0.9 ms; with two columns 0.3 ms; float32 0.6 ms).
  x_MI = jnp.pad(x_MI, ((0, max(2 - M, 0)), (0, 0)))
  return _outputs_first(w_OI, x_MI, jnp.int32).T[:M]


def _outputs_first(a, b, dtype):
  return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
