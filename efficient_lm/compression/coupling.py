"""Coupled dimensions: which weights of a layer read the same channels, and where a scale or a rotation of these can be moved
from one weight into those beside it.

A Coupling is a producer of channels and the weights that consume them. The producer is a norm, or a weight whose outputs
reach the consumers channel by channel: values reach the output projection through attention, which mixes tokens only, and
`up` reaches `down`, in whose product it is linear. So channel c of a producer may be divided by any number if all consumers
multiply their input c by it. All consumers have to be named: a norm before a mixture is read by router, experts and shared
experts alike. Where the channels that weights share have no producer that could be divided (the residual stream, what an
activation makes), a Coupling without one says who shares them.
"""
import dataclasses

import jax
import jax.numpy as jnp

from efficient_lm import tree
from efficient_lm.compression.rewriting import is_float, require_float
from efficient_lm.models.attention import GroupedQueryAttention, LatentAttention
from efficient_lm.models.layers import LayerNorm, RMSNorm
from efficient_lm.models.mlp import FeedForward, PlainFeedForward, SigmoidGated
from efficient_lm.models.moe.layer import MoE
from efficient_lm.weights.biased import Biased, unbiased
from efficient_lm.weights.layout import Layout, matrix_shape
from efficient_lm.weights.low_precision import LowPrecision
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.rotated import Rotated
from efficient_lm.weights.weight import Dense, Weight


@dataclasses.dataclass(frozen=True)
class Coupling:
  """producer: path of a norm or Weight, '' for none; consumers: paths of all Weights that read it. A producer with heads has
  channels of `head` numbers each, and each of its heads is read by `repeats` successive heads of the consumers."""
  producer: str
  consumers: tuple[str, ...]
  head: int = 1
  repeats: int = 1

  def to_inputs(self, s_C):
    """(..., C) of the producer's channels -> (..., I) of the consumers' inputs."""
    heads = s_C.reshape(*s_C.shape[:-1], -1, 1, self.head)
    wide = jnp.broadcast_to(heads, (*heads.shape[:-2], self.repeats, self.head))
    return wide.reshape(*s_C.shape[:-1], -1)

  def to_channels(self, s_I, reduce):
    """(..., I) of the consumers' inputs -> (..., C), `reduce` (such as jnp.max) over those of one channel."""
    return reduce(s_I.reshape(*s_I.shape[:-1], -1, self.repeats, self.head), axis=-2).reshape(*s_I.shape[:-1], -1)


def couplings(layer) -> list[Coupling]:
  """All that are known of a layer (`models.transformer.Block`), whatever its stack in front, in the order of computation."""
  before = lambda name: '' if getattr(layer, name) is None else f'/{name}'
  return [*_prefixed('attention', _attention(layer.attention, before('attention_norm'))),
          *_prefixed('mlp', _feed_forward(layer.mlp, before('mlp_norm')))]


RESIDUAL_NORMS = ('attention_norm', 'mlp_norm')   # those that read the residual stream
NORMS = (RMSNorm, LayerNorm)


def writers(layer) -> list[str]:
  """Paths of the weights whose outputs are added to the residual stream."""
  return [path for path, weight in tree.select(layer, Weight) if weight.axes.endswith('D')]


def _prefixed(prefix: str, found: list[Coupling]) -> list[Coupling]:
  named = lambda path: path.removeprefix('/') if path.startswith('/') or not path else f'{prefix}/{path}'
  move = lambda one: dataclasses.replace(one, producer=named(one.producer), consumers=tuple(map(named, one.consumers)))
  return list(map(move, found))


def _attention(layer, norm: str) -> list[Coupling]:
  """Paths are the layer's own, with a slash in front those of the block. norm: that before the layer, or ''."""
  if isinstance(layer, GroupedQueryAttention):
    repeats = matrix_shape(layer.output)[1] // matrix_shape(layer.value)[0]
    return [Coupling(norm, ('query', 'key', 'value')),
            Coupling('value', ('output',), layer.value.shape[-1], repeats)]
  if isinstance(layer, LatentAttention):
    queries = ('query_nope', 'query_rope')
    direct, low = (queries, []) if layer.query_down is None else (('query_down',), [Coupling('query_norm', queries)])
    return [Coupling(norm, (*direct, 'latent_down', 'key_rope')), *low,
            Coupling('latent_norm', ('key_up', 'value_up')), Coupling('value_up', ('output',), layer.value_up.shape[-1])]
  return []


def _feed_forward(layer, norm: str) -> list[Coupling]:
  if not isinstance(layer, MoE): return [Coupling(norm, _readers(layer)), *_inside(layer)] if _readers(layer) else []
  shared = () if layer.shared is None else tuple(f'shared/{path}' for path in _readers(layer.shared))
  if layer.shared is not None and not shared: return []   # a layer that is not known reads the norm as well
  inside = [] if layer.shared is None else _prefixed('shared', _inside(layer.shared))
  return [Coupling(norm, ('router', 'experts/gate', 'experts/up', *shared)),
          Coupling('experts/up', ('experts/down',)), *inside]


