"""Low-precision products on which every implementation must agree, and those that benchmarks time."""
import dataclasses

import jax
import jax.numpy as jnp

from efficient_lm.ops.contract import contract
from efficient_lm.ops.grouped_matmul import grouped_matmul
from efficient_lm.ops.low_precision_matmul import low_precision_grouped_matmul, low_precision_matmul

INT8, FLOAT8 = ('int8', 'int8', 'int8'), ('float8_e4m3fn', 'float8_e5m2', 'float8_e5m2')
PASSES = ('forward', 'dgrad', 'wgrad')


@dataclasses.dataclass(frozen=True)
class Case:
  """One or all passes of x (rows, inputs) @ w (inputs, outputs).

  shape: rows, inputs, outputs.
  formats: of forward, dgrad and wgrad.
  sizes: rows of each group, if there are groups; rows past their sum hold NaN.
  stochastic: whether gradients are rounded stochastically.
  dtype: of x and w.
  of: 'forward', 'dgrad', 'wgrad', or 'all' three.
  """
  shape: tuple[int, int, int]
  formats: tuple[str | None, str | None, str | None] = INT8
  sizes: tuple[int, ...] | None = None
  stochastic: bool = False
  dtype: str = 'float32'
  of: str = 'all'

  def arguments(self) -> tuple:
    """x_MI, w_IO or w_EIO, a cotangent g_MO, and sizes_E or None. The magnitudes of columns differ up to a thousandfold."""
    (M, I, O), keys = self.shape, jax.random.split(jax.random.key(sum(self.shape)), 3)
    draw = lambda key, *shape: jax.random.normal(key, shape) * 10. ** -(jnp.arange(shape[-1]) % 4)
    past_M1 = jnp.arange(M)[:, None] >= (M if self.sizes is None else sum(self.sizes))
    x_MI, g_MO = (jnp.where(past_M1, jnp.nan, draw(key, M, width)) for key, width in ((keys[0], I), (keys[1], O)))
    w = draw(keys[2], *(() if self.sizes is None else (len(self.sizes),)), I, O)
    sizes_E = None if self.sizes is None else jnp.array(self.sizes, jnp.int32)
    return *(a.astype(self.dtype) for a in (x_MI, w, g_MO)), sizes_E

  def call(self, implementation: str, tiles=None):
    """A function of the arguments that computes the pass `of`. What only other passes need is dead code in its program."""
    options = dict(zip(PASSES, self.formats), implementation=implementation)
    def product(x, w, sizes_E):
      key = jax.random.key(1) if self.stochastic else None
      if self.sizes is None: return low_precision_matmul(x, w, key=key, **options)
      return low_precision_grouped_matmul(x, w, sizes_E, key=key, **options)
    return self._passes(product)

  def _passes(self, product):
    def run(x, w, g, sizes_E):
      if self.of == 'forward': return product(x, w, sizes_E)
      y, pull = jax.vjp(lambda x, w: product(x, w, sizes_E), x, w)
      dx, dw = pull(g)
      return {'dgrad': dx, 'wgrad': dw, 'all': (y, dx, dw)}[self.of]
    return run

  @property
  def flops(self) -> float:
    """2 M I O for each pass, counting the rows that belong to groups."""
    M, I, O = self.shape
    return 2.0 * (3 if self.of == 'all' else 1) * (M if self.sizes is None else sum(self.sizes)) * I * O

  @property
  def bytes(self) -> float:
    """Operands are read and the result is written once, in the dtype of x: rounding is part of the work."""
    (M, I, O), groups = self.shape, 1 if self.sizes is None else len(self.sizes)
    return float((3 if self.of == 'all' else 1) * jnp.dtype(self.dtype).itemsize * (M * I + M * O + groups * I * O))

  @property
  def precision(self) -> str:
    """The dtype of the numbers that are multiplied."""
    format = self.formats[0 if self.of == 'all' else PASSES.index(self.of)]
    return self.dtype if format is None else 'int8' if format == 'int8' else 'float8_e4m3fn'

  @property
  def tolerance(self) -> float:
    """Relative to the largest number of the reference. Both round operands alike, so that float32 results differ by the
    order in which float32 numbers are summed. Where a program computes a quotient differently, a value may be rounded to the
    other side of a step; that is rare, and affects one of hundreds of terms. Bfloat16 results are rounded once, to 8 bits,
    and differ by one unit where sums lie on both sides of a boundary."""
    return 2 ** -7 if self.dtype == 'bfloat16' else 1e-5

  def baselines(self) -> dict:
    """The product without rounding, in the dtype of x."""
    def product(x, w, sizes_E):
      return contract('MI,IO->MO', x, w) if self.sizes is None else grouped_matmul(x, w, sizes_E)
    return {f'in {self.dtype}': self._passes(product)}


