"""Who reads what inside a layer: where a scale or a rotation can be moved from one weight into those beside it.

A `Fan` is a place in a layer, and the weights that read it. The place is a norm, or a weight whose outputs reach the readers
channel by channel: values reach the output projection through attention, which mixes tokens only, and `up` reaches
`down`, in whose product it is linear. So channel c of a source may be divided by any number if all readers multiply their
input c by it. All readers have to be named: a norm before a mixture is read by router, experts and shared experts alike.
"""
import dataclasses

import jax
import jax.numpy as jnp

from efficient_lm import tree
from efficient_lm.errors import Misfit
from efficient_lm.models.attention import GroupedQueryAttention, LatentAttention
from efficient_lm.models.layers import RMSNorm
from efficient_lm.models.mlp import FeedForward
from efficient_lm.models.moe.layer import MoE
from efficient_lm.weights.quantized import FakeQuantized, Layout, Normalized, Quantized
from efficient_lm.weights.rotated import Rotated, innermost
from efficient_lm.weights.weight import Dense, Weight


@dataclasses.dataclass(frozen=True)
class Fan:
  """source: path of an RMSNorm or Weight; readers: paths of all Weights that read it. A source with heads has channels of
  `head` numbers each, and each of its heads is read by `repeats` successive heads of the readers."""
  source: str
  readers: tuple[str, ...]
  head: int = 1
  repeats: int = 1

  def spread(self, s_C):
    """(..., C) of the source's channels -> (..., K) of the readers' inputs."""
    heads = s_C.reshape(*s_C.shape[:-1], -1, 1, self.head)
    wide = jnp.broadcast_to(heads, (*heads.shape[:-2], self.repeats, self.head))
    return wide.reshape(*s_C.shape[:-1], -1)

  def gather(self, s_K, reduce):
    """(..., K) of the readers' inputs -> (..., C), `reduce` (such as jnp.max) over those of one channel."""
    return reduce(s_K.reshape(*s_K.shape[:-1], -1, self.repeats, self.head), axis=-2).reshape(*s_K.shape[:-1], -1)


def fans(layer) -> list[Fan]:
  """All that are known of a layer (`models.transformer.Block`), whatever its stack in front, in the order of computation."""
  return [*_prefixed('attention', _attention(layer.attention, 'attention_norm')),
          *_prefixed('mlp', _feed_forward(layer.mlp, 'mlp_norm'))]


RESIDUAL_NORMS = ('attention_norm', 'mlp_norm')   # those that read the residual stream


def writers(layer) -> list[str]:
  """Paths of the weights whose outputs are added to the residual stream."""
  return [path for path, weight in tree.select(layer, Weight) if weight.axes.endswith('D')]


def _prefixed(prefix: str, found: list[Fan]) -> list[Fan]:
  named = lambda path: path.removeprefix('/') if path.startswith('/') else f'{prefix}/{path}'
  return [dataclasses.replace(fan, source=named(fan.source), readers=tuple(map(named, fan.readers))) for fan in found]


def _attention(layer, norm: str) -> list[Fan]:
  """Paths are the layer's own, with a slash in front those of the block."""
  if isinstance(layer, GroupedQueryAttention):
    repeats = matrix_shape(layer.output)[1] // matrix_shape(layer.value)[0]
    return [Fan(f'/{norm}', ('query', 'key', 'value')), Fan('value', ('output',), _head_dim(layer.value), repeats)]
  if isinstance(layer, LatentAttention):
    queries = ('query_nope', 'query_rope')
    direct, low = (queries, []) if layer.query_down is None else (('query_down',), [Fan('query_norm', queries)])
    return [Fan(f'/{norm}', (*direct, 'latent_down', 'key_rope')), *low, Fan('latent_norm', ('key_up', 'value_up')),
            Fan('value_up', ('output',), _head_dim(layer.value_up))]
  return []


