"""Quantization after training, as a stage: calibrate on a few batches, then store weights in few bits.

  Quantize(rules=(Rule(weights=Int(bits=4, scales=Group(size=32))),), method=Gptq())

Rules say which weight gets which format. `before` makes the float model easier to round without changing what it computes;
`method` rounds, layer by layer. What lies outside the layers, embedding and head, is rounded to nearest where a rule names
it.
"""
import dataclasses
from typing import Any

from efficient_lm.compression import calibration, rules
from efficient_lm.compression.rules import Rule
from efficient_lm.formats import Group, Int
from efficient_lm.lazy import lazy

axes = lazy('efficient_lm.axes')
hessian = lazy('efficient_lm.compression.hessian')
jax = lazy('jax')
jnp = lazy('jax.numpy')
np = lazy('numpy')
quantized = lazy('efficient_lm.weights.quantized')
rotation = lazy('efficient_lm.weights.rotated')
tree = lazy('efficient_lm.tree')
weights = lazy('efficient_lm.weights.weight')
wiring = lazy('efficient_lm.compression.coupling')


ROWS = 128   # of each matrix, about, that the output error is measured on


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class RoundToNearest(calibration.Method):
  """Each number by itself, no calibration. `range`: of the scales, None for the format's own."""
  range: Any = None

  def encode(self, w_NK, format, statistics: dict):
    return format.encode(w_NK, format.scales_for(w_NK, self.range))


@dataclasses.dataclass(kw_only=True)
class Quantize:
  """The stage. `sequences` of the training distribution are calibrated on, rounded up to whole batches. A matrix that saw
  fewer than `least_tokens` of their tokens, as an unpopular expert may, is rounded to nearest, and named in the notes."""
  rules: tuple[Rule, ...] = (Rule(weights=Int(bits=4, scales=Group(size=128))),)
  method: Any = dataclasses.field(default_factory=RoundToNearest)
  before: tuple[Any, ...] = ()
  sequences: int = 128
  least_tokens: int = 64

  def check(self):
    yield from rules.check_rules(self.rules)
    if self.sequences < 1: yield 'sequences', self.sequences, 'must be at least 1'
    if self.least_tokens < 0: yield 'least_tokens', self.least_tokens, 'must be 0 or more'

  def __call__(self, model, context):
    """The model in few bits, and what there is to say of it."""
    notes = []
    for stage in self.before:
      model, said = stage(model, context)
      notes += said
    jax.eval_shape(self.rounded, model)   # refuses what does not fit before anything is calibrated
    notes.append(rules.describe(model, self.rules, f'Quantize ({type(self.method).__name__})'))
    layers = Layers(self, rules.assign(model, self.rules))
    if self.method.needs:
      batches = calibration.first_batches(context.batches(self.sequences), self.sequences)
      model = calibration.layer_by_layer(model, batches, layers)
      notes += layers.notes(sum(batch['inputs_BT'].size for batch in batches))
    rest = lambda path, weight, rule: weight if path in layers.done else self.nearest(path, weight, rule)
    model = rules.apply(model, self.rules, rest)
    return jax.device_put(model, axes.shardings(model, context.mesh)) if context.mesh is not None else model, tuple(notes)

  def abstract(self, model):
    """A model of the same structure and shapes, from shapes alone under `jax.eval_shape`."""
    for stage in self.before: model = stage.abstract(model)
    return self.rounded(model)

  def rounded(self, model):
    """All that rules name rounded to nearest. Raises Misfit, with its path, for a weight that cannot be stored so."""
    return rules.apply(model, self.rules, self.nearest)

  def nearest(self, path: str, weight, rule: Rule):
    """The weight rounded to nearest, by the method's range where it has one."""
    wiring.require_float(weight)
    encode = calibration.compiled(_to_nearest, static_argnames=('method', 'format'))
    return stored(weight, rule, lambda w_NK: encode(w_NK, method=_nearest(self.method), format=rule.weights))


def stored(weight, rule: Rule, encode):
  """A weight in the format of its rule, its matrix encoded by `encode(w_NK)`; rotated inputs stay rotated."""
  activations = None if rule.activations is None else quantized.Rounding(rule.activations)

  def change(inner):
    quantized.check_fits(inner, activations=rule.activations)
    if rule.weights is None: return quantized.FakeQuantized(inner, None, activations)
    layout = quantized.Layout.of(inner)
    return quantized.Quantized(encode(layout.matrix(inner.materialize())), rule.weights, layout, activations)
  return rotation.within(weight, change)


