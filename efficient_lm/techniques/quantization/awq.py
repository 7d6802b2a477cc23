"""AWQ (Lin et al. 2024, arXiv 2306.00978): scale the channels that matter up before rounding, and clip what is not worth its
range.

Input channels that are large are few, and the rounding error of their weights costs most. Multiplying channel k of the
weights by s_k, and dividing by it what comes before, leaves the product and makes the error of that channel 1 / s_k of what
it was. s = magnitude^alpha, with the one alpha of a grid that leaves the smallest output error (eq. 4 and 5); it is 1 at
alpha = 0, so no layer gets worse by it. The output error of all calibration tokens follows from their Gram matrix, and
neither tokens nor outputs are kept.
"""
import dataclasses

from efficient_lm.compression.calibration import Method, compiled
from efficient_lm.lazy import lazy

hessian = lazy('efficient_lm.compression.hessian')
jnp = lazy('jax.numpy')
lax = lazy('jax.lax')
tree = lazy('efficient_lm.tree')
weights = lazy('efficient_lm.weights.weight')
wiring = lazy('efficient_lm.compression.coupling')


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Awq(Method):
  """Tries `grid` exponents from 0 to 1 for each place that weights read (norms, values, `up`), then shrinks the range of
  each tile by the best of `clips` factors between `least` and 1; one factor clips nothing. Queries and keys are not clipped:
  their product is read by a softmax, which their own output error does not know of (as the authors' code has it)."""
  grid: int = 20
  clips: int = 10
  least: float = 0.5

  needs = ('gram', 'magnitude')
  carries_rounded = False   # the search is one for the float model's own activations

  def check(self):
    if self.grid < 1: yield 'grid', self.grid, 'must be at least 1'
    if self.clips < 1: yield 'clips', self.clips, 'must be at least 1'
    if not 0 < self.least <= 1: yield 'least', self.least, 'must be above 0 and at most 1'

  def prepare(self, layer, found, formats):
    """Scales folded into what stands before, and the statistics of what the weights multiply from then on."""
    search = compiled(_best_scale, static_argnames=('grid', 'fan', 'formats', 'own'))
    for fan in wiring.fans(layer):
      readers = tuple(path for path in fan.readers if path in formats)
      if not readers or not wiring.foldable(layer, fan): continue
      nodes = dict(tree.select(layer, weights.Weight))
      s_C = search([wiring.matrix_of(nodes[path]) for path in readers], [found[path] for path in readers], grid=self.grid,
                   fan=fan, formats=tuple(formats[path] for path in readers), own=wiring.of_experts(nodes.get(fan.source)))
      layer = wiring.divided(layer, fan, s_C)
      found = found | {path: _rescaled(found[path], fan.spread(s_C)) for path in readers}
    clipped = lambda path: not path.split('/')[-1].startswith(('query', 'key'))
    return layer, {path: one if clipped(path) else {'count': one['count']} for path, one in found.items()}

  def encode(self, w_NK, format, statistics):
    if 'gram' not in statistics: return format.encode(w_NK, format.scales_for(w_NK))
    return format.encode(w_NK, format.scales_for(w_NK, _Clipped(statistics['gram'], self.clips, self.least)))


def _best_scale(matrices, seen, *, grid: int, fan, formats, own: bool):
  """s_C of the fan's source: (C,), or (E, C) if the source is the experts' own.

  matrices, seen, formats: of each reader that is rounded, (..., N, K) with statistics of its inputs."""
  magnitude_K, count_1 = seen[0]['magnitude'], seen[0]['count']
  if magnitude_K.ndim > 1 and not own: magnitude_K, count_1 = jnp.sum(magnitude_K, 0), jnp.sum(count_1, 0)
  mean_C = fan.gather(magnitude_K / jnp.maximum(count_1, 1), jnp.mean)
  mean_C = jnp.maximum(mean_C, 1e-4 * jnp.max(mean_C, -1, keepdims=True))   # a dead channel gets no endless scale
  mean_C = jnp.where(mean_C > 0, mean_C, 1)

  def scale(alpha_1):
    s_C = mean_C ** alpha_1
    return s_C * lax.rsqrt(jnp.max(s_C, -1, keepdims=True) * jnp.min(s_C, -1, keepdims=True))

  def error(alpha):
    s_1K, errors = fan.spread(scale(alpha))[..., None, :], []
    for w_NK, one, format in zip(matrices, seen, formats):
      scaled_NK = w_NK * s_1K
      change_NK = format.rounded(scaled_NK, format.scales_for(scaled_NK)) / s_1K - w_NK
      errors.append(jnp.sum(hessian.output_error(change_NK, one['gram']), -1 if own else None))
    return sum(errors)

  alphas = jnp.linspace(0, 1, grid)
  return scale(alphas[jnp.argmin(lax.map(error, alphas), 0)][..., None])


def _rescaled(statistics, s_K):
  """Of inputs divided by s_K."""
  return statistics | {'gram': statistics['gram'] / (s_K[..., :, None] * s_K[..., None, :]),
                       'magnitude': statistics['magnitude'] / s_K}


class _Clipped:
  """A range (`formats.ranges`): each tile's extremes, shrunk by the factor that leaves the smallest output error, where a
  tile's error is counted by itself, as if its outputs met no others."""

  def __init__(self, gram_KK, clips: int, least: float):
    self.gram_KK, self.clips, self.least = gram_KK, clips, least

  def extremes(self, tiles, format, reduce):
    low, high = format.range.extremes(tiles, format, reduce)
    q, b = tiles.shape[-2:]
    gram = self.gram_KK.reshape(*self.gram_KK.shape[:-2], q, b, q, b)
    gram_qbb = jnp.einsum('...qbqc->...qbc', gram)

    def better(best, factor):
      error, *_ = best
      change = format.snap_tiles(tiles, format.fit(low * factor, high * factor)) - tiles
      product = jnp.einsum('...naqb,...qbc->...naqc', change, gram_qbb, precision='highest')
      found = jnp.einsum('...naqb,...naqb->...nq', product, change)
      return tuple(jnp.where(found < error, new, old) for new, old in zip((found, low * factor, high * factor), best)), None

    start = jnp.full(low.shape, jnp.inf), low, high
    (_, low, high), _ = lax.scan(better, start, jnp.linspace(1, self.least, self.clips))
    return low, high