def _feed_forward(layer, norm: str) -> list[Fan]:
  if isinstance(layer, FeedForward): return [Fan(f'/{norm}', ('gate', 'up')), Fan('up', ('down',))]
  if not isinstance(layer, MoE): return []
  shared = [] if layer.shared is None else [Fan('shared/up', ('shared/down',))]
  also = () if layer.shared is None else ('shared/gate', 'shared/up')
  return [Fan(f'/{norm}', ('router', 'experts/gate', 'experts/up', *also)), Fan('experts/up', ('experts/down',)), *shared]


def _head_dim(weight: Weight) -> int:
  return jax.eval_shape(lambda weight: weight.materialize(), weight).shape[-1]


def matrix_of(weight: Weight):
  """(..., N, K) float32, what the weight is worth."""
  return Layout.of(weight).matrix(weight.materialize()).astype(jnp.float32)


def matrix_shape(weight: Weight) -> tuple[int, int]:
  """N outputs and K inputs."""
  return jax.eval_shape(matrix_of, weight).shape[-2:]


def with_matrix(weight: Weight, matrix_NK) -> Dense:
  """A float weight with another matrix, in float32. Raises Misfit for one that is in few bits, or was trained as if: it
  would lose them."""
  if not is_float(weight):
    raise Misfit(f'a weight that is {weight.kind} takes up no scale or rotation: do that before it is rounded')
  layout = Layout.of(weight)
  return Dense(layout.array(matrix_NK), layout.axes, layout.inputs)


def is_float(weight: Weight) -> bool:
  """Whether it may have another matrix. A weight in low precision may: that is how gradients were computed."""
  return not isinstance(weight, (Quantized, FakeQuantized, Normalized))


def require_float(weight: Weight):
  """Raises Misfit, with what it is, for a weight that is to be rounded and has been already."""
  if is_float(innermost(weight)): return
  if dict(tree.select(weight, Quantized)): raise Misfit(f'is stored as {weight.kind} already')
  raise Misfit(f'was trained as {weight.kind}: the stage Convert() stores it so')


def updated(layer, changes: dict):
  """The layer with the weights and norms at these paths replaced."""
  kinds = (Weight, RMSNorm)
  replace = lambda path, node: changes.get(tree.path_name(path), node)
  return jax.tree_util.tree_map_with_path(replace, layer, is_leaf=lambda node: isinstance(node, kinds))


def of_experts(node) -> bool:
  """Whether there is one of it for each expert."""
  return isinstance(node, Weight) and node.axes.startswith('E')


def foldable(layer, fan: Fan) -> bool:
  """Whether the fan's channels can be scaled: not where they are rotated on the way, nor where a weight is in few bits."""
  nodes = dict(tree.select(layer, Weight))
  found = [nodes[path] for path in (fan.source, *fan.readers) if path in nodes]
  return all(is_float(weight) and not isinstance(weight, Rotated) for weight in found)


def multiplied(layer, fan: Fan, s_C) -> dict[str, Weight]:
  """The fan's readers by path, input c of each multiplied by s_c.

  s_C: (..., C), stacks of layers in front; and experts, where the fan's source is theirs."""
  nodes, readers = dict(tree.select(layer, Weight)), {}
  for path in fan.readers:
    s_1K = fan.spread(s_C)[..., None, :]
    if of_experts(nodes[path]) and not of_experts(nodes.get(fan.source)): s_1K = s_1K[..., None, :, :]
    readers[path] = with_matrix(nodes[path], matrix_of(nodes[path]) * s_1K)
  return readers


def divided(layer, fan: Fan, s_C):
  """The same layer, with channel c of the fan's source divided by s_c, and all that reads it multiplied by it."""
  source = dict(tree.select(layer, (Weight, RMSNorm)))[fan.source]
  if isinstance(source, RMSNorm): source = jax.tree.map(lambda scale: scale / s_C.reshape(scale.shape), source)
  else: source = with_matrix(source, matrix_of(source) / s_C[..., :, None])
  # A reader may be the source of another fan, but never of its own.
  return updated(layer, {fan.source: source, **multiplied(layer, fan, s_C)})
