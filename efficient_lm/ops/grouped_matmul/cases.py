"""Sizes of groups on which every implementation of the grouped product must agree, for tests and benchmarks."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Case:
  """Rows of each group, and rows in all (those past the groups hold NaN)."""
  sizes: tuple[int, ...]
  rows: int
  inputs: int = 24
  outputs: int = 40
  dtype: Any = jnp.float32

  def arrays(self):
    """x_MK, w_EKN, sizes_E and a cotangent g_MN."""
    x, w, g = jax.random.split(jax.random.key(self.rows), 3)
    x_MK = jax.random.normal(x, (self.rows, self.inputs), self.dtype)
    x_MK = jnp.where(jnp.arange(self.rows)[:, None] < sum(self.sizes), x_MK, jnp.nan)
    w_EKN = jax.random.normal(w, (len(self.sizes), self.inputs, self.outputs), self.dtype)
    return x_MK, w_EKN, jnp.array(self.sizes, jnp.int32), jax.random.normal(g, (self.rows, self.outputs), self.dtype)


CASES = {
  'equal': Case((64, 64, 64, 64), 256),
  'no size divides': Case((17, 3, 101, 7, 1), 129),
  'empty groups': Case((0, 50, 0, 0, 14, 0), 64),
  'all rows in the first': Case((90, 0, 0, 0), 90),
  'all rows in the last': Case((0, 0, 0, 90), 90),
  'rows left over': Case((5, 0, 40), 100),
  'no rows at all': Case((0, 0, 0), 20),
  'one row': Case((0, 1, 0), 1),
  'one group': Case((33,), 40),
  'more groups than rows': Case((1, 0, 0, 1, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1), 7),
  'bfloat16': Case((17, 3, 0, 101), 128, dtype=jnp.bfloat16),
}
