"""The feed-forward layers that every token sees. They are called as `layer(x_BTD, segments_BT, cached)` and return y_BTD,
and nothing to report, unless there is a penalty on their hidden units: tokens know nothing of each other here."""
import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.layers import ACTIVATIONS, gated
from efficient_lm.parallel.sharding import constrain
from efficient_lm.weights.biased import Biased
from efficient_lm.weights.weight import Weight, initial


class FeedForward(nnx.Module):
  """down(activation(gate(x)) * up(x)); with silu SwiGLU (Shazeer 2020, eq. 6)."""
  # Of models that were stored without: what is neutral is no attribute of its own.
  activation, penalty = 'silu', None

  def __init__(self, hidden: int, site, *, rngs: nnx.Rngs, activation: str = 'silu', biases: tuple[str, ...] = ()):
    sizes = dict(D=site.dim, F=hidden)
    self.gate = initial(rngs.params(), sizes, 'DF', 'D')
    self.up = initial(rngs.params(), sizes, 'DF', 'D')
    self.down = initial(rngs.params(), sizes, 'FD', 'F', scale=(2 * site.depth) ** -.5)
    if activation != 'silu': self.activation = activation
    add_biases(self, biases)

  def __call__(self, x_BTD, segments_BT=None, cached: bool = False):
    """y_BTD, and what the penalty reports, or None."""
    gate_BTF, up_BTF = self.gate.contract('BTD,DF->BTF', x_BTD), self.up.contract('BTD,DF->BTF', x_BTD)
    h_BTF = constrain(gated(gate_BTF, up_BTF, self.activation), 'BTF')
    return self.down.contract('BTF,FD->BTD', h_BTF), self.penalty and self.penalty.report(h_BTF, segments_BT)


class PlainFeedForward(nnx.Module):
  """down(activation(up(x))) (Vaswani et al. 2017, eq. 2)."""
  penalty = None

  def __init__(self, spec, site, *, rngs: nnx.Rngs):
    sizes = dict(D=site.dim, F=spec.hidden)
    self.up = initial(rngs.params(), sizes, 'DF', 'D')
    self.down = initial(rngs.params(), sizes, 'FD', 'F', scale=(2 * site.depth) ** -.5)
    self.activation = spec.activation
    if spec.penalty is not None: self.penalty = spec.penalty
    add_biases(self, spec.biases)

  def __call__(self, x_BTD, segments_BT=None, cached: bool = False):
    """y_BTD, and what the penalty reports, or None."""
    h_BTF = constrain(jax.checkpoint(ACTIVATIONS[self.activation])(self.up.contract('BTD,DF->BTF', x_BTD)), 'BTF')
    return self.down.contract('BTF,FD->BTD', h_BTF), self.penalty and self.penalty.report(h_BTF, segments_BT)


class SigmoidGated(nnx.Module):
  """sigmoid(x @ gate_out) * inner(x): the shared expert of Qwen2-MoE. Its gate has the letters of a router of one expert."""

  def __init__(self, inner, site, *, rngs: nnx.Rngs):
    self.gate_out = initial(rngs.params(), dict(D=site.dim, E=1), 'DE', 'D')
    self.inner = inner.build(site, rngs=rngs)

  def __call__(self, x_BTD, segments_BT=None, cached: bool = False):
    """y_BTD, None."""
    gate_BT1 = jax.nn.sigmoid(self.gate_out.contract('BTD,DE->BTE', x_BTD, jnp.float32))
    return gate_BT1.astype(x_BTD.dtype) * self.inner(x_BTD, segments_BT, cached)[0], None


def add_biases(layer: nnx.Module, names: tuple[str, ...]):
  """Gives weights of a layer that is being built biases of zeros over their outputs."""
  for name in names: setattr(layer, name, _with_zeros(getattr(layer, name)))


def _with_zeros(weight: Weight) -> Biased:
  sizes = dict(zip(weight.axes, weight.shape))
  return Biased(weight, jnp.zeros([size for letter, size in sizes.items() if letter not in weight.inputs]))
