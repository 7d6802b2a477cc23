"""The dense feed-forward layer."""
from flax import nnx

from efficient_lm.axes import constrain
from efficient_lm.models import spec as specs
from efficient_lm.models.layers import gated
from efficient_lm.weights.weight import initial


class FeedForward(nnx.Module):
  """down(silu(gate(x)) * up(x)): SwiGLU (Shazeer 2020, eq. 6)."""

  def __init__(self, spec: specs.SwiGLU, site: 'specs.Site', *, rngs: nnx.Rngs):
    sizes = dict(D=site.dim, F=spec.hidden)
    self.gate = initial(rngs.params(), sizes, 'DF', 'D')
    self.up = initial(rngs.params(), sizes, 'DF', 'D')
    self.down = initial(rngs.params(), sizes, 'FD', 'F', scale=(2 * site.depth) ** -.5)

  def __call__(self, x_BTD):
    """y_BTD, and no auxiliary losses or metrics."""
    h_BTF = gated(self.gate.contract('BTD,DF->BTF', x_BTD), self.up.contract('BTD,DF->BTF', x_BTD))
    return self.down.contract('BTF,FD->BTD', constrain(h_BTF, 'BTF')), {}
