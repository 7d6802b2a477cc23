"""Rotations of the spaces between products, so that no channel stands out and what is quantized is nearly normal.

The names R1 … R4 are SpinQuant's (Liu et al. 2024, arXiv 2405.16406). Rotations are Hadamard matrices with random signs, in
blocks of the largest power of two that divides the dimension.
"""
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm import tree
from efficient_lm.compression.coupling import (
  RESIDUAL_NORMS,
  couplings,
  foldable,
  matrix_of,
  multiplied,
  updated,
  with_matrix,
  with_outputs,
  writers,
)
from efficient_lm.compression.rewriting import named, require_float
from efficient_lm.errors import IncompatibleError
from efficient_lm.models.layers import RMSNorm
from efficient_lm.models.transformer import Block
from efficient_lm.ops.hadamard import hadamard
from efficient_lm.weights.biased import beneath, unbiased
from efficient_lm.weights.layout import matrix_shape
from efficient_lm.weights.rotated import Rotated, block_of
from efficient_lm.weights.weight import Dense, Weight


@functools.partial(jax.jit, static_argnames=('residual', 'values', 'hidden'))
def rotated(model, key, *, residual: int, values: int, hidden: int):
  """The model with its residual stream (R1), values (R2) and hidden units (R4) rotated in blocks of at most so many, which
  computes the same. Raises IncompatibleError for a model with weights that are in few bits already."""
  require_all_float(model)
  if residual > 1: model = _residual(model, key, residual)

  def change(_, layer):
    if values > 1: layer = _values(layer, values)
    return _hidden(layer, hidden) if hidden > 1 else layer
  return tree.rewrite(model, Block, change)


def require_all_float(model):
  """Raises IncompatibleError for the first weight, embedding and head included, that has been quantized already."""
  for path, weight in tree.select(model, Weight): named(path, require_float, weight)


def blocks(model, *, residual: int, values: int, hidden: int) -> dict[str, set[int]]:
  """The sizes of blocks in which each space is rotated."""
  found = {'residual stream': {block_of(model.embed.shape[-1], residual)}, 'values': set(), 'hidden units': set()}
  for _, layer in tree.select(model, Block):
    nodes = dict(tree.select(layer, Weight))
    found['values'] |= {block_of(coupling.head, values) for coupling in _of_values(layer)}
    found['hidden units'] |= {block_of(matrix_shape(nodes[path])[1], hidden)
                              for coupling in _of_hidden(layer) for path in coupling.consumers}
  return found


def _residual(model, key, most: int):
  """R1: an RMSNorm without scales commutes with rotations. So the norms' scales are folded into the weights that read them;
  what writes the stream (embedding, output projections) is rotated, and what reads it is rotated back."""
  _require_rms('norm', model.norm)
  embed_VD = model.embed.materialize().astype(jnp.float32)
  D = embed_VD.shape[-1]
  sign_D = jax.random.rademacher(key, (D,), jnp.float32)
  rotate = lambda x: hadamard(x * sign_D, block_of(D, most))   # x R, of what lies along the stream
  changed = jax.tree.map(lambda leaf: leaf, model)
  head_VD = rotate(matrix_of(model.head) * model.norm.scale.get_value())
  changed.own_head = nnx.data(with_matrix(model.head, head_VD))   # None, where the head was tied, is no data
  changed.norm, changed.embed = _without_scales(model.norm), Dense(rotate(embed_VD), 'VD', 'D')
  if model.positions is not None: changed.positions = with_matrix(model.positions, rotate(matrix_of(model.positions)))
  return tree.rewrite(changed, Block, lambda path, layer: _residual_of_layer(path, layer, rotate))


def _residual_of_layer(prefix: str, layer, rotate):
  nodes = dict(tree.select(layer, (Weight, RMSNorm)))
  by_producer, changes = {coupling.producer: coupling for coupling in couplings(layer)}, {}
  for norm in RESIDUAL_NORMS:
    if getattr(layer, norm) is None or getattr(layer, norm.replace('norm', 'out_norm')) is not None:
      raise IncompatibleError(f'{prefix} has norms behind its branches: their scales keep the stream from being rotated')
    _require_rms(f'{prefix}/{norm}', nodes.get(norm))
    if norm not in by_producer:
      raise IncompatibleError(f'{prefix}/{norm}: who reads it is not known, so the stream cannot be rotated')
    scaled = multiplied(layer, by_producer[norm], nodes[norm].scale.get_value())
    changes |= {path: with_matrix(weight, rotate(matrix_of(weight))) for path, weight in scaled.items()}
    changes[norm] = _without_scales(nodes[norm])
  for path in writers(layer): changes[path] = with_outputs(nodes[path], rotate)
  return updated(layer, changes)


def _require_rms(path: str, norm):
  """Raises IncompatibleError for a norm that does not commute with rotations."""
  if not isinstance(norm, RMSNorm): raise IncompatibleError(f'{path} subtracts the mean, so the stream cannot be rotated')


def _without_scales(norm):
  return jax.tree.map(jnp.ones_like, norm)


def _of_values(layer):
  return [coupling for coupling in couplings(layer) if coupling.head > 1 and foldable(layer, coupling)]


def _values(layer, most: int):
  """R2: each head's values are rotated, and the output projection rotates back; both are merged into the weights. Blocks lie
  within a head, and all heads are rotated alike."""
  nodes, changes = dict(tree.select(layer, Weight)), {}
  for coupling in _of_values(layer):
    rotate = functools.partial(hadamard, block=block_of(coupling.head, most))
    changes[coupling.producer] = with_outputs(nodes[coupling.producer], rotate)
    changes |= {path: with_matrix(nodes[path], rotate(matrix_of(nodes[path]))) for path in coupling.consumers}
  return updated(layer, changes)


def _of_hidden(layer):
  nodes = dict(tree.select(layer, Weight))
  last = lambda path: path.endswith('/down') and not isinstance(unbiased(nodes[path]), Rotated)
  return [one for one in couplings(layer) if all(map(last, one.consumers))]


def _hidden(layer, most: int):
  """R4: what enters a feed-forward layer's last product has been through a nonlinearity, so it is rotated on the fly by
  `weights.rotated.Rotated`, and that product rotates back."""
  nodes, changes = dict(tree.select(layer, Weight)), {}
  for path in (path for coupling in _of_hidden(layer) for path in coupling.consumers):
    matrix_OI = matrix_of(nodes[path])
    block = block_of(matrix_OI.shape[-1], most)
    changes[path] = beneath(with_matrix(nodes[path], hadamard(matrix_OI, block)), lambda inner: Rotated(inner, block))
  return updated(layer, changes)
