"""The decoder-only transformer. Read this file first: a model is embedding, stacks of layers, norm and head.

Nothing here knows of quantization, pruning, distillation or experts: layers own Weights (`efficient_lm/weights`), a
technique swaps Weights or whole feed-forward layers, and this code runs on unchanged. Modules are built by the descriptions
of `models/spec.py` (`spec`), for a place in the model (`site`).
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from efficient_lm.errors import IncompatibleError
from efficient_lm.models.layers import RMSNorm
from efficient_lm.models.moe.dispatch import ARRIVED, RETURNED
from efficient_lm.parallel.sharding import constrain
from efficient_lm.tree import rewrite
from efficient_lm.weights.weight import Dense, Transposed, Weight, initial

REMAT_POLICIES = {
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'transport': jax.checkpoint_policies.save_only_these_names(ARRIVED, RETURNED),
  'full': jax.checkpoint_policies.nothing_saveable,
}


class Block(nnx.Module):
  """Pre-norm residual layer: x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, spec, site, *, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm((site.dim,), 'D', site.norm_eps)
    self.attention = spec.attention.build(site, rngs=rngs)
    self.mlp_norm = RMSNorm((site.dim,), 'D', site.norm_eps)
    self.mlp = spec.mlp.build(site, rngs=rngs)

  def __call__(self, x_BTD, positions_BT, segments_BT=None, cache=None, start=0):
    """x_BTD after the layer, what the layer reports for losses and the log (None, or as `moe.statistics.Statistics`), and
    its updated cache."""
    y_BTD, cache = self.attention(self.attention_norm(x_BTD), positions_BT, segments_BT, cache, start)
    x_BTD = constrain(x_BTD + y_BTD, 'BTD')
    y_BTD, aux = self.mlp(self.mlp_norm(x_BTD), segments_BT, cached=cache is not None)
    return constrain(x_BTD + y_BTD, 'BTD'), aux, cache

  def init_cache(self, batch: int, length: int, dtype, form):
    """Empty rows for `length` tokens. Raises IncompatibleError where a part of the layer cannot read tokens one by one."""
    if why := getattr(self.mlp, 'refuses_cache', ''): raise IncompatibleError(why)
    return self.attention.init_cache(batch, length, dtype, form)


class Stack(nnx.Module):
  """Equal layers, their arrays stacked on a leading dimension L and run by `lax.scan`."""

  def __init__(self, spec, site, *, rngs: nnx.Rngs):
    keys = jax.random.split(rngs.params(), spec.num_layers)
    self.blocks = jax.vmap(lambda key: Block(spec, site, rngs=nnx.Rngs(params=key)))(keys)
    self.num_layers, self.unroll, self.remat = spec.num_layers, spec.unroll, spec.remat

  def __call__(self, x_BTD, positions_BT, segments_BT=None, cache=None, start=0):
    """As Block. Reports are a list, here of one for all layers: its arrays have a leading L, as those of the cache have."""
    def layer(x_BTD, block_and_cache):
      block, cache = block_and_cache
      x_BTD, aux, cache = block(x_BTD, positions_BT, segments_BT, cache, start)
      return x_BTD, (aux, cache)
    if self.remat != 'none': layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
    unroll = min(self.unroll, self.num_layers)
    x_BTD, (aux, cache) = lax.scan(layer, x_BTD, (self.blocks, cache), unroll=unroll)
    return x_BTD, [aux], cache

  def layer(self, i: int) -> Block:
    return jax.tree.map(lambda a_L: a_L[i], self.blocks)

  def init_cache(self, batch: int, length: int, dtype, form):
    one = jax.eval_shape(lambda stack: stack.layer(0).init_cache(batch, length, dtype, form), self)
    return jax.tree.map(lambda a: jnp.zeros((self.num_layers, *a.shape), a.dtype), one)


class Unrolled(nnx.Module):
  """A Stack taken apart into its layers, which may then differ. Decoding one token reads every weight once and does little
  else: slices of a stacked array would be copied first, which costs more than the product."""

  def __init__(self, blocks: list[Block], remat: str = 'none'):
    self.blocks, self.remat = nnx.List(blocks), remat

  def __call__(self, x_BTD, positions_BT, segments_BT=None, cache=None, start=0):
    """As Stack, with lists where Stack has a leading L."""
    def layer(block, x_BTD, cache): return block(x_BTD, positions_BT, segments_BT, cache, start)
    if self.remat != 'none': layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat])
    auxes, caches = [], []
    for i, block in enumerate(self.blocks):
      x_BTD, aux, layer_cache = layer(block, x_BTD, None if cache is None else cache[i])
      auxes.append(aux)
      caches.append(layer_cache)
    return x_BTD, auxes, caches

  def init_cache(self, batch: int, length: int, dtype, form):
    return [block.init_cache(batch, length, dtype, form) for block in self.blocks]


def unrolled(model):
  """The same model with every Stack taken apart; it computes the same."""
  apart = lambda _, stack: Unrolled([stack.layer(i) for i in range(stack.num_layers)], stack.remat)
  return rewrite(model, Stack, apart)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
  """What a loss reads. Logits are lazy, so that a fused loss never builds them.

  aux: what layers report: one entry a stack, with a leading L, or a layer, where a stack is unrolled; None or an object with
  `losses(num_tokens, total)` and `metrics()`, as `moe.statistics.Statistics`.
  """
  hidden_BTD: jax.Array
  head: Weight
  aux: tuple[Any, ...]
  cache: tuple[Any, ...] | None = None

  @property
  def logits_BTV(self):
    return self.head.contract('BTD,DV->BTV', self.hidden_BTD, jnp.float32)


class Transformer(nnx.Module):
  """Decoder-only language model."""

  def __init__(self, spec, site, *, rngs: nnx.Rngs):
    V, D = spec.vocab_size, spec.dim
    self.embed = Dense(jax.random.normal(rngs.params(), (V, D)) * D ** -.5, 'VD', 'D')
    self.stacks = nnx.List([stack.build(site, rngs=rngs) for stack in spec.stacks])
    self.norm = RMSNorm((D,), 'D', spec.norm_eps)
    self.own_head = None if spec.tied else initial(rngs.params(), dict(D=D, V=V), 'DV', 'D')
    self.dtype = spec.dtype

  @property
  def head(self) -> Weight:
    return Transposed(self.embed) if self.own_head is None else self.own_head

  def init_cache(self, batch: int, length: int, form):
    """Empty caches in a format, for `batch` sequences of at most `length` tokens, one a stack."""
    return tuple(stack.init_cache(batch, length, jnp.dtype(self.dtype), form) for stack in self.stacks)

  def __call__(self, tokens_BT, positions_BT=None, segments_BT=None, cache=None, start=0) -> Outputs:
    """Reads tokens; `positions_BT` default to start, start + 1 …; see `models/attention.py` for segments and cache."""
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.expand_dims(start, -1) + jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    x_BTD = constrain(self.embed.take(tokens_BT).astype(self.dtype), 'BTD')
    auxes, caches = [], []
    for i, stack in enumerate(self.stacks):
      x_BTD, aux, stack_cache = stack(x_BTD, positions_BT, segments_BT, None if cache is None else cache[i], start)
      auxes.extend(aux)
      caches.append(stack_cache)
    return Outputs(self.norm(x_BTD), self.head, tuple(auxes), None if cache is None else tuple(caches))
