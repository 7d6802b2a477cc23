"""Rotate (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456; the names R1 … R4 are SpinQuant's, Liu et al. 2024, arXiv
2405.16406): turn the spaces between products, so that no channel stands out, and what is rounded is nearly normal.

R1, residual stream: an RMSNorm without scales commutes with rotations. So the norms' scales are folded into the weights that
read them, what writes the stream (embedding, output projections) is turned, and what reads it is turned back.
R2, values: each head's values are turned, and the output projection turns back. Both are merged into the weights.
R4, hidden units: what enters a gated layer's last product has been through a nonlinearity, so it is turned on the fly by
`rotation.Rotated`, at F * log2(F) additions a token or a product with a small matrix, and that product turns back.

Rotations are Hadamard matrices with random signs, in blocks of the largest power of two that divides the dimension.
"""
import dataclasses
import functools

from efficient_lm.compression.calibration import compiled
from efficient_lm.errors import Misfit
from efficient_lm.lazy import lazy

jax = lazy('jax')
jnp = lazy('jax.numpy')
layers = lazy('efficient_lm.models.layers')
nnx = lazy('flax.nnx')
rotation = lazy('efficient_lm.weights.rotated')
transformer = lazy('efficient_lm.models.transformer')
tree = lazy('efficient_lm.tree')
weights = lazy('efficient_lm.weights.weight')
wiring = lazy('efficient_lm.compression.coupling')


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Rotate:
  """A stage, to stand in front of rounding. `residual`, `values`, `hidden`: the largest block of R1, R2 and R4, a power of
  two; 1 leaves that space as it is. A tied head becomes an array of its own: it takes up the last norm's scales."""
  residual: int = 4096
  values: int = 4096
  hidden: int = 4096

  def check(self):
    for name, size in dataclasses.asdict(self).items():
      if size < 1 or size & (size - 1): yield name, size, 'must be a power of two'

  def __call__(self, model, context):
    """The model turned, which computes the same, and a line on what was done."""
    turned = compiled(_turned, static_argnames='stage')(model, context.key, stage=self)
    untied = model.own_head is None and self.residual > 1
    return turned, (f'Rotate: {self.described(model)}{"; the tied head became an array of its own" if untied else ""}',)

  def abstract(self, model):
    """The same structure, from shapes alone."""
    return _turned(model, jax.random.key(0), stage=self)

  def described(self, model) -> str:
    """What is turned in blocks of how many."""
    D = jax.eval_shape(lambda: model.embed.materialize()).shape[-1]
    found = {'residual stream': {rotation.block_of(D, self.residual)}, 'values': set(), 'hidden units': set()}
    for _, layer in tree.select(model, transformer.Block):
      nodes = dict(tree.select(layer, weights.Weight))
      found['values'] |= {rotation.block_of(fan.head, self.values) for fan in _of_values(layer)}
      found['hidden units'] |= {rotation.block_of(wiring.matrix_shape(nodes[path])[1], self.hidden)
                                for fan in _of_hidden(layer) for path in fan.readers}
    return ', '.join(f'{name} in blocks of {", ".join(map(str, sorted(sizes)))}' for name, sizes in found.items() if sizes)


def _turned(model, key, *, stage: Rotate):
  if stage.residual > 1: model = _residual(model, key, stage.residual)

  def change(_, layer):
    if stage.values > 1: layer = _values(layer, stage.values)
    return _hidden(layer, stage.hidden) if stage.hidden > 1 else layer
  return tree.rewrite(model, transformer.Block, change)


def _residual(model, key, most: int):
  """R1."""
  embed_VD = model.embed.materialize().astype(jnp.float32)
  D = embed_VD.shape[-1]
  sign_D = jax.random.rademacher(key, (D,), jnp.float32)
  turn = lambda x: rotation.hadamard(x * sign_D, rotation.block_of(D, most))   # x R, of what lies along the stream
  changed = jax.tree.map(lambda leaf: leaf, model)
  head_VD = turn(wiring.matrix_of(model.head) * model.norm.scale.get_value())
  changed.own_head = nnx.data(wiring.with_matrix(model.head, head_VD))   # None, where the head was tied, is no data
  changed.norm, changed.embed = _without_scales(model.norm), weights.Dense(turn(embed_VD), 'VD', 'D')
  return tree.rewrite(changed, transformer.Block, lambda path, layer: _residual_of_layer(path, layer, turn))


def _residual_of_layer(prefix: str, layer, turn):
  nodes, fans = dict(tree.select(layer, (weights.Weight, layers.RMSNorm))), {fan.source: fan for fan in wiring.fans(layer)}
  changes = {}
  for norm in wiring.RESIDUAL_NORMS:
    if norm not in fans: raise Misfit(f'{prefix}/{norm}: who reads it is not known, so the stream cannot be turned')
    scaled = wiring.multiplied(layer, fans[norm], nodes[norm].scale.get_value())
    changes |= {path: wiring.with_matrix(weight, turn(wiring.matrix_of(weight))) for path, weight in scaled.items()}
    changes[norm] = _without_scales(nodes[norm])
  for path in wiring.writers(layer): changes[path] = _outputs_turned(nodes[path], turn)
  return wiring.updated(layer, changes)


def _without_scales(norm):
  return jax.tree.map(jnp.ones_like, norm)


def _outputs_turned(weight, turn):
  turned_KN = turn(jnp.swapaxes(wiring.matrix_of(weight), -1, -2))
  return wiring.with_matrix(weight, jnp.swapaxes(turned_KN, -1, -2))


def _of_values(layer):
  return [fan for fan in wiring.fans(layer) if fan.head > 1 and wiring.foldable(layer, fan)]


def _values(layer, most: int):
  """R2. Blocks lie within a head, and all heads are turned alike."""
  nodes, changes = dict(tree.select(layer, weights.Weight)), {}
  for fan in _of_values(layer):
    turn = functools.partial(rotation.hadamard, block=rotation.block_of(fan.head, most))
    changes[fan.source] = _outputs_turned(nodes[fan.source], turn)
    changes |= {path: wiring.with_matrix(nodes[path], turn(wiring.matrix_of(nodes[path]))) for path in fan.readers}
  return wiring.updated(layer, changes)


def _of_hidden(layer):
  return [fan for fan in wiring.fans(layer) if fan.source.endswith('/up') and wiring.foldable(layer, fan)]


def _hidden(layer, most: int):
  """R4."""
  nodes, changes = dict(tree.select(layer, weights.Weight)), {}
  for path in (path for fan in _of_hidden(layer) for path in fan.readers):
    matrix_NK = wiring.matrix_of(nodes[path])
    block = rotation.block_of(matrix_NK.shape[-1], most)
    changes[path] = rotation.Rotated(wiring.with_matrix(nodes[path], rotation.hadamard(matrix_NK, block)), block)
  return wiring.updated(layer, changes)
