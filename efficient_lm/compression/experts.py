"""Mixtures of experts made of dense feed-forward layers."""
import functools
import re

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm import tree
from efficient_lm.compression.rewriting import named, require_trainable
from efficient_lm.errors import IncompatibleError
from efficient_lm.models.mlp import FeedForward
from efficient_lm.models.spec import Site
from efficient_lm.weights.biased import Biased
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.weight import Dense, Frozen, Weight


def upcycled(model, mixture, where: str, key):
  """The model with each dense feed-forward layer whose path matches replaced by `mixture(hidden)`, the description of an
  MoE, whose experts are copies of it; and the paths. Raises IncompatibleError where there is none, or one that is stored in
  few bits."""
  found = dict(tree.select(model, FeedForward, where))
  keys = dict(zip(found, jax.random.split(key, max(len(found), 1))))

  def change(path, feed_forward):
    if feed_forward.activation != 'silu' or dict(tree.select(feed_forward, Biased)):
      raise IncompatibleError(f'{path} is no SwiGLU without biases: experts are')
    for name, weight in tree.select(feed_forward, Weight): named(f'{path}/{name}', require_trainable, weight)
    one = functools.partial(_mixture, mixture)
    stack = feed_forward.gate.stack   # of a layer that is run by a loop with others; none of one that stands alone
    if not stack: return jax.jit(one)(feed_forward, keys[path])
    return jax.jit(jax.vmap(one))(feed_forward, jax.random.split(keys[path], stack[0]))

  return tree.rewrite(model, FeedForward, change, where), list(found)


def _mixture(mixture, feed_forward, key):
  """The MoE of one layer: every expert a copy of the dense layer, whatever kind its weights are."""
  dim, hidden = feed_forward.gate.shape
  made = mixture(hidden).build(Site(dim, 1, 1e-6), rngs=nnx.Rngs(params=key))
  for name in ('gate', 'up', 'down'):
    setattr(made.experts, name, _copies(getattr(feed_forward, name), made.num_experts))
  return made


def _copies(weight: Weight, num_experts: int) -> Weight:
  stacked = lambda array: jnp.broadcast_to(array, (num_experts, *array.shape))

  def change(_, node):
    if isinstance(node, Masked):
      keep = Frozen(stacked(node.keep.get_value()), axes='E' + node.axes)
      return Masked(_copies(node.inner, num_experts), keep, node.pattern)
    return node.replaced(stacked(node.materialize()), 'E' + node.axes)
  return tree.rewrite(weight, (Dense, Masked), change)


def followed(invariants: dict[str, tuple], where: str, num_experts: int) -> dict[str, tuple]:
  """What is promised of the weights of layers that `where` matches, promised of all experts that are copies of them."""
  moved = {}
  for path, promised in invariants.items():
    layer, _, name = path.rpartition('/')
    if name not in ('gate', 'up', 'down') or not re.search(where, layer): moved[path] = promised; continue
    moved[f'{layer}/experts/{name}'] = tuple(
      one.copied(num_experts, one.keep.ndim - 2) if hasattr(one, 'copied') else one for one in promised)
  return moved
