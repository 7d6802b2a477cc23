"""When a mask is drawn anew, and what share of the zeros it has by then.

Of steps from `start` to `end`, one in `every`. `ramp(step, start, end)`: the share of the final sparsity, 0 to 1;
`due(step, start, end, every)`: whether the mask is drawn after that step.
"""
import dataclasses

from efficient_lm.lazy import lazy

jnp = lazy('jax.numpy')


@dataclasses.dataclass(kw_only=True)
class Cubic:
  """1 - (1 - t)^3, t from 0 to 1 between start and end (Zhu and Gupta 2017, arXiv 1710.01878, eq. 1)."""

  def ramp(self, step, start: int, end: int):
    """The share of the final sparsity after `step` steps."""
    t = jnp.clip((step - start) / (end - start), 0, 1)
    return 1 - (1 - t) ** 3

  def due(self, step, start: int, end: int, every: int):
    """Whether the mask is drawn anew after `step` steps: every `every` after start, for the last time at end."""
    drawn = ((step - start) % every == 0) | (step == end)
    return drawn & (step > start) & (step <= end)


@dataclasses.dataclass(kw_only=True)
class AtOnce(Cubic):
  """All of it at step `end`, from one step to the next."""

  def ramp(self, step, start: int, end: int): return jnp.where(step >= end, 1., 0.)
  def due(self, step, start: int, end: int, every: int): return step == end


@dataclasses.dataclass(kw_only=True)
class Periodic(Cubic):
  """All of it from the first drawing on, and drawn anew as often as `Cubic` is. Where what is zero stays so, as under
  `Prune`, the later drawings find nothing to change."""

  def ramp(self, step, start: int, end: int): return jnp.where(step > start, 1., 0.)
