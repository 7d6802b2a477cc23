"""Low-precision training: the products of training in eight bits, forward and backward, from float weights."""
import dataclasses

from efficient_lm.compression.rules import LAYERS, check_pattern
from efficient_lm.errors import IncompatibleError

FORMATS = ('int8', 'float8_e4m3fn', 'float8_e5m2')   # as ops.low_precision_matmul names them


@dataclasses.dataclass(kw_only=True)
class LowPrecisionTraining:
  """Multiplies the weights whose path matches `where` in eight bits: `forward`, `dgrad` (the gradient of what they are
  multiplied with) and `wgrad` (that of the weights) each in its format, or in that of the model where it is None. With
  `stochastic`, gradients are rounded at random, so that they are right in the mean; the noise is new at each step. All three
  None is the plain model, bit for bit. Each device rounds what it holds, by scales and noise of its own: numbers differ from
  mesh to mesh as they do from seed to seed. Routers, embedding and head stay as they are unless `where` is widened (Banner
  et al. 2018, arXiv 1805.11046; float8: Micikevicius et al. 2022, arXiv 2209.05433)."""
  forward: str | None = 'int8'
  dgrad: str | None = 'int8'
  wgrad: str | None = 'int8'
  stochastic: bool = True
  where: str = LAYERS

  touches = 'model'

  def check(self):
    yield from check_pattern(self, 'where')
    for field in ('forward', 'dgrad', 'wgrad'):
      value = getattr(self, field)
      if value not in (None, *FORMATS): yield field, value, f'must be one of {", ".join(FORMATS)}, or None for no rounding'

  def __call__(self, learner, key):
    import jax

    from efficient_lm import tree
    from efficient_lm.compression import coverage, rewriting
    from efficient_lm.weights.low_precision import LowPrecision, low_precision
    from efficient_lm.weights.weight import Weight
    formats = {name: getattr(self, name) for name in ('forward', 'dgrad', 'wgrad')}
    noisy = self.stochastic and (self.dgrad or self.wgrad)
    found = dict(tree.select(learner.model, Weight, self.where))
    keys = dict(zip(found, jax.random.split(key, max(len(found), 1))))

    def lower(path, weight):
      rewriting.require_trainable(weight)
      if dict(tree.select(weight, LowPrecision)):
        raise IncompatibleError('is multiplied in low precision already, by another technique')
      if weight.axes[0] in 'VT':
        raise IncompatibleError(f'is looked up, and where it is the head too it stays float: narrow where = {self.where!r}')
      return low_precision(weight, formats, keys[path] if noisy else None)

    model = rewriting.apply_where(learner.model, self.where, lower)
    if not any(formats.values()): return learner
    said = ', '.join(f'{name} {format}' for name, format in formats.items() if format)
    note = coverage.coverage(learner.model, self.where).describe(f'LowPrecisionTraining ({said})')
    return learner.replace(model=model, notes=(*learner.notes, note))