def _readers(layer) -> tuple[str, ...]:
  """Paths of the weights that read what a feed-forward layer is given; none of a layer that is not known."""
  if isinstance(layer, FeedForward): return 'gate', 'up'
  if isinstance(layer, PlainFeedForward): return ('up',)
  if not isinstance(layer, SigmoidGated) or not _readers(layer.inner): return ()
  return 'gate_out', *(f'inner/{path}' for path in _readers(layer.inner))


def _inside(layer) -> list[Coupling]:
  """What a feed-forward layer that `_readers` knows hands on. `up` reaches `down` linearly only where there is a gate."""
  if isinstance(layer, SigmoidGated): return _prefixed('inner', _inside(layer.inner))
  return [Coupling('up' if isinstance(layer, FeedForward) else '', ('down',))]


def matrix_of(weight: Weight):
  """(..., O, I) float32: the weight's values as a matrix."""
  return Layout.of(weight).matrix(weight.materialize()).astype(jnp.float32)


def with_matrix(weight: Weight, matrix_OI) -> Weight:
  """A float weight with another matrix, in float32, and its own bias. Raises IncompatibleError for one that is stored or
  trained in few bits: it would lose them. A mask is gone: where inputs or outputs have been mixed with each other, no zero
  stays one."""
  require_float(weight)
  if isinstance(weight, Biased): return weight.around(lambda inner: with_matrix(inner, matrix_OI))
  layout = Layout.of(weight)
  return Dense(layout.array(matrix_OI), layout.axes, layout.inputs)


def with_scaled_matrix(weight: Weight, matrix_OI) -> Weight:
  """As `with_matrix`, of a matrix whose inputs or outputs have been scaled: what was zero is, so a mask stays."""
  if isinstance(weight, Biased): return weight.around(lambda inner: with_scaled_matrix(inner, matrix_OI))
  if isinstance(weight, LowPrecision): return with_scaled_matrix(weight.inner, matrix_OI)
  if isinstance(weight, Masked): return weight.around(lambda inner: with_scaled_matrix(inner, matrix_OI))
  return with_matrix(weight, matrix_OI)


def with_outputs(weight: Weight, change, with_matrix=with_matrix) -> Weight:
  """A float weight whose outputs are changed by a linear `change` of the last dimension of (..., I, O): of its matrix, and
  of its bias as a matrix of one input."""
  changed_IO = change(jnp.swapaxes(matrix_of(weight), -1, -2))
  made = with_matrix(weight, jnp.swapaxes(changed_IO, -1, -2))
  if not isinstance(made, Biased): return made
  bias = weight.bias.get_value()
  bias_1O = bias.astype(jnp.float32).reshape(*weight.stack, 1, -1)   # experts have none
  return Biased(made.inner, change(bias_1O).reshape(bias.shape))


def updated(layer, changes: dict):
  """The layer with the weights and norms at these paths replaced."""
  kinds = (Weight, *NORMS)
  replace = lambda path, node: changes.get(tree.path_name(path), node)
  return jax.tree_util.tree_map_with_path(replace, layer, is_leaf=lambda node: isinstance(node, kinds))


def of_experts(node) -> bool:
  """Whether there is one of it for each expert."""
  return isinstance(node, Weight) and node.axes.startswith('E')


def foldable(layer, coupling: Coupling) -> bool:
  """Whether its channels can be scaled: not where they have no producer, or are rotated on the way, nor where a weight is in
  few bits."""
  if not coupling.producer: return False
  nodes = dict(tree.select(layer, Weight))
  found = [nodes[path] for path in (coupling.producer, *coupling.consumers) if path in nodes]
  return all(is_float(weight) and not isinstance(unbiased(weight), Rotated) for weight in found)


def multiplied(layer, coupling: Coupling, s_C) -> dict[str, Weight]:
  """The consumers by path, input c of each multiplied by s_c.

  s_C: (..., C), stacks of layers in front; and experts, where the producer is theirs."""
  nodes, consumers = dict(tree.select(layer, Weight)), {}
  for path in coupling.consumers:
    s_1I = coupling.to_inputs(s_C)[..., None, :]
    if of_experts(nodes[path]) and not of_experts(nodes.get(coupling.producer)): s_1I = s_1I[..., None, :, :]
    consumers[path] = with_scaled_matrix(nodes[path], matrix_of(nodes[path]) * s_1I)
  return consumers


def divided(layer, coupling: Coupling, s_C):
  """The same layer, with channel c of the producer divided by s_c, and all that consumes it multiplied by it."""
  producer = dict(tree.select(layer, (Weight, *NORMS)))[coupling.producer]
  if isinstance(producer, NORMS): producer = jax.tree.map(lambda scale: scale / s_C.reshape(scale.shape), producer)
  else: producer = with_outputs(producer, lambda x_IO: x_IO / s_C[..., None, :], with_scaled_matrix)
  # A consumer may be the producer of another coupling, but never of its own.
  return updated(layer, {coupling.producer: producer, **multiplied(layer, coupling, s_C)})
