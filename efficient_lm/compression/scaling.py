"""Scales of channels that are moved from one weight into those beside it: the searches of AWQ and SmoothQuant, and AWQ's
clipping of ranges."""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from efficient_lm import tree
from efficient_lm.compression import calibration, hessian
from efficient_lm.compression.coupling import couplings, divided, foldable, matrix_of, of_experts
from efficient_lm.models.transformer import Block
from efficient_lm.weights.weight import Weight

# ------------------------------------------------------------------ AWQ

def awq_prepared(layer, found: dict, formats: dict, grid: int):
  """A layer with the channels of each producer scaled as AWQ does, and the statistics of what its weights multiply then.

  found, formats: of the weights that are to be quantized, by path."""
  for coupling in couplings(layer):
    consumers = tuple(path for path in coupling.consumers if path in formats)
    if not consumers or not foldable(layer, coupling): continue
    nodes = dict(tree.select(layer, Weight))
    s_C = _best_scale([matrix_of(nodes[path]) for path in consumers], [found[path] for path in consumers], grid=grid,
                      coupling=coupling, formats=tuple(formats[path] for path in consumers),
                      own=of_experts(nodes.get(coupling.producer)))
    layer = divided(layer, coupling, s_C)
    found = found | {path: _rescaled(found[path], coupling.to_inputs(s_C)) for path in consumers}
  return layer, found


@functools.partial(jax.jit, static_argnames=('grid', 'coupling', 'formats', 'own'))
def _best_scale(matrices, seen, *, grid: int, coupling, formats, own: bool):
  """s_C of the producer: (C,), or (E, C) if it is the experts' own. s = magnitude^alpha with the alpha of a grid that leaves
  the smallest output error (AWQ, eq. 4 and 5), which follows from the Gram matrix: neither tokens nor outputs are kept.

  matrices, seen, formats: of each consumer that is quantized, (..., O, I) with statistics of its inputs."""
  magnitude_I, count_1 = seen[0]['magnitude'], seen[0]['count']
  if magnitude_I.ndim > 1 and not own: magnitude_I, count_1 = jnp.sum(magnitude_I, 0), jnp.sum(count_1, 0)
  mean_C = coupling.to_channels(magnitude_I / jnp.maximum(count_1, 1), jnp.mean)
  mean_C = jnp.maximum(mean_C, 1e-4 * jnp.max(mean_C, -1, keepdims=True))   # a dead channel gets no endless scale
  mean_C = jnp.where(mean_C > 0, mean_C, 1)

  def scale(alpha_1):
    s_C = mean_C ** alpha_1
    return s_C * lax.rsqrt(jnp.max(s_C, -1, keepdims=True) * jnp.min(s_C, -1, keepdims=True))

  def error(alpha):
    s_1I, errors = coupling.to_inputs(scale(alpha))[..., None, :], []
    for w_OI, one, format in zip(matrices, seen, formats):
      scaled_OI = w_OI * s_1I
      change_OI = format.rounded(scaled_OI, format.scales_for(scaled_OI)) / s_1I - w_OI
      errors.append(jnp.sum(hessian.output_error(change_OI, one['gram']), -1 if own else None))
    return sum(errors)

  alphas = jnp.linspace(0, 1, grid)
  return scale(alphas[jnp.argmin(lax.map(error, alphas), 0)][..., None])


def _rescaled(statistics, s_I):
  """Of inputs divided by s_I."""
  return statistics | {'gram': statistics['gram'] / (s_I[..., :, None] * s_I[..., None, :]),
                       'magnitude': statistics['magnitude'] / s_I}


class Clipped:
  """A range (`formats.ranges`): each tile's extremes, shrunk by the factor that leaves the smallest output error, where a
  tile's error is counted by itself, as if its outputs met no others."""

  def __init__(self, gram_II, clips: int, least: float):
    self.gram_II, self.clips, self.least = gram_II, clips, least

  def extremes(self, tiles, format, reduce):
    low, high = format.range.extremes(tiles, format, reduce)
    q, b = tiles.shape[-2:]
    gram = self.gram_II.reshape(*self.gram_II.shape[:-2], q, b, q, b)
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


# ------------------------------------------------------------------ SmoothQuant

def smooth_quant(model, peaks, alpha: float, chosen):
  """The model with the channels of chosen producers divided by s_C, and what consumes them multiplied by it.

  peaks: the largest magnitudes of inputs, by the path of the first of the weights that share them (`calibration.sharing`).
  chosen: layer -> the couplings that are scaled."""
  def change(prefix, layer):
    first = calibration.sharing(layer)
    for coupling in chosen(layer):
      seen = {path: peaks[f'{prefix}/{first[path]}']['peak'] for path in coupling.consumers}
      layer = divided(layer, coupling, _smoothing(layer, coupling, seen, alpha))
    return layer
  return tree.rewrite(model, Block, change)


def _smoothing(layer, coupling, seen, alpha: float):
  """s_C of the producer: peak^alpha / weight^(1 - alpha) (SmoothQuant, eq. 4), the largest over all that read the channel; 1
  where either is 0."""
  nodes = dict(tree.select(layer, Weight))
  own = of_experts(nodes.get(coupling.producer))

  def largest(values):
    over = [coupling.to_channels(jnp.max(x, -2) if of_experts(nodes[path]) and not own else x, jnp.max)
            for path, x in values.items()]
    return functools.reduce(jnp.maximum, over)

  peak_C = largest(seen)
  # A router stays float, and decides nothing about what quantizing costs.
  weight_C = largest({path: jnp.max(jnp.abs(matrix_of(nodes[path])), -2) for path in coupling.consumers
                      if not path.endswith('router')})
  return jnp.where((peak_C > 0) & (weight_C > 0), peak_C ** alpha / weight_C ** (1 - alpha), 1)
