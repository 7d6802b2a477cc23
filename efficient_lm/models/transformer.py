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
from efficient_lm.models.moe.dispatch import ARRIVED, RETURNED
from efficient_lm.parallel.sharding import constrain
from efficient_lm.tree import rewrite
from efficient_lm.weights.weight import Dense, SoftCapped, Transposed, Weight, initial

REMAT_POLICIES = {
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'transport': jax.checkpoint_policies.save_only_these_names(ARRIVED, RETURNED),
  'full': jax.checkpoint_policies.nothing_saveable,
}


class Block(nnx.Module):
  """Residual layer: x + attention(x), then x + mlp(x), each with a norm before it, after it, or both (`spec.PreNorm` …)."""
  attention_norm = attention_out_norm = mlp_norm = mlp_out_norm = None   # no attributes of their own where there are none

  def __init__(self, part, block, site, *, rngs: nnx.Rngs):
    """part: descriptions of `attention` and `mlp`. block: where the norms are."""
    if block.before: self.attention_norm, self.mlp_norm = site.new_norm(), site.new_norm()
    if block.after: self.attention_out_norm, self.mlp_out_norm = site.new_norm(), site.new_norm()
    self.attention = part.attention.build(site, rngs=rngs)
    self.mlp = part.mlp.build(site, rngs=rngs)

  def __call__(self, x_BTD, positions_BT, segments_BT=None, cache=None, start=0):
    """x_BTD after the layer, what the layer reports for losses and the log (None, or as `moe.statistics.Statistics`), and
    its updated cache."""
    y_BTD, cache = self.attention(_normed(self.attention_norm, x_BTD), positions_BT, segments_BT, cache, start)
    x_BTD = constrain(x_BTD + _normed(self.attention_out_norm, y_BTD), 'BTD')
    y_BTD, aux = self.mlp(_normed(self.mlp_norm, x_BTD), segments_BT, cached=cache is not None)
    return constrain(x_BTD + _normed(self.mlp_out_norm, y_BTD), 'BTD'), aux, cache

  def init_cache(self, batch: int, length: int, dtype, form):
    """Empty rows for `length` tokens. Raises IncompatibleError where a part of the layer cannot read tokens one by one."""
    if why := getattr(self.mlp, 'refuses_cache', ''): raise IncompatibleError(why)
    return self.attention.init_cache(batch, length, dtype, form)


def _normed(norm, x_BTD):
  return x_BTD if norm is None else norm(x_BTD)


def _stacked(count: int, part, block, site, rngs) -> Block:
  """`count` equal layers, their arrays with a leading dimension."""
  keys = jax.random.split(rngs.params(), count)
  return jax.vmap(lambda key: Block(part, block, site, rngs=nnx.Rngs(params=key)))(keys)


class Stack(nnx.Module):
  """Equal layers, their arrays stacked on a leading dimension L and run by `lax.scan`."""

  def __init__(self, spec, site, *, rngs: nnx.Rngs):
    self.blocks = _stacked(spec.num_layers, spec, spec.block, site, rngs)
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


class Repeated(nnx.Module):
  """A pattern of unequal layers, repeated: `blocks[i]` holds all layers at place i of the pattern, their arrays stacked on a
  leading dimension, and `lax.scan` runs one repeat of the pattern a step."""

  def __init__(self, spec, site, *, rngs: nnx.Rngs):
    self.blocks = nnx.List([_stacked(spec.num_repeats, layer, spec.block, site, rngs) for layer in spec.layers])
    self.num_repeats, self.unroll, self.remat = spec.num_repeats, spec.unroll, spec.remat

  @property
  def num_layers(self) -> int: return self.num_repeats * len(self.blocks)

  def __call__(self, x_BTD, positions_BT, segments_BT=None, cache=None, start=0):
    """As Stack, with a list of the places of the pattern for reports and cache, each with a leading number of repeats."""
    def layer(block, x_BTD, cache): return block(x_BTD, positions_BT, segments_BT, cache, start)
    if self.remat != 'none': layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)

    def repeat(x_BTD, blocks_and_caches):
      made = []
      for block, cache in zip(*blocks_and_caches):
        x_BTD, aux, cache = layer(block, x_BTD, cache)
        made.append((aux, cache))
      return x_BTD, made
    blocks, caches = list(self.blocks), cache or [None] * len(self.blocks)
    x_BTD, made = lax.scan(repeat, x_BTD, (blocks, caches), unroll=min(self.unroll, self.num_repeats))
    auxes, caches = zip(*made)
    return x_BTD, list(auxes), list(caches)

  def layer(self, i: int) -> Block:
    """Layer i in the order of computation."""
    repeat, place = divmod(i, len(self.blocks))
    return jax.tree.map(lambda a: a[repeat], self.blocks[place])

  def init_cache(self, batch: int, length: int, dtype, form):
    make = lambda i: jax.eval_shape(lambda stack: stack.layer(i).init_cache(batch, length, dtype, form), self)
    repeated = lambda a: jnp.zeros((self.num_repeats, *a.shape), a.dtype)
    return [jax.tree.map(repeated, make(i)) for i in range(len(self.blocks))]


