"""What a model has and computes, counted from its shapes: parameters and FLOPs."""
import dataclasses
import functools
import math

import jax

from efficient_lm.compression.coverage import active_share, is_multiplied, num_biases
from efficient_lm.models.attention import GroupedQueryAttention, LatentAttention
from efficient_lm.models.transformer import Block
from efficient_lm.tree import is_variable, select, size
from efficient_lm.weights.weight import Weight


@dataclasses.dataclass(frozen=True)
class Parameters:
  """Numbers of parameters: all; those that one token is multiplied with or looked up in; those of the embedding
  and of a table of positions."""
  total: int
  active: int
  embedding: int


@dataclasses.dataclass(frozen=True)
class Flops:
  """FLOPs of one token: a forward pass; training, three times that (the backward pass takes two products for one)."""
  forward: float
  training: float


def parameters(model) -> Parameters:
  """Counts a model's parameters; of `num_experts` experts, `active_experts` are active. Works on shapes as on arrays.

  A weight counts as the matrix that it stands for: quantized, its scales are not counted; factored, its product is.
  """
  weights = {path: (math.prod(weight.shape), weight.axes) for path, weight in select(model, Weight)}
  leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda node: isinstance(node, Weight) or is_variable(node))
  others = sum(size(leaf) for _, leaf in leaves if is_variable(leaf)) + num_biases(model)
  active = sum(count * active_share(model, path) for path, (count, _) in weights.items())
  embedding = sum(count for count, axes in weights.values() if axes in ('VD', 'TD'))
  return Parameters(sum(count for count, _ in weights.values()) + others, round(active) + others, embedding)


def mean_keys(sequence_length: int, window: int | None = None) -> float:
  """How many keys a query attends to, on average over the sequence, itself included."""
  window = min(window or sequence_length, sequence_length)
  return (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length


@functools.singledispatch
def attention_flops(layer, sequence_length: int) -> float:
  """Forward FLOPs a token of what an attention layer does beside its weights; a new kind of layer registers its own."""
  raise TypeError(f'no FLOP count is registered for {type(layer).__name__}: see measure.attention_flops')


@attention_flops.register
def _(layer: GroupedQueryAttention, sequence_length):
  *layers, _, N, H = layer.query.shape
  return 2 * 2 * math.prod(layers) * N * H * mean_keys(sequence_length, layer.window)


@attention_flops.register
def _(layer: LatentAttention, sequence_length):
  *layers, _, N, nope = layer.query_nope.shape
  rope, value = layer.query_rope.shape[-1], layer.value_up.shape[-1]
  return 2 * math.prod(layers) * N * (nope + rope + value) * mean_keys(sequence_length)


def flops_per_token(model, sequence_length: int) -> Flops:
  """Analytic FLOPs of one token in sequences of that length. Works on shapes as on arrays.

  Two a multiply-add; of experts only the active ones; causal attention counted once (a query meets the keys up to itself,
  not the whole square); the head counts, looking up an embedding does not, nor do norms, softmax, rotation and gates. Zeros
  count, masked ones too: they are multiplied; blocks that are not stored (`BlockSparse`) do not, since they are not;
  adapters beside a weight do. So training takes close to 6 N of Kaplan et al. 2020, eq. 2.2, plus attention. Recomputation
  does not count.
  """
  tied = getattr(model, 'own_head', True) is None
  forward = 0.0
  for path, weight in select(model, Weight):
    if is_multiplied(weight, tied): forward += 2 * weight.num_multiplied * active_share(model, path)
  forward += sum(attention_flops(block.attention, sequence_length) for _, block in select(model, Block))
  return Flops(forward, 3 * forward)
