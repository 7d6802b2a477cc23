"""Grouped products on which every implementation must agree, and those that benchmarks time."""
import dataclasses
import itertools

import jax
import jax.numpy as jnp

from efficient_lm.ops.grouped_matmul import grouped_matmul
from efficient_lm.ops.grouped_matmul import tiles as tiles_of_kernels
from efficient_lm.ops.quantized_matmul import PartedMatrix, in_parts


@dataclasses.dataclass(frozen=True)
class Case:
  """One pass over groups of given sizes.

  sizes: rows of each group.
  rows: M, at least their sum; the rows past it hold NaN.
  shape: I inputs and O outputs.
  dtype: of x. weight: the dtype of w: that of x by default, or int8 or float8_e4m3fn with scales.
  bits: of weights in a `PartedMatrix`, with a scale for 8 inputs, or 32 for floats in one; None for none. Forward only.
  of: 'forward'; 'dgrad', the gradient of x; 'wgrad', that of w; or 'all' three.
  """
  sizes: tuple[int, ...]
  rows: int
  shape: tuple[int, int] = (24, 40)
  dtype: str = 'float32'
  weight: str | None = None
  of: str = 'forward'
  bits: int | None = None

  def arguments(self) -> tuple:
    """x_MI, w_EIO, sizes_E, scale_EO or None, and a cotangent g_MO."""
    (I, O), E = self.shape, len(self.sizes)
    keys = jax.random.split(jax.random.key(self.rows), 4)
    past_M1 = jnp.arange(self.rows)[:, None] >= sum(self.sizes)
    x_MI, g_MO = (jnp.where(past_M1, jnp.nan, jax.random.normal(key, (self.rows, width), self.dtype))
                  for key, width in ((keys[0], I), (keys[1], O)))
    sizes_E = jnp.array(self.sizes, jnp.int32)
    if self.bits == 32: return x_MI, PartedMatrix(jax.random.normal(keys[2], (E, O, I), self.dtype)), sizes_E, None, g_MO
    if self.bits is not None:
      q_EOI = jax.random.randint(keys[2], (E, O, I), -2 ** (self.bits - 1), 2 ** (self.bits - 1)).astype(jnp.int8)
      scale_EOQ = jax.random.uniform(keys[3], (E, O, I // 8), minval=0.5) / 2 ** self.bits
      return x_MI, in_parts(q_EOI, scale_EOQ, bits=self.bits), sizes_E, None, g_MO
    if self.weight is None:
      return x_MI, jax.random.normal(keys[2], (E, I, O), self.dtype), sizes_E, None, g_MO
    w_EIO = jax.random.randint(keys[2], (E, I, O), -127, 128).astype(self.weight)
    return x_MI, w_EIO, sizes_E, jax.random.uniform(keys[3], (E, O), minval=0.5) / 127, g_MO

  def call(self, implementation: str, tiles=None):
    """A function of the arguments that computes what `of` names. What only other passes need is dead code in its program."""
    def run(x_MI, w_EIO, sizes_E, scale_EO, g_MO):
      def product(x, w): return grouped_matmul(x, w, sizes_E, scale_EO, implementation=implementation, tiles=tiles)
      if self.of == 'forward': return product(x_MI, w_EIO)
      if self.of == 'dgrad': return jax.vjp(lambda x: product(x, w_EIO), x_MI)[1](g_MO)[0]
      if self.of == 'wgrad': return jax.vjp(lambda w: product(x_MI, w), w_EIO)[1](g_MO)[0]
      y_MO, pull = jax.vjp(*((product, x_MI, w_EIO) if self.weight is None else (lambda x: product(x, w_EIO), x_MI)))
      return y_MO, *pull(g_MO)
    return run

  def tuning(self, implementation: str) -> tuple[tuple, list] | None:
    """The key of the case in the tables of `tiles`, and the tiles that tuning tries; None where there are no tiles."""
    x_dtype, w_dtype = jnp.dtype(self.dtype), jnp.dtype(self.weight or self.dtype)
    key = tiles_of_kernels.key(self.of, self.rows, *self.shape, len(self.sizes), x_dtype, w_dtype)
    if self.of == 'all': return None
    if implementation == 'pallas_tpu': return key, tiles_of_kernels.tpu_candidates(self.of, x_dtype, w_dtype)
    if implementation == 'pallas_gpu': return key, tiles_of_kernels.gpu_candidates(self.of, w_dtype)
    return None

  @property
  def passes(self) -> int:
    """The number of products of this size."""
    return 1 if self.of != 'all' else 3 if self.weight is None else 2

  @property
  def flops(self) -> float:
    """Those of the rows that belong to groups."""
    return 2.0 * self.passes * sum(self.sizes) * self.shape[0] * self.shape[1]

  @property
  def bytes(self) -> float:
    """Both operands are read and the result is written once; matrices of groups without rows are not read."""
    (I, O), wide = self.shape, jnp.dtype(self.dtype).itemsize
    some = len(self.sizes) if self.of == 'wgrad' else sum(size > 0 for size in self.sizes)
    narrow = jnp.dtype(self.weight or self.dtype).itemsize if self.bits is None else self.bits / 8
    return float(self.passes * (wide * self.rows * (I + O) + narrow * some * I * O))

  @property
  def precision(self) -> str:
    """The dtype of the products: weights of eight bits are converted to that of x first."""
    return self.dtype

  @property
  def tolerance(self) -> float:
    """Relative to the largest number of the reference."""
    # Sums are float32, in another order: they differ by a few float32 roundings of the largest partial sums. In bfloat16
    # results are rounded to 8 bits: they differ by one unit where sums lie on both sides of a boundary. With scaled weights
    # the rows of the gradient are also rounded to 8 bits before they are summed.
    if self.dtype == 'float32': return 1e-5
    return 2 ** -8 if self.weight is None else 2 ** -7

  def baselines(self) -> dict:
    """XLA's own grouped product, with weights that are converted to the dtype of x before it."""
    def ragged_dot(x_MI, w_EIO, sizes_E, scale_EO, g_MO):
      def product(x, w): return jax.lax.ragged_dot(x, w, sizes_E)
      w_EIO = w_EIO.astype(x_MI.dtype) if scale_EO is None else (w_EIO * scale_EO[:, None]).astype(x_MI.dtype)
      if self.of == 'forward': return product(x_MI, w_EIO)
      if self.of == 'dgrad': return jax.vjp(lambda x: product(x, w_EIO), x_MI)[1](g_MO)[0]
      if self.of == 'wgrad': return jax.vjp(lambda w: product(x_MI, w), w_EIO)[1](g_MO)[0]
      y_MO, pull = jax.vjp(*((product, x_MI, w_EIO) if self.weight is None else (lambda x: product(x, w_EIO), x_MI)))
      return y_MO, *pull(g_MO)
    return {'lax.ragged_dot': ragged_dot}


CASES = {
  'equal': Case((64, 64, 64, 64), 256, of='all'),
  'no size divides': Case((17, 3, 101, 7, 1), 129, of='all'),
  'empty groups': Case((0, 50, 0, 0, 14, 0), 64, of='all'),
  'all rows in the first': Case((90, 0, 0, 0), 90, of='all'),
  'all rows in the last': Case((0, 0, 0, 90), 90, of='all'),
  'rows left over': Case((5, 0, 40), 100, of='all'),
  'no rows at all': Case((0, 0, 0), 20, of='all'),
  'one row': Case((0, 1, 0), 1, of='all'),
  'one group': Case((33,), 40, of='all'),
  'more groups than rows': Case((1, 0, 0, 1, 0, 2, 0, 1), 7, of='all'),
  'bfloat16': Case((17, 3, 0, 101), 128, dtype='bfloat16', of='all'),
  'int8': Case((17, 3, 0, 101), 128, weight='int8', of='all'),
  'int8 and bfloat16': Case((0, 30, 3, 0), 50, (40, 48), 'bfloat16', 'int8', of='all'),
  'float8': Case((17, 3, 0, 101), 128, weight='float8_e4m3fn', of='all'),
  'parted int4, experts chosen twice and never': Case((0, 3, 0, 2, 0, 0, 1), 9, bits=4),
  'parted int4 of many rows': Case((17, 3, 0, 30), 60, bits=4),
  'parted int2, no rows at all': Case((0, 0), 2, bits=2),
  'parted floats': Case((1, 0, 2), 4, bits=32),
  'parted floats of many rows, bfloat16': Case((20, 0, 2), 24, dtype='bfloat16', bits=32),
  'float8 and bfloat16': Case((9, 30, 0, 1), 40, (40, 48), 'bfloat16', 'float8_e4m3fn', of='all'),
}
PASSES = ('forward', 'dgrad', 'wgrad')


def skewed(E: int, rows: int, skew: float) -> tuple[int, ...]:
  """Sizes of E groups that sum to `rows` and are proportional to 1 / rank**skew."""
  weights = [rank ** -skew for rank in range(1, E + 1)]
  ends = [round(sum(weights[:e]) / sum(weights) * rows) for e in range(E + 1)]
  return tuple(end - start for start, end in itertools.pairwise(ends))


def bench(platform: str) -> dict[str, Case]:
  """Experts of Mixtral 8x7B, OLMoE and Qwen3-30B-A3B, with equal and skewed sizes, also quantized; smaller ones on a CPU."""
  if platform == 'cpu':
    return {f'64 experts, {name} {of}': Case(skewed(64, 4096, skew), 4096, (256, 512), of=of)
            for name, skew in (('equal', 0.0), ('skewed', 1.2)) for of in PASSES} | {
            'int8 forward': Case(skewed(16, 1024, 0.0), 1024, (128, 256), weight='int8')}
  models = {'Mixtral up': (8, 8192, (4096, 14336), 0.0), 'Mixtral down': (8, 8192, (14336, 4096), 0.0),
            'OLMoE up': (64, 65536, (2048, 2048), 0.0), 'OLMoE up, skewed': (64, 65536, (2048, 2048), 1.0),
            'OLMoE down': (64, 65536, (1024, 2048), 0.0), '512 rows an expert': (64, 32768, (4096, 4096), 0.0),
            'Qwen3 up': (128, 131072, (2048, 1536), 0.5)}
  trained = {f'{name} {of}': Case(skewed(E, M, skew), M, shape, 'bfloat16', of=of)
             for name, (E, M, shape, skew) in models.items() for of in PASSES}
  frozen = {f'{name}, {weight} {of}': Case(skewed(E, M, 0.5), M, shape, 'bfloat16', weight, of=of)
            for weight in ('int8', 'float8_e4m3fn') for name, (E, M, shape), of in (
              ('Mixtral up', (8, 8192, (4096, 14336)), 'forward'), ('Mixtral up', (8, 8192, (4096, 14336)), 'dgrad'),
              ('Mixtral decoding', (8, 32, (4096, 14336)), 'forward'))}
  return trained | frozen
