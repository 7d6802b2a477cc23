"""Block-sparse products on which every implementation must agree, for tests and benchmarks."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.ops import block_sparse_matmul as op


@dataclasses.dataclass(frozen=True)
class Case:
  """M rows times R x C blocks of U x V, of which a share `density` is kept.

  balanced: each column keeps equally many; otherwise the places are drawn from the whole matrix.
  of: 'forward'; or 'dgrad' or 'wgrad', the gradients of rows and of blocks; or 'all' three.
  """
  M: int
  grid: tuple[int, int]
  block: tuple[int, int] = (16, 16)
  density: float = 0.5
  balanced: bool = True
  dtype: str = 'float32'
  of: str = 'all'

  @functools.cached_property
  def mask(self) -> np.ndarray:
    """bool (R, C)."""
    (R, C), random = self.grid, np.random.default_rng(self.M)
    order = random.random((R, C)).argsort(0).argsort(0) if self.balanced else random.permutation(R * C).reshape(R, C)
    return order < round(self.density * (R if self.balanced else R * C))

  def arguments(self):
    """x_MI, blocks_ZUV, their pattern, a cotangent g_MO, and the dense w_IO for the baselines."""
    (R, C), (U, V) = self.grid, self.block
    x, w, g = jax.random.split(jax.random.key(self.M), 3)
    w_IO = (R * U) ** -0.5 * jax.random.normal(w, (R * U, C * V), self.dtype)
    blocks_ZUV, pattern = op.from_dense(w_IO, self.mask)
    pattern = jax.tree.map(jnp.asarray, pattern)
    return (jax.random.normal(x, (self.M, R * U), self.dtype), blocks_ZUV, pattern,
            jax.random.normal(g, (self.M, C * V), self.dtype), op.to_dense(blocks_ZUV, pattern))

  def call(self, implementation: str, tiles=None):
    """A function of the arguments that computes what `of` names."""
    run = functools.partial(op.block_sparse_matmul, implementation=implementation)
    if tiles is not None: run = functools.partial(op.IMPLEMENTATIONS[implementation].run, tiles=tiles)

    def function(x_MI, blocks_ZUV, pattern, g_MO, w_IO):
      return self._passes(lambda x, blocks: run(x, blocks, pattern), x_MI, blocks_ZUV, g_MO)
    return function

  def baselines(self):
    """The dense product of the same sizes. Of its gradient by the weight, the kept blocks are returned for comparison."""
    def product(x, w): return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)
    def kept(w_IO, pattern):
      (R, C), (U, V) = self.grid, self.block
      return w_IO.reshape(R, U, C, V).swapaxes(1, 2)[pattern.rows_Z, pattern.columns_Z]
    def dense(x_MI, blocks_ZUV, pattern, g_MO, w_IO):
      result = self._passes(product, x_MI, w_IO, g_MO)
      if self.of == 'wgrad': return kept(result, pattern)
      return (*result[:2], kept(result[2], pattern)) if self.of == 'all' else result
    return {'dense': dense}

  def _passes(self, run, x, w, g):
    if self.of == 'forward': return run(x, w)
    y, pull = jax.vjp(run, x, w)
    dx, dw = pull(g)
    return {'dgrad': dx, 'wgrad': dw, 'all': (y, dx, dw)}[self.of]

  @property
  def flops(self) -> float:
    """Those of the kept blocks."""
    U, V = self.block
    return 2.0 * self.M * int(self.mask.sum()) * U * V * (3 if self.of == 'all' else 1)

  @property
  def bytes(self) -> float:
    """Each operand is read once, and each result is written once."""
    (R, C), (U, V) = self.grid, self.block
    once = self.M * R * U + self.M * C * V + int(self.mask.sum()) * U * V
    return float(once * jnp.dtype(self.dtype).itemsize * (3 if self.of == 'all' else 1))

  @property
  def precision(self) -> str:
    return self.dtype

  @property
  def tolerance(self) -> float:
    # In float32, sums of products in another order differ by a few roundings. In bfloat16 the results are rounded to 8 bits.
    return {'float32': 2e-6, 'bfloat16': 2 ** -8, 'float16': 2 ** -10}[self.dtype]


CASES = {
  'half': Case(40, (4, 6)),
  'one row': Case(1, (3, 2)),
  'unequal columns': Case(33, (6, 5), density=0.3, balanced=False),
  'few blocks: empty rows and columns': Case(24, (7, 5), density=0.1, balanced=False),
  'one block': Case(9, (4, 4), density=1 / 16, balanced=False),
  'all blocks': Case(30, (3, 4), density=1.0),
  'no blocks': Case(5, (2, 3), density=0.0),
  'wide blocks': Case(20, (5, 3), block=(8, 24), density=0.4),
  'tall blocks': Case(20, (3, 5), block=(24, 8), density=0.4, balanced=False),
  'bfloat16': Case(50, (6, 4), density=0.5, dtype='bfloat16'),
}


def bench(platform: str) -> dict[str, Case]:
  """A square matrix of 1024 on CPU; elsewhere a projection from 4096 to 14336 (Llama-3 8B) and a square one of 4096."""
  if platform == 'cpu':
    return {f'{U}x{U} blocks, density {density}, {of}': Case(512, (1024 // U, 1024 // U), (U, U), density, of=of)
            for U, density in ((64, 0.5), (128, 0.5), (128, 0.25), (128, 0.125)) for of in ('forward', 'all')}
  cases = {f'8192 x 4096 x 14336, 128x128, density {density}, {of}':
             Case(8192, (32, 112), (128, 128), density, dtype='bfloat16', of=of)
           for density in (0.5, 0.25, 0.125) for of in ('forward', 'dgrad', 'wgrad')}
  for U in (64, 256):
    cases[f'8192 x 4096 x 4096, {U}x{U}, density 0.5, all'] = Case(8192, (4096 // U, 4096 // U), (U, U), dtype='bfloat16')
  return cases
