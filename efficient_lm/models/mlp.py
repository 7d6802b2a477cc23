"""The dense feed-forward layer."""
from flax import nnx

from efficient_lm.models.layers import gated
from efficient_lm.parallel.sharding import constrain
from efficient_lm.weights.weight import initial


class FeedForward(nnx.Module):
  """down(silu(gate(x)) * up(x)): SwiGLU (Shazeer 2020, eq. 6)."""

  def __init__(self, hidden: int, site, *, rngs: nnx.Rngs):
    sizes = dict(D=site.dim, F=hidden)
    self.gate = initial(rngs.params(), sizes, 'DF', 'D')
    self.up = initial(rngs.params(), sizes, 'DF', 'D')
    self.down = initial(rngs.params(), sizes, 'FD', 'F', scale=(2 * site.depth) ** -.5)

  def __call__(self, x_BTD, segments_BT=None, cached: bool = False):
    """y_BTD, and nothing to report: tokens know nothing of each other here."""
    h_BTF = gated(self.gate.contract('BTD,DF->BTF', x_BTD), self.up.contract('BTD,DF->BTF', x_BTD))
    return self.down.contract('BTF,FD->BTD', constrain(h_BTF, 'BTF')), None
