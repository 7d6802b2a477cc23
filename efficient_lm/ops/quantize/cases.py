"""Inputs on which every implementation of row-wise quantization must agree, for tests and benchmarks."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from efficient_lm.ops.quantize import IMPLEMENTATIONS, quantize
from efficient_lm.ops.quantize.xla import rotate
from efficient_lm.ops.rms_norm import rms_norm


@dataclasses.dataclass(frozen=True)
class Case:
  """M rows of D numbers, some of them outliers; what is done before rounding, and the dtype of the values."""
  M: int
  D: int
  norm: bool = False
  hadamard: int | None = None
  values: Any = jnp.int8
  dtype: Any = jnp.float32

  def arguments(self) -> tuple[jax.Array, ...]:
    """x_MD, and norm_D if rows are normalised."""
    x_key, norm_key, outlier_key = jax.random.split(jax.random.key(self.D), 3)
    x_MD = jax.random.normal(x_key, (self.M, self.D))
    x_MD *= jnp.where(jax.random.bernoulli(outlier_key, 0.01, (self.D,)), 20., 1.)
    arrays = (x_MD.astype(self.dtype),)
    return (*arrays, 1 + 0.1 * jax.random.normal(norm_key, (self.D,))) if self.norm else arrays

  def call(self, implementation: str, tiles=None):
    """The op as a function of the arguments."""
    def run(x_MD, norm_D=None):
      options = dict(dtype=jnp.dtype(self.values), norm_D=norm_D, eps=1e-6, hadamard=self.hadamard)
      if tiles is None: return quantize(x_MD, **options, implementation=implementation)
      return IMPLEMENTATIONS[implementation].run(x_MD, **options, tiles=tiles)
    return run

  @property
  def flops(self) -> float:
    """About 8 operations a number, and the Hadamard product by butterflies: log2 of the block."""
    return self.M * self.D * (8 + (self.hadamard.bit_length() - 1 if self.hadamard else 0))

  @property
  def bytes(self) -> float:
    """x read once, values and scales written once."""
    return self.M * (self.D * (jnp.dtype(self.dtype).itemsize + 1) + 4)

  @property
  def precision(self) -> str:
    """Of the arithmetic."""
    return 'float32'

  @property
  def tolerance(self) -> float:
    """One step of the largest value: where y lies between two of them, the last bit of y decides which is nearest. The step
    of float8 there is 32 of 448."""
    return 1.001 / 127 if jnp.dtype(self.values) == jnp.int8 else 32.01 / 448

  def baselines(self) -> dict:
    """The stages one after another, each with its result in the dtype of x, as separate layers would leave it."""
    def stages(x_MD, norm_D=None):
      if norm_D is not None: x_MD = jax.lax.optimization_barrier(rms_norm(x_MD, norm_D))
      if self.hadamard:
        x_MD = jax.lax.optimization_barrier(rotate(x_MD.astype(jnp.float32), self.hadamard).astype(x_MD.dtype))
      return quantize(x_MD, dtype=self.values, implementation='xla')
    return {'stages': stages} if self.norm or self.hadamard else {}


CASES = {
  'plain': Case(5, 48),
  'one row': Case(1, 32, norm=True),
  'one number a row': Case(7, 1),
  'normalised': Case(9, 200, norm=True),
  'rotated whole': Case(6, 64, hadamard=64),
  'rotated in blocks': Case(17, 96, hadamard=16),
  'rotated by two factors': Case(3, 512, hadamard=256),
  'normalised and rotated': Case(5, 128, norm=True, hadamard=32),
  'bfloat16 to float8': Case(8, 128, values=jnp.float8_e4m3fn, dtype=jnp.bfloat16),
  'normalised bfloat16': Case(20, 128, norm=True, dtype=jnp.bfloat16),
  'rotated float8': Case(4, 64, hadamard=32, values=jnp.float8_e4m3fn),
}


def bench(platform: str) -> dict[str, Case]:
  """Activations of a layer of 7B parameters (4096 wide, 14336 inside), smaller on a CPU."""
  if platform == 'cpu': M, D, F, dtype = 2048, 1024, 2048, jnp.float32
  else: M, D, F, dtype = 16384, 4096, 14336, jnp.bfloat16
  return {
    f'plain, {M} x {D}': Case(M, D, dtype=dtype),
    f'normalised, {M} x {D}': Case(M, D, norm=True, dtype=dtype),
    f'normalised to float8, {M} x {D}': Case(M, D, norm=True, dtype=dtype, values=jnp.float8_e4m3fn),
    f'plain, {M} x {F}': Case(M, F, dtype=dtype),
    f'rotated by 128, {M} x {D}': Case(M, D, hadamard=128, dtype=dtype),
    f'rotated by 512, {M} x {F}': Case(M, F, hadamard=512, dtype=dtype),
    f'normalised, rotated, to float8, {M} x {D}': Case(M, D, True, 128, jnp.float8_e4m3fn, dtype),
  }