CASES = {
  'int8': Case((24, 64, 40)),
  'int8 at random': Case((24, 64, 41), stochastic=True),
  'float8': Case((24, 64, 40), FLOAT8),
  'float8 at random': Case((24, 64, 41), FLOAT8, stochastic=True),
  'float8_e4m3fn throughout, at random': Case((9, 16, 7), ('float8_e4m3fn',) * 3, stochastic=True),
  'forward only': Case((16, 32, 24), ('int8', None, None)),
  'dgrad only': Case((16, 32, 24), (None, 'int8', None), stochastic=True),
  'wgrad only': Case((16, 32, 24), (None, None, 'int8'), stochastic=True),
  'int8 and float8': Case((16, 32, 24), ('float8_e4m3fn', 'int8', 'float8_e5m2')),
  'one row': Case((1, 16, 24)),
  'one of all': Case((1, 1, 1), stochastic=True),
  'bfloat16': Case((24, 64, 40), dtype='bfloat16', stochastic=True),
  'groups': Case((129, 24, 40), sizes=(17, 3, 101, 7, 1)),
  'groups at random': Case((60, 24, 40), sizes=(0, 30, 20, 0), stochastic=True),
  'groups of several runs': Case((64, 16, 24), sizes=(60, 0, 0, 0, 0, 0, 0, 2), stochastic=True),
  'groups, float8': Case((50, 24, 40), FLOAT8, sizes=(5, 0, 40), stochastic=True),
  'groups, forward only': Case((50, 24, 40), ('int8', None, None), sizes=(5, 0, 40)),
  'groups, gradients only': Case((50, 24, 40), (None, 'int8', 'int8'), sizes=(5, 0, 40), stochastic=True),
  'groups, bfloat16': Case((50, 24, 40), sizes=(5, 0, 40), dtype='bfloat16'),
  'no rows at all': Case((20, 8, 16), sizes=(0, 0, 0)),
}


def bench(platform: str) -> dict[str, Case]:
  """Layers of models in training: those of `small` of the zoo on a CPU, of Llama 3.1 8B and Mixtral 8x7B elsewhere."""
  if platform == 'cpu':
    dense = {f'small up {of}': Case((4096, 384, 1024), of=of) for of in PASSES}
    random = {f'small up {of}, at random': Case((4096, 384, 1024), stochastic=True, of=of) for of in PASSES[1:]}
    experts = {f'8 experts {of}': Case((4096, 256, 512), sizes=(512,) * 8, of=of) for of in PASSES}
    return dense | random | experts
  dense = {f'{name} up {of}': Case((8192, 4096, 14336), formats, dtype='bfloat16', stochastic=of != 'forward', of=of)
           for name, formats in (('int8', INT8), ('float8', FLOAT8)) for of in PASSES}
  experts = {f'Mixtral up {of}': Case((8192, 4096, 14336), sizes=(1024,) * 8, dtype='bfloat16', of=of) for of in PASSES}
  return dense | experts
