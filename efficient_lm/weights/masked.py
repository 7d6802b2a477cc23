"""Masked weights: what pruning leaves. Their zeros are exact and stay so, in training too."""
import dataclasses

import jax
import jax.numpy as jnp

from efficient_lm.weights.invariants import Pattern, Zeros
from efficient_lm.weights.weight import Dense, Frozen, OutputsFirst, Weight, Wrapper


class Masked(Wrapper):
  """`inner` where the mask is True, exactly 0 elsewhere; no gradient reaches what is masked.

  It multiplies as a dense weight: a mask saves no time, and storage where it is packed (`packed_masked`). keep: bool, of the
  weight's shape. pattern: the N:M pattern that the mask keeps to, or None.
  """

  def __init__(self, inner: Weight, keep, pattern: Pattern | None = None):
    self.inner, self.keep = inner, keep if isinstance(keep, Frozen) else Frozen(keep, axes=inner.axes)
    self.pattern = pattern and dataclasses.replace(pattern)

  @property
  def kind(self): return f'{self.inner.kind}, masked{f" {self.pattern}" if self.pattern else ""}'

  @property
  def product(self): return f'{self.inner.product}, zeros too'

  def materialize(self):
    array = self.inner.materialize()
    return jnp.where(self.keep.get_value(), array, jnp.zeros((), array.dtype))

  def cast(self, dtype): return self.around(lambda inner: inner.cast(dtype))

  def for_decoding(self):
    """Of floats, with the zeros in the array and no mask beside them; other weights stay as they are."""
    if not isinstance(self.inner, Dense) or self.axes[0] in 'VT': return self
    return jax.jit(OutputsFirst)(self)

  def around(self, change) -> 'Masked':
    """With change(inner) in place of `inner`, under the same mask."""
    return Masked(change(self.inner), self.keep, self.pattern)

  def cleaned(self) -> 'Masked':
    """With zeros in the stored array as well, whatever an optimizer has moved under the mask."""
    if not isinstance(self.inner, Dense): return self
    return self.around(lambda inner: inner.replaced(self.materialize()))

  def invariants(self):
    own = (Zeros(self.keep.get_value()), *([self.pattern] if self.pattern else []))
    return (*(one for one in self.inner.invariants() if one.kind not in ('zeros', 'pattern')), *own)
