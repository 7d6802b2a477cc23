"""LowPrecision: a Weight whose products are computed in eight bits, each of forward, dgrad and wgrad by itself.

What is stored and trained stays float: only the operands of the products are rounded (see `ops.low_precision_matmul`).
"""
import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm.ops.low_precision_matmul import low_precision_contract, low_precision_grouped_matmul
from efficient_lm.weights.step_counter import StepCounter, counting
from efficient_lm.weights.weight import Frozen, Weight, Wrapper, by_pieces


class LowPrecision(Wrapper):
  """Multiplies as `ops.low_precision_matmul` does; its values are those of `inner`. Looking up an embedding rounds nothing.

  Gradients that are rounded at random need a key that differs from step to step, layer to layer and device to device: it is
  that of `seed` for this step of `counter`. All microbatches of a step share it.
  """

  def __init__(self, inner: Weight, formats: dict[str, str | None], counter: StepCounter | None = None,
               seed: Frozen | None = None):
    """formats: of 'forward', 'dgrad' and 'wgrad'. counter and seed: both or neither, which rounds to the nearest; they have
    the dims that `inner` is stacked by. seed: uint32."""
    self.inner, self.formats = inner, tuple(sorted(formats.items()))
    self.counter, self.seed = counter, seed

  @property
  def product(self): return f'{dict(self.formats)["forward"] or "float"} x the same, rounded as it is multiplied'

  def cast(self, dtype):
    return LowPrecision(self.inner.cast(dtype), dict(self.formats), self.counter, self.seed)

  def multiply(self, equation: str, x, array, dtype=None):
    """einsum(equation, x, array) as this weight multiplies."""
    return low_precision_contract(equation, self._counted(x), array, dtype=dtype, key=self._key(), **dict(self.formats))

  def multiply_grouped(self, x_MD, array, sizes_E):
    """As `multiply`, for rows sorted by expert."""
    return low_precision_grouped_matmul(self._counted(x_MD), array, sizes_E, key=self._key(), **dict(self.formats))

  def nll(self, hidden_BTD, labels_BT):
    """As Weight, by logits of about ROWS tokens at a time, which the backward pass computes again."""
    hidden_BTD = self._counted(self.prepare_input(hidden_BTD, 'BTD'))
    head_DV, key = self.materialize().astype(hidden_BTD.dtype), self._key()
    def logits(hidden_BtD, piece):
      return low_precision_contract('BTD,DV->BTV', hidden_BtD, head_DV, dtype=jnp.float32, **dict(self.formats),
                                    key=None if key is None else jax.random.fold_in(key, piece))
    return by_pieces(logits, hidden_BTD, labels_BT)

  def _counted(self, x):
    return x if self.counter is None else counting(x, self.counter)

  def _key(self):
    if self.counter is None: return None
    key = jax.random.fold_in(jax.random.key(self.seed.get_value()), self.counter.get_value().astype(jnp.uint32))
    for name in jax.sharding.get_abstract_mesh().manual_axes: key = jax.random.fold_in(key, lax.axis_index(name))
    return key


def low_precision(inner: Weight, formats: dict[str, str | None], key=None) -> LowPrecision:
  """`inner` in low precision; with a key, gradients are rounded at random, each layer of a stack with noise of its own."""
  if key is None: return LowPrecision(inner, formats)
  return LowPrecision(inner, formats, StepCounter.new(inner.stack), Frozen(jax.random.bits(key, inner.stack, jnp.uint32)))
