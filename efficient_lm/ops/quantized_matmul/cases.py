"""Products of quantized matrices on which every implementation must agree, for tests and benchmarks."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops import quantized_matmul as op
from efficient_lm.ops.quantized_matmul import parted as of_parts
from efficient_lm.ops.quantized_matmul import reference
from efficient_lm.ops.quantized_matmul.storage import integers

INT8, FLOAT8 = 'int8', 'float8_e4m3fn'


@dataclasses.dataclass(frozen=True)
class Scheme:
  """How weights and activations are rounded. group: inputs that share a scale, None for all. symmetric: False for zero
  points. parted: whether the matrix is a `PartedMatrix`."""
  bits: int = 8
  group: int | None = None
  activations: str | None = None
  dtype: str = INT8
  symmetric: bool = True
  parted: bool = False


W8A8 = Scheme(activations=INT8)
F8 = Scheme(activations=FLOAT8, dtype=FLOAT8)
W4A8, W2A8 = Scheme(4, activations=INT8), Scheme(2, activations=INT8)
W8A16, W4A16 = Scheme(), Scheme(4, 128)


@dataclasses.dataclass(frozen=True)
class Case:
  """x (rows, inputs) @ w (outputs, inputs)^T; `of` is 'forward', or 'dgrad' for the gradient by x alone."""
  rows: int
  inputs: int
  outputs: int
  scheme: Scheme
  dtype: Any = jnp.float32
  of: str = 'forward'

  def arguments(self):
    """x_MI or, for 'dgrad', g_MO; then values, scale_QO and, if the scheme has zero points, zero_QO."""
    x, w = jax.random.split(jax.random.key(self.rows))
    columns = self.outputs if self.of == 'dgrad' else self.inputs
    x_MI = jax.random.normal(x, (self.rows, columns), self.dtype)
    s = self.scheme
    w_OI = jax.random.normal(w, (self.outputs, self.inputs)) * self.inputs ** -.5
    matrix = op.quantize(w_OI, s.bits, s.group, dtype=jnp.dtype(s.dtype), symmetric=s.symmetric)
    if s.parted:
      zero_OQ = None if s.symmetric else matrix.zero_QO.T
      matrix = op.in_parts(integers(matrix), matrix.scale_QO.T, zero_OQ, s.bits)
    return x_MI, *jax.tree.leaves(matrix)

  def matrix(self, values, scale_QO, zero_QO=None) -> op.QuantizedMatrix | op.PartedMatrix:
    """The weight that `arguments` returns as arrays."""
    if self.scheme.parted: return op.PartedMatrix(values, scale_QO, zero_QO, self.scheme.bits)
    return op.QuantizedMatrix(values, scale_QO, zero_QO, self.scheme.bits)

  def call(self, implementation: str, tiles=None):
    """The pass `of` as a function of `arguments`."""
    def forward(x_MI, *arrays):
      w = self.matrix(*arrays)
      if tiles is not None:
        return op.IMPLEMENTATIONS[implementation].run(x_MI, w, self.scheme.activations, tiles=tiles)
      return op.quantized_matmul(x_MI, w, activations=self.scheme.activations, implementation=implementation)
    def dgrad(g_MO, *arrays):
      if 'pallas' in implementation: raise ValueError(f'{implementation} cannot take this: the gradient is that of xla')
      x_MI = jnp.zeros((self.rows, self.inputs), g_MO.dtype)
      return jax.vjp(lambda x_MI: forward(x_MI, *arrays), x_MI)[1](g_MO)[0]
    return dgrad if self.of == 'dgrad' else forward

  @property
  def flops(self) -> float:
    """2 M I O."""
    return 2 * self.rows * self.inputs * self.outputs

  @property
  def bytes(self) -> float:
    """Each operand is read once, at its stored size, and the result is written once."""
    arrays = jax.eval_shape(self.arguments)
    result = self.rows * (self.inputs if self.of == 'dgrad' else self.outputs) * jnp.dtype(self.dtype).itemsize
    return result + sum(array.size * array.dtype.itemsize for array in arrays)

  @property
  def precision(self) -> str:
    """The dtype of the products, which determines their roofline."""
    rounded = self.of == 'forward' and self.scheme.activations
    return rounded or jnp.dtype(self.dtype).name

  @property
  def tolerance(self) -> float:
    """In float32, sums of at most 2048 products in another order. In bfloat16, x is the same on both sides; the result is
    rounded to 8 bits, and so are dequantized weights, whose errors average out: two roundings of the result together. Where
      a device divides differently, rounded activations may fall on the other side of a step; that is rare, and affects one
      of many terms."""
    if jnp.dtype(self.dtype) == jnp.bfloat16: return 2 ** -7
    return 1e-5

  def baselines(self):
    """What one would write without this operation: the weight is dequantized to the dtype of x and multiplied. Its time
    includes making that weight, unlike that of `unquantized`, which is given one."""
    if self.of == 'dgrad': return {'dequantize, then multiply': self._dequantize_then_multiply}
    found = {'dequantize, then multiply': self._dequantize_then_multiply}
    scheme = self.scheme
    if scheme.bits == 8 and scheme.activations and not scheme.parted: found['round, then dot'] = self._dot_of_converted
    return found

  def unquantized(self):
    """Arguments and function of the product that the quantized one replaces: x and w_OI in the dtype of x."""
    x_MI, *arrays = self.arguments()
    w_OI = self._dequantized(arrays, x_MI.dtype)
    contract = ((1,), (0 if self.of == 'dgrad' else 1,)), ((), ())
    return (x_MI, w_OI), lambda x, w: lax.dot_general(x, w, contract, preferred_element_type=jnp.float32).astype(x.dtype)

  def _dequantize_then_multiply(self, x_MI, *arrays):
    w_OI = self._dequantized(arrays, x_MI.dtype)
    contract = ((1,), (0 if self.of == 'dgrad' else 1,)), ((), ())
    return lax.dot_general(x_MI, w_OI, contract, preferred_element_type=jnp.float32).astype(x_MI.dtype)

  def _dequantized(self, arrays, dtype):
    w = self.matrix(*arrays)
    return w.dequantize().astype(dtype) if self.scheme.parted else op.dequantize(w, dtype)

  def _dot_of_converted(self, x_MI, values, scale_QO):
    q_MI, scale_M1 = op.quantize_rows(x_MI, values.dtype)
    dtype = jnp.int32 if values.dtype == jnp.int8 else jnp.float32
    y_MO = lax.dot_general(q_MI, values, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return (y_MO * scale_M1 * scale_QO).astype(x_MI.dtype)

  def expected(self, x_MI, *arrays):
    """The result of the reference."""
    w = self.matrix(*arrays)
    if self.scheme.parted: return of_parts.reference(x_MI, w, self.scheme.activations)
    if self.of == 'dgrad': return reference.input_gradient(x_MI, w)
    return reference.quantized_matmul(x_MI, w, self.scheme.activations)


CASES = {
  'W8A8': Case(24, 64, 40, W8A8),
  'W8A8 of one row': Case(1, 256, 48, W8A8),
  'W8A8 of many rows': Case(130, 96, 72, W8A8),
  'W8A8 in groups': Case(9, 128, 16, Scheme(8, 32, INT8)),
  'W8A8 with zero points': Case(9, 64, 24, Scheme(8, None, INT8, symmetric=False)),
  'float8': Case(24, 64, 40, F8),
  'float8, bfloat16': Case(7, 64, 40, F8, jnp.bfloat16),
  'W8A16': Case(5, 64, 40, W8A16),
  'W8A16 in groups, bfloat16': Case(5, 128, 24, Scheme(8, 64), jnp.bfloat16),
  'W4A16': Case(16, 256, 32, W4A16),
  'W4A16 in groups of 32': Case(3, 96, 17, Scheme(4, 32)),
  'W4A16 of one row, bfloat16': Case(1, 256, 64, W4A16, jnp.bfloat16),
  'W4A16 with zero points': Case(4, 64, 24, Scheme(4, 32, symmetric=False)),
  'W4A8': Case(6, 64, 24, W4A8),
  'W4A8 with zero points': Case(6, 64, 24, Scheme(4, None, INT8, symmetric=False)),
  'W2A8': Case(6, 64, 24, W2A8),
  'W2A8 in groups': Case(1, 64, 24, Scheme(2, 32, INT8)),
  'W2A16': Case(6, 64, 24, Scheme(2)),
  'one output': Case(3, 8, 1, W8A8),
  'parted W4A16 of one row, groups across parts': Case(1, 192, 24, Scheme(4, 64, parted=True)),
  'parted W4A16 of two rows, zero points': Case(2, 128, 24, Scheme(4, 32, symmetric=False, parted=True)),
  'parted W4A16 in blocks': Case(9, 64, 500, Scheme(4, 32, parted=True)),
  'parted W8A16 in blocks that overlap': Case(3, 64, 263, Scheme(8, None, parted=True)),
  'parted W2A16 of one row, bfloat16': Case(1, 64, 24, Scheme(2, 16, parted=True), jnp.bfloat16),
  'parted W8A8 of one row': Case(1, 64, 24, Scheme(8, None, INT8, parted=True)),
  'parted W4A8 of many rows, zero points': Case(9, 64, 24, Scheme(4, None, INT8, symmetric=False, parted=True)),
  'parted W4A8 in groups': Case(9, 64, 24, Scheme(4, 32, INT8, parted=True)),
  'gradient of W4A16': Case(5, 256, 24, W4A16, of='dgrad'),
  'gradient of W8A8, bfloat16': Case(5, 64, 24, W8A8, jnp.bfloat16, of='dgrad'),
}

# Inputs and outputs of a public model, Llama 3.1 8B, whose query and output projections are 4096 square.
LLAMA_8B = {'up': (4096, 14336), 'down': (14336, 4096), 'query': (4096, 4096)}


def bench(platform: str) -> dict[str, Case]:
  """Products to time on 'cpu', 'gpu' or 'tpu': those of Llama 3.1 8B on accelerators, small ones on a CPU."""
  if platform == 'cpu':
    shapes = {'M=512': (512, 1024, 1024), 'M=1': (1, 2048, 2048)}
    schemes = {'W8A8': W8A8, 'W4A16': W4A16, 'W4A8': W4A8, 'W2A8': W2A8}
    return {f'{name} {shape}': Case(*sizes, scheme) for name, scheme in schemes.items() for shape, sizes in shapes.items()}
  found = {}
  for layer, (I, O) in LLAMA_8B.items():
    for rows in (1, 16):
      for name, scheme in {'W4A16': W4A16, 'W8A16': W8A16, 'W8A8': W8A8}.items():
        found[f'{name} {layer} M={rows}'] = Case(rows, I, O, scheme, jnp.bfloat16)
  for name, scheme in {'W8A8': W8A8, 'float8': F8, 'W4A16': W4A16, 'W8A16': W8A16}.items():
    for rows in (256, 8192):
      found[f'{name} up M={rows}'] = Case(rows, *LLAMA_8B['up'], scheme, jnp.bfloat16)
  found['float8 square 8192'] = Case(8192, 8192, 8192, F8, jnp.bfloat16)
  found['W2A8 up M=1'] = Case(1, *LLAMA_8B['up'], W2A8, jnp.bfloat16)
  found['W2A8 up M=8192'] = Case(8192, *LLAMA_8B['up'], W2A8, jnp.bfloat16)
  found['W4A16 up dgrad M=8192'] = Case(8192, *LLAMA_8B['up'], W4A16, jnp.bfloat16, of='dgrad')
  return found
