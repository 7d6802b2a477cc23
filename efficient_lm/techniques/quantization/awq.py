"""AWQ (Lin et al. 2024, arXiv 2306.00978): scale the channels that matter up before quantizing, and clip ranges.

Input channels that are large are few, and the rounding error of their weights costs most. Multiplying channel k of the
weights by s_k, and dividing by it what comes before, leaves the product and makes the error of that channel 1 / s_k of what
it was. s = magnitude^alpha, with the one alpha of a grid that leaves the smallest output error (eq. 4 and 5). alpha = 0, no
scale at all, is in the grid, so the search does not raise the output error of the weights that read one place together,
before ranges are clipped; a single weight among them, clipped by the error of its tiles alone, can come out worse than by
RTN: 1.16 of its output error for one of 30 random matrices, 0.48 in the mean (3 bits, inputs of four factors).
"""
import dataclasses

from efficient_lm.compression.method import Method


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Awq(Method):
  """Tries `grid` exponents from 0 to 1 for each place that weights read (norms, values, `up`), then shrinks the range of
  each tile by the best of `clips` factors between `least` and 1; one factor clips nothing. Queries and keys are not clipped:
  their product is read by a softmax, which their own output error does not know of (as the authors' code has it)."""
  grid: int = 20
  clips: int = 10
  least: float = 0.5

  needs = ('gram', 'magnitude')
  carries_quantized = False   # the search is one for the float model's own activations

  def check(self):
    if self.grid < 1: yield 'grid', self.grid, 'must be at least 1'
    if self.clips < 1: yield 'clips', self.clips, 'must be at least 1'
    if not 0 < self.least <= 1: yield 'least', self.least, 'must be above 0 and at most 1'

  def prepare(self, layer, found, formats):
    """Scales folded into what stands before, and the statistics of what the weights multiply from then on."""
    from efficient_lm.compression.scaling import awq_prepared
    layer, found = awq_prepared(layer, found, formats, self.grid)
    clipped = lambda path: not path.split('/')[-1].startswith(('query', 'key'))
    return layer, {path: one if clipped(path) else {'count': one['count']} for path, one in found.items()}

  def encode(self, w_OI, format, statistics, keep_OI=None):
    from efficient_lm.compression.scaling import Clipped
    clipped = Clipped(statistics['gram'], self.clips, self.least) if 'gram' in statistics else None
    return format.encode(w_OI, format.scales_for(w_OI, clipped))
