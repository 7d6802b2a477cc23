"""Invariants: what is promised of a weight, as values that can be checked on the weight that takes its place.

A Weight states its own (`Weight.invariants`). The loop over stages reads them before and after each stage; one that does not
hold any more is an error, unless the stage declares that it gives that kind up (`runs.invariants`).
"""
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from efficient_lm.parallel.processes import fetched


@dataclasses.dataclass(frozen=True)
class Bits:
  """Every number of the weight is one of at most 2^bits levels times a scale. `format`: the name of its format."""
  bits: int
  format: str

  kind = 'bits'

  def held_by(self, weight) -> bool:
    return any(isinstance(one, Bits) and one.bits <= self.bits for one in weight.invariants())

  def __str__(self): return self.format


@dataclasses.dataclass(frozen=True)
class Experts:
  """The weight is stacked by this many experts."""
  count: int

  kind = 'experts'

  def held_by(self, weight) -> bool:
    return weight.axes.startswith('E') and weight.shape[-len(weight.axes)] == self.count

  def __str__(self): return f'{self.count} experts'


@dataclasses.dataclass(frozen=True, eq=False)
class Zeros:
  """These entries are exactly zero. keep: bool, of the weight's shape, False where an entry is promised to be zero."""
  keep: Any

  kind = 'zeros'

  def held_by(self, weight) -> bool:
    if weight.shape != self.keep.shape: return False
    return not bool(jnp.any(jnp.where(self.keep, 0, weight.materialize()) != 0))

  def layer(self, i: int) -> 'Zeros':
    """That of layer i of a stack."""
    return Zeros(self.keep[i])

  def copied(self, num_experts: int, dim: int) -> 'Zeros':
    """That of as many copies, stacked on a new dimension in front of `dim`."""
    return Zeros(jnp.repeat(jnp.expand_dims(self.keep, dim), num_experts, dim))

  def __str__(self): return f'{1 - float(jnp.mean(self.keep)):.1%} zeros'


@dataclasses.dataclass(frozen=True)
class Pattern:
  """N:M sparsity: of every `m` successive inputs of an output, at most `n` are not zero (Mishra et al. 2021, arXiv
  2104.08378). Inputs are the dimensions that a product sums over, whatever their place in the array."""
  n: int
  m: int

  kind = 'pattern'

  def held_by(self, weight) -> bool:
    from efficient_lm.weights.layout import Layout
    matrix_OI = np.asarray(fetched(Layout.of(weight).matrix(weight.materialize())))
    if matrix_OI.shape[-1] % self.m: return False
    groups = matrix_OI.reshape(*matrix_OI.shape[:-1], -1, self.m)
    return bool((np.count_nonzero(groups, axis=-1) <= self.n).all())

  def __str__(self): return f'{self.n}:{self.m}'
