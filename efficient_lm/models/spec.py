"""What a config says about a model. Each class here is the description of one module, and builds it.

A new kind of attention, mlp or stack is a new dataclass with `build`, in any file: nothing here is a registry. The
modules are imported when built, so that a config is read, checked and refused before JAX is loaded.
"""
import dataclasses
from typing import Any

from efficient_lm.errors import Problem
from efficient_lm.models.moe import routing

ROPE_LAYOUTS = ('half', 'interleaved')
REMAT = ('none', 'dots', 'transport', 'full')
DTYPES = ('float32', 'bfloat16', 'float16')


def positive(spec, *fields: str) -> list[Problem]:
  """Problems of those of `fields` that are not at least 1."""
  return [(field, getattr(spec, field), 'must be at least 1') for field in fields if getattr(spec, field) < 1]


def one_of(spec, field: str, choices) -> list[Problem]:
  """The problem when `field` is none of `choices`."""
  value = getattr(spec, field)
  return [] if value in choices else [(field, value, f'must be one of {", ".join(map(repr, choices))}')]


@dataclasses.dataclass(frozen=True)
class Site:
  """Where a module is built: the model's width, its depth in layers (residual branches start smaller in a deeper
  model), the epsilon of its norms."""
  dim: int
  depth: int
  norm_eps: float


@dataclasses.dataclass(kw_only=True)
class Rope:
  """Rotary position embedding (Su et al. 2021). Layout 'half' rotates dimension i with i + H/2 (Llama as published by
  Hugging Face), 'interleaved' rotates 2i with 2i + 1 (the paper, GPT-J, DeepSeek)."""
  theta: float = 10_000.0
  layout: str = 'half'

  def check(self):
    if self.theta <= 0: yield 'theta', self.theta, 'must be positive'
    yield from one_of(self, 'layout', ROPE_LAYOUTS)


@dataclasses.dataclass(kw_only=True)
class GroupedQuery:
  """Grouped-query attention (Ainslie et al. 2023). `qk_norm` names the letters that queries and keys are normalised
  over before rotation: 'H' each head by itself (Qwen3), 'NH' all heads together (OLMoE), '' not at all. `window` lets
  a query see that many keys, itself included; None: all."""
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope: Rope = dataclasses.field(default_factory=Rope)
  qk_norm: str = ''
  window: int | None = None

  def check(self):
    yield from positive(self, 'num_heads', 'num_kv_heads', 'head_dim')
    if self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads:
      yield 'num_kv_heads', self.num_kv_heads, f'must divide num_heads = {self.num_heads}'
    if self.head_dim % 2: yield 'head_dim', self.head_dim, 'must be even: rotary embedding rotates pairs'
    yield from one_of(self, 'qk_norm', ('', 'H', 'NH'))
    if self.window is not None and self.window < 1: yield 'window', self.window, 'must be at least 1, or None'

  def build(self, site: Site, *, rngs):
    from efficient_lm.models.attention import GroupedQueryAttention
    return GroupedQueryAttention(self, site, rngs=rngs)


@dataclasses.dataclass(kw_only=True)
class Latent:
  """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values are read from one small latent a token,
  which is all that the cache holds. `query_rank` None: queries are projected directly (DeepSeek-V2-Lite)."""
  num_heads: int
  query_rank: int | None
  kv_rank: int
  nope_dim: int
  rope_dim: int
  value_dim: int
  rope: Rope = dataclasses.field(default_factory=lambda: Rope(layout='interleaved'))

  def check(self):
    yield from positive(self, 'num_heads', 'kv_rank', 'nope_dim', 'rope_dim', 'value_dim')
    if self.query_rank is not None: yield from positive(self, 'query_rank')
    if self.rope_dim % 2: yield 'rope_dim', self.rope_dim, 'must be even: rotary embedding rotates pairs'

  def build(self, site: Site, *, rngs):
    from efficient_lm.models.attention import LatentAttention
    return LatentAttention(self, site, rngs=rngs)


@dataclasses.dataclass(kw_only=True)
class SwiGLU:
  """Gated feed-forward layer (Shazeer 2020): down(silu(gate(x)) * up(x)), with `hidden` units."""
  hidden: int

  def check(self):
    yield from positive(self, 'hidden')

  def build(self, site: Site, *, rngs):
    from efficient_lm.models.mlp import FeedForward
    return FeedForward(self.hidden, site, rngs=rngs)