class Layers:
  """Rounds one layer after the other, as `calibration.layer_by_layer` brings them, and keeps account.

  done: paths of the weights that have been rounded. counts: of each, by layer, the tokens that it was calibrated on;
  gains: the squared output error that is left, in parts of that of rounding the same (prepared) matrix to nearest.
  """

  def __init__(self, stage: Quantize, decided: dict[str, Rule]):
    self.method, self.least, self.decided = stage.method, stage.least_tokens, decided
    self.done, self.counts, self.gains = set(), {}, {}

  def __call__(self, prefix: str, layer, hidden):
    chosen = {path: rule for path, _ in tree.select(layer, weights.Weight)
              if (rule := self.decided.get(f'{prefix}/{path}')) is not None and not rule.keeps}
    turns = calibration.in_turn(layer, chosen) if self.method.true_sequential else [list(chosen)]
    float_layer = layer
    for paths in turns: float_layer, layer = self.round(prefix, layer, {path: chosen[path] for path in paths}, hidden)
    return layer, calibration.advance(layer if self.method.carries_rounded else float_layer, hidden)

  def round(self, prefix: str, layer, chosen: dict[str, Rule], hidden):
    """The layer prepared, and with these weights rounded."""
    formats = {path: rule.weights for path, rule in chosen.items() if rule.weights is not None}
    first = calibration.sharing(layer)
    wanted = {first[path]: (*self.method.needs, 'count') for path in formats}
    seen = calibration.layer_statistics(layer, hidden, wanted) if wanted else {}
    layer, found = self.method.prepare(layer, {path: seen[first[path]] for path in formats}, formats)
    changes = {}
    for path, rule in chosen.items():
      whole = f'{prefix}/{path}'
      encode = lambda w_NK, path=path, whole=whole: self._encoded(whole, w_NK, formats[path], found[path])
      changes[path] = stored(dict(tree.select(layer, weights.Weight))[path], rule, encode)
      self.done.add(whole)
    return layer, wiring.updated(layer, changes)

  def _encoded(self, path: str, w_NK, format, found):
    encode = calibration.compiled(_encoded, static_argnames=('method', 'format'))
    encoded, gain = encode(w_NK, found, self.least, method=self.method, format=format)
    self.counts.setdefault(path, []).append(np.asarray(found['count'])[..., 0])
    self.gains.setdefault(path, []).append(gain)
    return encoded

  def notes(self, tokens: int) -> list[str]:
    """What the calibration saw, and what it was good for."""
    gains = {path: float(np.mean(jax.device_get(gain))) for path, gain in self.gains.items() if gain[0] is not None}
    helped = ''
    if gains:
      mean, worst = np.mean(list(gains.values())), max(gains, key=gains.get)
      helped = f': output error {mean:.2f} of that of rounding to nearest, at worst {gains[worst]:.2f} ({worst})'
    return [f'calibrated on {tokens} tokens{helped}', *self.of_experts()]

  def of_experts(self) -> list[str]:
    """How many tokens each expert saw, and which saw too few: a line for all weights that saw the same."""
    same = {}
    for path, counts in self.counts.items():
      counts_LE = np.stack(counts)
      if counts_LE.ndim == 2: same.setdefault(tuple(map(tuple, counts_LE.astype(int))), []).append(path)
    return [f'{", ".join(paths)}: {self.seen(np.array(counts_LE))}' for counts_LE, paths in same.items()]

  def seen(self, counts_LE) -> str:
    few = ', '.join(f'{layer}.{expert}' for layer, expert in np.argwhere(counts_LE < self.least))
    fallen = f'; rounded to nearest, for want of {self.least}, those of layer.expert {few}' if few else ''
    each = '; '.join(f'layer {i}: {" ".join(map(str, counts_E))}' for i, counts_E in enumerate(counts_LE))
    return f'an expert saw {counts_LE.min()} to {counts_LE.max()} tokens{fallen} ({each})'


def _nearest(method) -> RoundToNearest:
  """What stands in for a method where there is nothing to go by: the same ranges, and no calibration."""
  return RoundToNearest(range=getattr(method, 'range', None))


def _to_nearest(w_NK, *, method: RoundToNearest, format):
  return method.encode(w_NK, format, {})


def _encoded(w_NK, found, least, *, method, format):
  """A matrix as the method encodes it, or to nearest where too few tokens were seen; its output error over that of nearest,
  or None where the method has no use for the Gram matrix."""
  nearest = _nearest(method).encode(w_NK, format, found)
  enough = found['count'][..., None] >= least
  rounded = jax.tree.map(lambda a, b: jnp.where(enough, a, b), method.encode(w_NK, format, found), nearest)
  if 'gram' not in found: return rounded, None
  every = max(1, w_NK.shape[-2] // ROWS)   # some rows tell: each has its error for itself
  change = lambda encoded: (format.decode(encoded) - w_NK)[..., ::every, :]
  error = lambda encoded: jnp.sum(hessian.output_error(change(encoded), found['gram']))
  return rounded, error(rounded) / jnp.maximum(error(nearest), jnp.finfo(jnp.float32).tiny)
