"""What a model is, read off the model itself: the description that would build its like.

A run's config says what a run began with. Stages may have put experts where a feed-forward layer was, or taken stacks apart,
and a model has to be described as it is when it leaves.
"""
import dataclasses
from typing import Any

import jax

from efficient_lm.errors import IncompatibleError
from efficient_lm.models import spec
from efficient_lm.models.attention import GroupedQueryAttention, LatentAttention
from efficient_lm.models.layers import LayerNorm
from efficient_lm.models.mlp import FeedForward, PlainFeedForward, SigmoidGated
from efficient_lm.models.moe.layer import MoE
from efficient_lm.models.rope import Rope
from efficient_lm.models.transformer import Block, Repeated, Unrolled
from efficient_lm.weights.biased import Biased


def layers(model) -> list[tuple[Block, int | None]]:
  """Its layers in the order of computation: each as the Block that holds it and its number in that, or None where the block
  is the layer. Nothing is copied."""
  found = []
  for stack in model.stacks:
    if isinstance(stack, Unrolled): found += [(block, None) for block in stack.blocks]
    elif isinstance(stack, Repeated): found += [(block, i) for i in range(stack.num_repeats) for block in stack.blocks]
    else: found += [(stack.blocks, i) for i in range(stack.num_layers)]
  return found


def described(model) -> spec.Transformer:
  """The description of a model of arrays, or of shapes, a stack for each layer. How it is run (`unroll`, `remat`,
  `dispatch`) and what its training balances are no part of it. Raises IncompatibleError for a part of some other kind."""
  one = lambda block, i: block if i is None else jax.eval_shape(lambda block: jax.tree.map(lambda a: a[0], block), block)
  positions, own_head = model.positions, model.own_head
  ends = spec.Ends(positions=spec.Learned(length=positions.shape[0]) if positions is not None else None,
                   embed_scale=model.embed_scale, softcap=model.softcap)
  stacks = tuple(_stack(one(block, i), f'layer {l}') for l, (block, i) in enumerate(layers(model)))
  vocab_size, dim = model.embed.shape
  return spec.Transformer(vocab_size=vocab_size, dim=dim, stacks=stacks, tied=own_head is None, norm_eps=model.norm.eps,
                          dtype=str(model.dtype), norm=_norm(model.norm), ends=ends)


def alike(one: spec.Transformer) -> spec.Transformer:
  """A description as `described` gives it: equal for two models that compute the same functions of their arrays."""
  plain = tuple(dataclasses.replace(layer, mlp=_plain(layer.mlp)) for layer in one.layers)
  return dataclasses.replace(one, stacks=plain)


def _stack(block: Block, where: str) -> spec.Stack:
  kinds = {(True, False): spec.PreNorm, (False, True): spec.PostNorm, (True, True): spec.SandwichNorm}
  norms = kinds[block.attention_norm is not None, block.attention_out_norm is not None]()
  attention, mlp = _attention(block.attention, where), _plain(_mlp(block.mlp, where))
  return spec.Stack(num_layers=1, attention=attention, mlp=mlp, block=norms)


def _norm(norm) -> Any:
  return spec.LayerNorm(bias=norm.bias is not None) if isinstance(norm, LayerNorm) else spec.RMS()


def _attention(layer, where: str) -> spec.GroupedQuery | spec.Latent:
  if isinstance(layer, GroupedQueryAttention):
    _, num_heads, head_dim = layer.query.shape
    rope = None if layer.theta is None else Rope(theta=layer.theta, layout=layer.layout, scaling=layer.scaling)
    norm = layer.query_norm
    return spec.GroupedQuery(
      num_heads=num_heads, num_kv_heads=layer.key.shape[1], head_dim=head_dim, rope=rope, window=layer.window,
      qk_norm='' if norm is None else 'H' if norm.scale.get_value().ndim == 1 else 'NH',
      biases=_biases(layer, 'query', 'key', 'value', 'output'), softcap=layer.softcap, scale=layer.scale)
  if isinstance(layer, LatentAttention):
    return spec.Latent(
      num_heads=layer.query_nope.shape[1], query_rank=None if layer.query_down is None else layer.query_down.shape[1],
      kv_rank=layer.latent_down.shape[1], nope_dim=layer.query_nope.shape[2], rope_dim=layer.query_rope.shape[2],
      value_dim=layer.value_up.shape[2], rope=Rope(theta=layer.theta, layout=layer.layout, scaling=layer.scaling))
  raise IncompatibleError(f'{where}: {type(layer).__name__} is a kind of attention that has no description here')


def _mlp(layer, where: str) -> Any:
  if isinstance(layer, FeedForward):
    return spec.Gated(hidden=layer.up.shape[1], activation=layer.activation, biases=_biases(layer, 'gate', 'up', 'down'))
  if isinstance(layer, PlainFeedForward):
    return spec.Plain(hidden=layer.up.shape[1], activation=layer.activation, biases=_biases(layer, 'up', 'down'))
  if isinstance(layer, SigmoidGated): return spec.SigmoidGated(inner=_mlp(layer.inner, where))
  if isinstance(layer, MoE):
    num_experts, _, hidden = layer.experts.up.shape
    return spec.MoE(num_experts=num_experts, hidden=hidden, router=dataclasses.replace(layer.route), balance=layer.balance,
                    capacity=layer.capacity, shared=None if layer.shared is None else _mlp(layer.shared, where))
  raise IncompatibleError(f'{where}: {type(layer).__name__} is a kind of feed-forward layer that has no description here')


def _plain(mlp) -> Any:
  """In one spelling: SwiGLU as a gated layer, several shared experts as the one layer that they are. Balancing terms are
  left out but for the bias of loss-free balancing, which chooses experts."""
  if isinstance(mlp, spec.SwiGLU): return spec.Gated(hidden=mlp.hidden)
  if isinstance(mlp, spec.SigmoidGated): return spec.SigmoidGated(inner=_plain(mlp.inner))
  if not isinstance(mlp, spec.MoE): return mlp
  shared = spec.SwiGLU(hidden=mlp.num_shared * mlp.hidden) if mlp.num_shared else mlp.shared
  balance = tuple(type(term)() for term in mlp.balance if isinstance(term, spec.routing.LossFreeBias))
  return spec.MoE(num_experts=mlp.num_experts, hidden=mlp.hidden, router=mlp.router, balance=balance, capacity=mlp.capacity,
                  shared=None if shared is None else _plain(shared))


def _biases(layer, *names: str) -> tuple[str, ...]:
  return tuple(name for name in names if isinstance(getattr(layer, name), Biased))