@dataclasses.dataclass(kw_only=True)
class MoE:
  """Mixture of SwiGLU experts of `hidden` units each. `router` scores and chooses; `balance` is any selection of
  balancing terms; `capacity` None is dropless, else an expert accepts the first ceil(capacity * n * active / num_experts)
  rows of a document of n tokens; `num_shared` experts see every token (DeepSeekMoE); `dispatch` moves tokens between the
  devices that hold experts."""
  num_experts: int
  hidden: int
  router: Any = dataclasses.field(default_factory=lambda: routing.SoftmaxTopK(top_k=2))
  balance: tuple[Any, ...] = (routing.LoadBalance(), routing.RouterZ())
  capacity: float | None = None
  num_shared: int = 0
  dispatch: Any = dataclasses.field(default_factory=lambda: routing.Dispatch())

  def check(self):
    yield from positive(self, 'num_experts', 'hidden')
    if self.num_shared < 0: yield 'num_shared', self.num_shared, 'must be 0 or more'
    if self.capacity is not None and self.capacity <= 0:
      yield 'capacity', self.capacity, 'must be positive, or None for dropless'
    for field, value, fix in self.router.check_experts(self.num_experts): yield f'router.{field}', value, fix
    yield from self._check_together()

  def caveats(self):
    """What a user has to know of a model with such a layer: lines for the start of a run and its ledger."""
    if not self.router.causal:
      yield 'expert choice is not causal: a token can displace earlier ones, and a document others of its row'
    if self.capacity is not None:
      yield (f'capacity {self.capacity:g} drops tokens in training and in evaluation, by the length of their document; '
             f'generation reads through a cache and drops none')

  def _check_together(self):
    kinds = [type(term) for term in self.balance]
    if len(set(kinds)) < len(kinds): yield 'balance', self.balance, 'must hold each kind of term once at most'
    if not isinstance(self.router, routing.ExpertChoice): return
    if self.capacity is not None:
      yield 'capacity', self.capacity, 'must be None: ExpertChoice has a capacity of its own, router.capacity'
    if routing.LossFreeBias in kinds:
      yield 'balance', self.balance, 'must not hold LossFreeBias: expert choice is balanced, a bias changes no choice'

  def build(self, site: Site, *, rngs):
    from efficient_lm.models.moe.layer import MoE
    return MoE(self, site, rngs=rngs)


@dataclasses.dataclass(kw_only=True)
class Stack:
  """`num_layers` equal layers. `unroll` of them are written out in each step of the scan (on a CPU all of them run
  10-40 % faster than one); `remat` says what the backward pass recomputes: nothing, all but matrix products, all but
  what experts were sent and sent back, all."""
  num_layers: int
  attention: Any
  mlp: Any
  unroll: int = 1
  remat: str = 'none'

  def check(self):
    yield from positive(self, 'num_layers', 'unroll')
    yield from one_of(self, 'remat', REMAT)

  def build(self, site: Site, *, rngs):
    from efficient_lm.models.transformer import Stack
    return Stack(self, site, rngs=rngs)


@dataclasses.dataclass(kw_only=True)
class Transformer:
  """Decoder-only language model: embedding, stacks of pre-norm layers, final norm, head. `tied` reuses the embedding
  as head; `dtype` is that of the computation, parameters and their gradients stay float32."""
  vocab_size: int
  dim: int
  stacks: tuple[Stack, ...]
  tied: bool = False
  norm_eps: float = 1e-6
  dtype: str = 'float32'

  def check(self):
    yield from positive(self, 'vocab_size', 'dim')
    if not self.stacks: yield 'stacks', self.stacks, 'must hold at least one Stack'
    if self.norm_eps <= 0: yield 'norm_eps', self.norm_eps, 'must be positive'
    yield from one_of(self, 'dtype', DTYPES)

  def build(self, *, rngs):
    from efficient_lm.models.transformer import Transformer
    depth = sum(stack.num_layers for stack in self.stacks)
    return Transformer(self, Site(self.dim, depth, self.norm_eps), rngs=rngs)


@dataclasses.dataclass(frozen=True)
class FloatCache:
  """Keys and values that decoding keeps, in the dtype of the computation."""

  def check(self):
    yield from ()

  def rows(self, batch: int, heads: int, length: int, dim: int, dtype):
    """Empty rows of `dim` numbers: `length` of them, by sequence and head."""
    from efficient_lm.models.cache import FloatRows
    return FloatRows.empty(batch, heads, length, dim, dtype)


@dataclasses.dataclass(frozen=True)
class IntegerCache:
  """Keys and values in `bits` bits, and a float32 scale for each head and `group` successive tokens."""
  bits: int = 8
  group: int = 1

  def check(self):
    yield from one_of(self, 'bits', (8, 4))
    yield from positive(self, 'group')

  def rows(self, batch: int, heads: int, length: int, dim: int, dtype):
    """As FloatCache."""
    from efficient_lm.models.cache import IntegerRows
    return IntegerRows.empty(batch, heads, length, dim, dtype, bits=self.bits, group=self.group)


CACHES = {'float': FloatCache(), 'int8': IntegerCache(bits=8), 'int4': IntegerCache(bits=4)}   # by the name in --cache
