"""Post-training quantization, layer after layer, and the account of what each weight was calibrated on."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm import tree
from efficient_lm.compression import calibration, hessian, rewriting
from efficient_lm.compression.coupling import updated
from efficient_lm.compression.method import Method, RoundToNearest
from efficient_lm.compression.rules import Rule
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.low_precision import LowPrecision
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.quantized import Quantized, check_fits
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.rotated import within
from efficient_lm.weights.weight import Weight

ROWS = 128   # of each matrix, about, that the output error is measured on


def stored(weight: Weight, rule: Rule, encode, zeros=None):
  """A weight in the format of its rule, its matrix encoded by `encode(w_OI, keep_OI)`. Rotated inputs stay rotated, pruned
  entries zero. zeros: the sparsity pattern of what `encode` prunes, or None."""
  activations = None if rule.activations is None else Rounding(rule.activations)

  def change(inner):
    if isinstance(inner, LowPrecision): inner = inner.inner   # that was how gradients were computed
    check_fits(inner, activations=rule.activations)
    if rule.weights is None: return FakeQuantized(inner, None, activations)
    layout, masked = Layout.of(inner), isinstance(inner, Masked)
    keep_OI = layout.matrix(inner.keep.get_value()) if masked else None
    encoded = encode(layout.matrix(inner.materialize()), keep_OI)
    promised = (zeros and zeros.promised) or (inner.pattern if masked else None)
    if masked and not rule.weights.has_zero: return Masked(Quantized(encoded, rule.weights, layout, activations), inner.keep,
                                                           inner.pattern)
    return Quantized(encoded, rule.weights, layout, activations, keeps_zeros=masked or zeros is not None, pattern=promised)
  return within(weight, change)


def nearest(path: str, weight: Weight, rule: Rule, method: Method):
  """The weight by round-to-nearest, in the method's range; as if pruned, where the method will prune it. Raises
  IncompatibleError for one that has been quantized, or that the method cannot store."""
  rewriting.require_float(weight)
  in_layer = path.startswith('stacks/')
  if in_layer: method.check_fits(weight, rule.weights)
  encode = lambda w_OI, keep_OI: _to_nearest(w_OI, method=RoundToNearest(range=method.range), format=rule.weights)
  return stored(weight, rule, encode, method.prunes if in_layer else None)


class Layers:
  """Quantizes one layer after the other, as `calibration.layer_by_layer` brings them, and keeps account.

  done: paths of the weights that have been quantized. counts: of each, by layer, the tokens that it was calibrated on;
  gains: the squared output error that is left, in parts of that of RTN of the same (prepared) matrix. least: tokens below
  which a matrix is left to RTN.
  """

  def __init__(self, method: Method, decided: dict[str, Rule], least: int):
    self.method, self.least, self.decided = method, least, decided
    self.done, self.counts, self.gains = set(), {}, {}

  def __call__(self, prefix: str, layer, hidden):
    chosen = {path: rule for path, _ in tree.select(layer, Weight)
              if (rule := self.decided.get(f'{prefix}/{path}')) is not None and not rule.keeps}
    turns = calibration.in_turn(layer, chosen) if self.method.true_sequential else [list(chosen)]
    float_layer = layer
    for paths in turns: float_layer, layer = self.quantized(prefix, layer, {path: chosen[path] for path in paths}, hidden)
    return layer, calibration.advance(layer if self.method.carries_quantized else float_layer, hidden)

  def quantized(self, prefix: str, layer, chosen: dict[str, Rule], hidden):
    """The layer prepared, and that with these weights quantized."""
    formats = {path: rule.weights for path, rule in chosen.items() if rule.weights is not None}
    first = calibration.sharing(layer)
    wanted = {first[path]: (*self.method.needs, 'count') for path in formats}
    seen = calibration.layer_statistics(layer, hidden, wanted) if wanted else {}
    layer, found = self.method.prepare(layer, {path: seen[first[path]] for path in formats}, formats)
    changes = {}
    for path, rule in chosen.items():
      encode = functools.partial(self._encoded, f'{prefix}/{path}', formats.get(path), found.get(path))
      changes[path] = stored(dict(tree.select(layer, Weight))[path], rule, encode, self.method.prunes)
      self.done.add(f'{prefix}/{path}')
    return layer, updated(layer, changes)

  def _encoded(self, path: str, format, found, w_OI, keep_OI):
    encoded, gain = _encoded(w_OI, keep_OI, found, self.least, method=self.method, format=format)
    self.counts.setdefault(path, []).append(np.asarray(found['count'])[..., 0])
    self.gains.setdefault(path, []).append(gain)
    return encoded

  def notes(self, tokens: int) -> list[str]:
    """What the calibration saw, and what it was good for."""
    gains = {path: float(np.mean(jax.device_get(gain))) for path, gain in self.gains.items() if gain[0] is not None}
    helped = ''
    if gains:
      mean, worst = np.mean(list(gains.values())), max(gains, key=gains.get)
      plain = 'RTN' if self.method.prunes is None else 'magnitude and RTN'
      helped = f': output error {mean:.2f} of that of {plain}, at worst {gains[worst]:.2f} ({worst})'
    return [f'calibrated on {tokens} tokens{helped}', *self.of_experts()]

  def of_experts(self) -> list[str]:
    """How many tokens each expert saw, and which saw too few: a line for all weights that saw the same."""
    same = {}
    for path, counts in self.counts.items():
      counts_LE = np.stack(counts)
      if counts_LE.ndim == 2: same.setdefault(tuple(map(tuple, counts_LE.astype(int))), []).append(path)
    return [f'{", ".join(paths)}: {self.seen(np.array(counts_LE))}' for counts_LE, paths in same.items()]

  def seen(self, counts_LE) -> str:
    """Of the experts of all layers, in words."""
    few = ', '.join(f'{layer}.{expert}' for layer, expert in np.argwhere(counts_LE < self.least))
    plain = 'RTN' if self.method.prunes is None else 'magnitude and RTN'
    fallen = f'; {plain}, for want of {self.least}, of those of layer.expert {few}' if few else ''
    each = '; '.join(f'layer {i}: {" ".join(map(str, counts_E))}' for i, counts_E in enumerate(counts_LE))
    return f'an expert saw {counts_LE.min()} to {counts_LE.max()} tokens{fallen} ({each})'


@functools.partial(jax.jit, static_argnames=('method', 'format'))
def _to_nearest(w_OI, *, method: RoundToNearest, format):
  return method.encode(w_OI, format, {})


@functools.partial(jax.jit, static_argnames=('method', 'format'))
def _encoded(w_OI, keep_OI, found, least, *, method, format):
  """A matrix as the method encodes it, or by RTN where too few tokens were seen; its output error over that of RTN, or None
  where the method has no use for the Gram matrix."""
  to_nearest = method.without_data(w_OI, format, keep_OI)
  enough = found['count'][..., None] >= least
  quantized = method.encode(w_OI, format, found, keep_OI)
  chosen = jax.tree.map(lambda a, b: jnp.where(enough, a, b), quantized, to_nearest)
  if 'gram' not in found: return chosen, None
  every = max(1, w_OI.shape[-2] // ROWS)   # some rows tell: each has its error for itself
  change = lambda encoded: (format.decode(encoded) - w_OI)[..., ::every, :]
  error = lambda encoded: jnp.sum(hessian.output_error(change(encoded), found['gram']))
  return chosen, error(chosen) / jnp.maximum(error(to_nearest), jnp.finfo(jnp.float32).tiny)
