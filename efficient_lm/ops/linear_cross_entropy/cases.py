"""Inputs on which every implementation of the linear cross-entropy must agree, for tests and benchmarks."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes, and the size of the logits."""
  batch: int
  length: int
  dim: int
  vocab: int
  logits: float = 1.
  dtype: Any = jnp.float32

  def arrays(self):
    """hidden_BTD, head_DV and labels_BT."""
    hidden, head, labels = jax.random.split(jax.random.key(self.length), 3)
    head_DV = jax.random.normal(head, (self.dim, self.vocab)) * self.logits * self.dim ** -.5
    return (jax.random.normal(hidden, (self.batch, self.length, self.dim), self.dtype), head_DV.astype(self.dtype),
            jax.random.randint(labels, (self.batch, self.length), 0, self.vocab))


CASES = {
  'small': Case(2, 24, 16, 50),
  'one token': Case(1, 1, 8, 5),
  'a prime number of tokens': Case(3, 13, 8, 31),
  'one word': Case(2, 4, 8, 1),
  'certain': Case(2, 9, 16, 20, logits=200.),   # exp of such logits overflows
  'bfloat16': Case(2, 24, 16, 50, dtype=jnp.bfloat16),
}
