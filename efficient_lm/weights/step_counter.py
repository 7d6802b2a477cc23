"""A step counter in the model: the number of training steps taken, without the trainer's help.

What trains differently from step to step, rounding with fresh noise or quantization that begins late, has to know the step
in the forward pass. The trainer hands no step to a model; but it moves parameters. A StepCounter is a parameter whose
gradient is always -1 (see `counting`) and which the optimizer moves by sign descent (`training.transforms.descend_rated`),
as it does the load bias of a router: one step forward for each step that it accepts. So the count is saved with the model,
it is the same under every optimizer and number of microbatches, and a step that is refused as non-finite does not count.
"""
import jax
import jax.numpy as jnp
from flax import nnx


class StepCounter(nnx.Param):
  """Steps taken since the counter was made, a whole number in float32 (exact to 2^24): one for each layer of a stack, as all
  parameters are, and equal in all of them. It counts steps in which its layer was computed."""

  @classmethod
  def new(cls, shape: tuple[int, ...] = ()) -> 'StepCounter':
    """A counter at 0; `shape` is that of the stack of layers that it is part of."""
    return cls(jnp.zeros(shape, jnp.float32), rate=1.0)


@jax.custom_vjp
def _tap(x, steps):
  return x


def _forward(x, steps):
  return x, steps


def _backward(steps, g):
  # Whatever the sum over devices, microbatches or uses of the counter makes of it: what counts is the sign.
  return g, -jnp.ones_like(steps)


_tap.defvjp(_forward, _backward)


def counting(x, counter: StepCounter):
  """x, bit for bit, and its gradient likewise; the counter goes one step forward in a training step that computes this."""
  return _tap(x, counter.get_value())
