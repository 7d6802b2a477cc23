"""Matrices in the order in which a CPU multiplies few rows by them, and those products.

XLA:CPU fuses the product of a single row with what widens the matrix if three things hold: it is written `x @ w.T` with
the outputs of w first; what a loop over the inputs reads lies together; and no other product reads the same codes. So codes
of 4 or 2 bits are kept in `parts` (`ops.packing`): the product is the sum over parts of contiguous inputs, and a barrier
between two parts keeps XLA from merging them, after which it would store the widened matrix. Milliseconds of processor time
(2 cores of an AMD EPYC that others kept busy, weights larger than the cache, the least of 8 to 12 turns):

  | outputs x inputs, rows | float32 | int8, groups | int4, parts | int4, neighbours | int4, parts merged |
  | 1536 x 576, 1          | 0.23    | 0.07         | 0.09        | 0.22             | 0.64               |
  | 1152 x 3072, 1         | 0.70    | 0.26         | 0.32        | 0.45             | 2.8                |

Several rows, wall-clock milliseconds on the same cores, quiet, both at work, the least of 7 turns:

  | int4, of 4, 8, 16 rows | float32          | 3 blocks         | 6 blocks         | 12 blocks        |
  | 1536 x 576             | 0.15, 0.17, 0.21 | 0.11, 0.13, 0.22 | 0.14, 0.19, 0.27 | 0.14, 0.20, 0.27 |
  | 1152 x 3072            | 0.73, 0.79, 0.97 | 0.32, 0.35, 0.49 | 0.32, 0.39, 0.68 | 0.37, 0.50, 0.69 |

and 49152 x 576 with 8 rows takes 4.8 in float32, 2.6 in 14 blocks, and 5.4 in 256. Hence rows one by one up to FEW_ROWS (two
rows take twice the time of one), and blocks of outputs above, as few as BLOCK allows, whose floats are all that is ever
stored widened. A single block would stand in no loop, and XLA then widens the matrices of many layers at once, into new
memory (1536 x 576: 1 ms). Tried as well for 8 rows and not faster: both parts in one product (concatenated, stacked or
shifted by broadcasting: 1.5 to 4 times as long), vectors of 512 bits, XLA's other libraries for products, and the matrices
that read one input (queries, keys and values; gate and up) joined into one.

Integer products (int8 x int8) have their own path where a whole row shares a scale. A `fori_loop` over rows without a
barrier widens the matrix before the loop (ten times slower); a loop compiles once, unrolled rows compile once each.

E counts stacked matrices; P is the number of parts.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.packing import pack_parts, planes, unpack_parts
from efficient_lm.ops.quantized_matmul.storage import quantize_rows
from efficient_lm.ops.quantized_matmul.xla import integer_product

FEW_ROWS = 2                     # up to this number, rows are multiplied one by one
BLOCK, MIN_BLOCKS = 2 ** 21, 3   # numbers of a block at most (8 MiB in float32), and blocks at least


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PartedMatrix:
  """w_OI = (q_OI - zero) * scale, or q_OI itself without a scale; perhaps stacked, (E, O, I). See `in_parts`.

  values: floats (..., O, I); int8 (bits 8); or uint8 (..., O, I * bits / 8), packed in parts (bits 4 or 2).
  scale_OQ: float32, for Q groups of inputs, which do not cross parts unless Q is 1; None for floats.
  zero_OQ: float32, in steps, or None for 0.
  """
  values: jax.Array
  scale_OQ: jax.Array | None = None
  zero_OQ: jax.Array | None = None
  bits: int = dataclasses.field(default=8, metadata={'static': True})

  @property
  def num_parts(self) -> int: return 8 // self.bits

  @property
  def shape(self) -> tuple[int, ...]:
    """(..., O, I)."""
    *lead, O, W = self.values.shape
    return (*lead, O, W * self.num_parts)

  def part(self, p: int):
    """Float32 (..., O, I / P): the matrix of the p-th part of the inputs."""
    return self._widened(planes(self.values, self.bits)[p], p, self.num_parts)

  def dequantize(self):
    """Float32 (..., O, I)."""
    return jnp.concatenate([self.part(p) for p in range(self.num_parts)], axis=-1)

  def rows(self, start, count: int) -> 'PartedMatrix':
    """`count` outputs of a single matrix."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, count), self)

  def at(self, index) -> 'PartedMatrix':
    """One matrix of a stack."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), self)

  def _widened(self, codes, p: int, num_parts: int):
    q = codes.astype(jnp.float32)
    if self.scale_OQ is None: return q
    *lead, O, W = q.shape
    def of_part(x_OQ):
      Q = x_OQ.shape[-1]
      if Q == 1: return x_OQ[..., None]
      return x_OQ[..., Q // num_parts * p:Q // num_parts * (p + 1), None]
    scale, zero = of_part(self.scale_OQ), None if self.zero_OQ is None else of_part(self.zero_OQ)
    q = q.reshape(*lead, O, scale.shape[-2], -1)
    return ((q if zero is None else q - zero) * scale).reshape(*lead, O, W)


def in_parts(codes_OI, scale_OQ, zero_OQ=None, bits: int = 8) -> PartedMatrix:
  """A matrix, or a stack of them, from int8 codes (..., O, I) and from scales and zero points (..., O, Q). Codes of 3 bits
  are kept in 4."""
  bits = 4 if bits == 3 else bits
  I, Q = codes_OI.shape[-1], scale_OQ.shape[-1]
  # A group that crosses parts is cut into groups that do not: 9 groups of 64 in 2 parts of 288 become 18 of 32.
  repeats = 1 if Q == 1 else I // Q // math.gcd(I // Q, I * bits // 8)
  of_parts = lambda x_OQ: None if x_OQ is None else jnp.repeat(x_OQ.astype(jnp.float32), repeats, axis=-1)
  return PartedMatrix(pack_parts(codes_OI, bits), of_parts(scale_OQ), of_parts(zero_OQ), bits)


def codes(w: PartedMatrix):
  """Int8 (..., O, I) of a matrix that is quantized."""
  return unpack_parts(w.values, w.bits)


def reference(x_MI, w: PartedMatrix, activations: str | None = None):
  """y = x @ w^T as its equation."""
  x = x_MI.astype(jnp.float32)
  if activations is not None:
    q_MI, scale_M1 = quantize_rows(x, jnp.dtype(activations))
    x = q_MI.astype(jnp.float32) * scale_M1
  return jnp.matmul(x, w.dequantize().T, precision=lax.Precision.HIGHEST).astype(x_MI.dtype)


def few_rows(x_MI, w: PartedMatrix, activations: str | None = None):
  """Row by row: nothing of the size of the matrix is stored. Each number of the widened matrix is that of `dequantize`."""
  x, scale_M1 = _rounded(x_MI, activations)
  if x.shape[0] == 1: return (_row(x, w) * scale_M1).astype(x_MI.dtype)
  def row(m, y_MO):
    # The barrier ties the matrix to the row, so that XLA does not widen it before the loop.
    x_1I, matrix = lax.optimization_barrier((lax.dynamic_slice_in_dim(x, m, 1), w))
    return lax.dynamic_update_slice_in_dim(y_MO, _row(x_1I, matrix), m, axis=0)
  y_MO = lax.fori_loop(0, x.shape[0], row, jnp.zeros((x.shape[0], w.shape[0]), jnp.float32))
  return (y_MO * scale_M1).astype(x_MI.dtype)


def _row(x_1I, w: PartedMatrix):
  W, y_1O, x_1I = w.values.shape[1], 0, _of_its_own(x_1I)
  for p in range(w.num_parts):
    if p: y_1O, w = lax.optimization_barrier((y_1O, w))
    y_1O += x_1I[:, p * W:(p + 1) * W] @ w.part(p).T
  return y_1O


def _of_its_own(x):
  """x, which XLA then computes once. It would fuse cheap arithmetic before a product, such as the last step of a norm, and
  do it again for each output (twice the time of a whole model); divisions, which this is one of, count as expensive. The
  divisor is 1, but for NaN."""
  return x / jnp.where(jnp.isnan(x), 2., 1.)


def blocks(x_MI, w: PartedMatrix, activations: str | None = None):
  """Widened and multiplied block by block of outputs, MIN_BLOCKS of them at least."""
  x, scale_M1 = _rounded(x_MI, activations)
  O, W = w.values.shape
  def product(w):
    return sum(_outputs_first(w.part(p), x[:, p * W:(p + 1) * W]) for p in range(w.num_parts))
  size = O if w.scale_OQ is None else -(-O // max(MIN_BLOCKS, -(-O * w.shape[1] // BLOCK)))
  if size == O: return (product(w).T * scale_M1).astype(x_MI.dtype)
  def block(i, y_OM):
    start = jnp.minimum(i * size, O - size)   # the last one may compute some outputs again
    return lax.dynamic_update_slice_in_dim(y_OM, product(w.rows(start, size)), start, axis=0)
  # Every number is written. Zeros would depend on nothing, and XLA makes those of all layers of a model at its beginning.
  y_OM = lax.fori_loop(0, -(-O // size), block, jnp.full((O, x.shape[0]), x[0, 0]))
  return (y_OM.T * scale_M1).astype(x_MI.dtype)


def integers(x_MI, w: PartedMatrix, activations: str):
  """Integers are multiplied and summed exactly, and scaled afterwards."""
  q_MI, scale_M1 = quantize_rows(x_MI, jnp.dtype(activations))
  W = w.values.shape[1]
  y_MO = sum(integer_product(q_MI[:, p * W:(p + 1) * W], plane) for p, plane in enumerate(planes(w.values, w.bits)))
  y_MO = y_MO.astype(jnp.float32)
  if w.zero_OQ is not None: y_MO -= jnp.sum(q_MI, axis=-1, keepdims=True, dtype=jnp.int32) * w.zero_OQ.T
  return (y_MO * scale_M1 * w.scale_OQ.T).astype(x_MI.dtype)


def too_many_rows(x_MI, w: PartedMatrix, activations: str | None = None) -> str:
  """Why rows are not multiplied one by one, or ''."""
  return f'{x_MI.shape[0]} rows are more than {FEW_ROWS}' if x_MI.shape[0] > FEW_ROWS else ''


def no_integers(x_MI, w: PartedMatrix, activations: str | None = None) -> str:
  """Why integers cannot be multiplied, or ''."""
  if activations is None: return 'x is not rounded'
  return '' if w.scale_OQ.shape[-1] == 1 else 'inputs of an output do not share a scale'


def _rounded(x_MI, activations: str | None):
  """Float32 rows and what the result is multiplied by."""
  if activations is None: return x_MI.astype(jnp.float32), 1
  q_MI, scale_M1 = quantize_rows(x_MI, jnp.dtype(activations))
  return q_MI.astype(jnp.float32), scale_M1


def _outputs_first(w_OI, x_MI):
  return lax.dot_general(w_OI, x_MI, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
