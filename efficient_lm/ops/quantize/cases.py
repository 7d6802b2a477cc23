"""Inputs on which every implementation of row-wise quantization must agree, for tests and benchmarks."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from efficient_lm.ops.hadamard import hadamard
from efficient_lm.ops.quantize import IMPLEMENTATIONS, quantize
from efficient_lm.ops.rms_norm import rms_norm


@dataclasses.dataclass(frozen=True)
class Case:
  """M rows of I numbers, some of them outliers; whether they are normalised and rotated; the dtypes of values and of x."""
  M: int
  I: int
  norm: bool = False
  block: int | None = None
  values: Any = jnp.int8
  dtype: Any = jnp.float32

  def arguments(self) -> tuple[jax.Array, ...]:
    """x_MI, and norm_I if the rows are normalised."""
    x_key, norm_key, outlier_key = jax.random.split(jax.random.key(self.I), 3)
    x_MI = jax.random.normal(x_key, (self.M, self.I))
    x_MI *= jnp.where(jax.random.bernoulli(outlier_key, 0.01, (self.I,)), 20., 1.)
    arrays = (x_MI.astype(self.dtype),)
    return (*arrays, 1 + 0.1 * jax.random.normal(norm_key, (self.I,))) if self.norm else arrays

  def call(self, implementation: str, tiles=None):
    """The op as a function of the arguments."""
    def run(x_MI, norm_I=None):
      options = dict(dtype=jnp.dtype(self.values), norm_I=norm_I, eps=1e-6, block=self.block)
      if tiles is None: return quantize(x_MI, **options, implementation=implementation)
      return IMPLEMENTATIONS[implementation].run(x_MI, **options, tiles=tiles)
    return run

  @property
  def flops(self) -> float:
    """About 8 operations a number, and for a rotation the additions of a fast Hadamard transform: log2 of the block."""
    return self.M * self.I * (8 + (self.block.bit_length() - 1 if self.block else 0))

  @property
  def bytes(self) -> float:
    """Those of x, which is read once, and of values and scales, which are written once."""
    return self.M * (self.I * (jnp.dtype(self.dtype).itemsize + 1) + 4)

  @property
  def precision(self) -> str:
    """The dtype of the arithmetic."""
    return 'float32'

  @property
  def tolerance(self) -> float:
    """One step at the largest value: where y lies halfway between two values, its last bit decides which one is nearest. The
    step of float8 there is 32 of 448."""
    return 1.001 / 127 if jnp.dtype(self.values) == jnp.int8 else 32.01 / 448

  def baselines(self) -> dict:
    """The stages one after another, each with a result in the dtype of x, as separate layers compute them."""
    def stages(x_MI, norm_I=None):
      if norm_I is not None: x_MI = jax.lax.optimization_barrier(rms_norm(x_MI, norm_I))
      if self.block:
        x_MI = jax.lax.optimization_barrier(hadamard(x_MI.astype(jnp.float32), self.block).astype(x_MI.dtype))
      return quantize(x_MI, dtype=self.values, implementation='xla')
    return {'stages': stages} if self.norm or self.block else {}


CASES = {
  'plain': Case(5, 48),
  'one row': Case(1, 32, norm=True),
  'one number a row': Case(7, 1),
  'normalised': Case(9, 200, norm=True),
  'rotated whole': Case(6, 64, block=64),
  'rotated in blocks': Case(17, 96, block=16),
  'rotated by two factors': Case(3, 512, block=256),
  'normalised and rotated': Case(5, 128, norm=True, block=32),
  'bfloat16 to float8': Case(8, 128, values=jnp.float8_e4m3fn, dtype=jnp.bfloat16),
  'normalised bfloat16': Case(20, 128, norm=True, dtype=jnp.bfloat16),
  'rotated float8': Case(4, 64, block=32, values=jnp.float8_e4m3fn),
}


def bench(platform: str) -> dict[str, Case]:
  """Activations of a layer of a model of 7B parameters (4096 wide, 14336 inside the MLP), smaller on a CPU."""
  if platform == 'cpu': rows, width, hidden, dtype = 2048, 1024, 2048, jnp.float32
  else: rows, width, hidden, dtype = 16384, 4096, 14336, jnp.bfloat16
  return {
    f'plain, {rows} x {width}': Case(rows, width, dtype=dtype),
    f'normalised, {rows} x {width}': Case(rows, width, norm=True, dtype=dtype),
    f'normalised to float8, {rows} x {width}': Case(rows, width, norm=True, dtype=dtype, values=jnp.float8_e4m3fn),
    f'plain, {rows} x {hidden}': Case(rows, hidden, dtype=dtype),
    f'rotated by 128, {rows} x {width}': Case(rows, width, block=128, dtype=dtype),
    f'rotated by 512, {rows} x {hidden}': Case(rows, hidden, block=512, dtype=dtype),
    f'normalised, rotated, to float8, {rows} x {width}': Case(rows, width, True, 128, jnp.float8_e4m3fn, dtype),
  }