class Unrolled(nnx.Module):
  """A stack taken apart into its layers, which may then differ. Decoding one token reads every weight once and does little
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
  """The same model with every stack taken apart; it computes the same."""
  apart = lambda _, stack: Unrolled([stack.layer(i) for i in range(stack.num_layers)], stack.remat)
  return rewrite(model, (Stack, Repeated), apart)


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
  # Of models that were stored before there were any: what is neutral is no attribute of its own.
  positions, embed_scale, softcap = None, 1.0, None

  def __init__(self, spec, site, *, rngs: nnx.Rngs):
    V, D = spec.vocab_size, spec.dim
    self.embed = Dense(jax.random.normal(rngs.params(), (V, D)) * D ** -.5, 'VD', 'D')
    self.stacks = nnx.List([stack.build(site, rngs=rngs) for stack in spec.stacks])
    self.norm = site.new_norm()
    self.own_head = None if spec.tied else initial(rngs.params(), dict(D=D, V=V), 'DV', 'D')
    self.dtype = spec.dtype
    if spec.ends.positions is not None:
      self.positions = Dense(jax.random.normal(rngs.params(), (spec.ends.positions.length, D)) * D ** -.5, 'TD', 'D')
    if spec.ends.embed_scale != 1: self.embed_scale = spec.ends.embed_scale
    if spec.ends.softcap is not None: self.softcap = spec.ends.softcap

  @property
  def head(self) -> Weight:
    head = Transposed(self.embed) if self.own_head is None else self.own_head
    return head if self.softcap is None else SoftCapped(head, self.softcap)

  @property
  def max_length(self) -> int | None:
    """The longest text that it can read: as its table of positions is, or None."""
    return None if self.positions is None else self.positions.shape[0]

  def refuse_longer(self, length: int):
    """Raises IncompatibleError for a text that is longer than the model can read."""
    if self.max_length is not None and length > self.max_length:
      raise IncompatibleError(f'a text of {length} tokens, where the model has {self.max_length} positions')

  def embedded(self, tokens_BT, positions_BT):
    """x_BTD that the first layer reads."""
    x_BTD = constrain(self.embed.take(tokens_BT).astype(self.dtype), 'BTD')
    if self.embed_scale != 1: x_BTD *= jnp.asarray(self.embed_scale, x_BTD.dtype)
    if self.positions is None: return x_BTD
    return constrain(x_BTD + self.positions.take(positions_BT).astype(self.dtype), 'BTD')

  def init_cache(self, batch: int, length: int, form):
    """Empty caches in a format, for `batch` sequences of at most `length` tokens, one a stack. Raises IncompatibleError for
    more than the model can read."""
    self.refuse_longer(length)
    return tuple(stack.init_cache(batch, length, jnp.dtype(self.dtype), form) for stack in self.stacks)

  def __call__(self, tokens_BT, positions_BT=None, segments_BT=None, cache=None, start=0) -> Outputs:
    """Reads tokens; `positions_BT` default to start, start + 1 …; see `models/attention.py` for segments and cache."""
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.expand_dims(start, -1) + jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    self.refuse_longer(tokens_BT.shape[1])
    x_BTD = self.embedded(tokens_BT, positions_BT)
    auxes, caches = [], []
    for i, stack in enumerate(self.stacks):
      x_BTD, aux, stack_cache = stack(x_BTD, positions_BT, segments_BT, None if cache is None else cache[i], start)
      auxes.extend(aux)
      caches.append(stack_cache)
    return Outputs(self.norm(x_BTD), self.head, tuple(auxes), None if cache is None else tuple(caches))
