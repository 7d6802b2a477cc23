"""Inputs on which every implementation of attention must agree, for tests and benchmarks."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Case:
  """T queries on S keys, and the options of the call; `heads` are (N, K), `dims` those of keys and of values."""
  T: int
  S: int
  heads: tuple[int, int] = (4, 4)
  dims: tuple[int, int] = (16, 16)
  start: int = 0
  window: int | None = None
  documents: bool = False
  dtype: Any = jnp.float32

  def arrays(self, batch: int = 2):
    """q_BTNH, k_BSKH and v_BSKH, a cotangent of the result, and the options as keyword arguments."""
    keys = jax.random.split(jax.random.key(self.T + self.S), 5)
    (N, K), (H, value) = self.heads, self.dims
    draw = lambda key, *shape: jax.random.normal(key, (batch, *shape), self.dtype)
    segments_BS = jnp.sort(jax.random.randint(keys[4], (batch, self.S), 0, 4), axis=1) if self.documents else None
    return ((draw(keys[0], self.T, N, H), draw(keys[1], self.S, K, H), draw(keys[2], self.S, K, value)),
            draw(keys[3], self.T, N, value), dict(start=self.start, window=self.window, segments_BS=segments_BS))


CASES = {
  'one token': Case(1, 1),
  'one strip': Case(37, 37),
  'several strips': Case(300, 300),
  'grouped heads': Case(260, 260, heads=(6, 2)),
  'one key head': Case(130, 130, heads=(4, 1)),
  'values of another size': Case(150, 150, dims=(16, 8)),
  'window within a strip': Case(300, 300, window=5),
  'window across strips': Case(400, 400, window=140, heads=(4, 2)),
  'window of one': Case(9, 9, window=1),
  'documents': Case(280, 280, documents=True, heads=(4, 2)),
  'documents and window': Case(280, 280, documents=True, window=50),
  'decode': Case(1, 64, start=40, heads=(4, 2)),
  'decode with window': Case(1, 64, start=63, window=7),
  'prefill of a part': Case(10, 64, start=20, heads=(4, 1), dims=(16, 8)),
  'prefill with documents': Case(10, 64, start=54, documents=True),
  'bfloat16': Case(200, 200, heads=(4, 2), dtype=jnp.bfloat16),
}
