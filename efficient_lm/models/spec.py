"""What a config says about a model. Each class here is the description of one module, and builds it.

A new kind of attention, mlp or stack is a new dataclass with `build`, in any file: nothing here is a registry. The
modules are imported when built, so that a config is read, checked and refused before JAX is loaded.
"""
import dataclasses
from typing import Any

from efficient_lm.errors import Problem
from efficient_lm.models.added import added
from efficient_lm.models.cache_formats import CACHES as CACHES
from efficient_lm.models.cache_formats import FloatCache as FloatCache
from efficient_lm.models.cache_formats import IntegerCache as IntegerCache
from efficient_lm.models.cache_formats import TiledCache as TiledCache
from efficient_lm.models.moe import routing
from efficient_lm.models.rope import LinearScaling as LinearScaling
from efficient_lm.models.rope import Llama3Scaling as Llama3Scaling
from efficient_lm.models.rope import Rope
from efficient_lm.models.rope import Yarn as Yarn

# 'gelu' is exact, 'gelu_tanh' its approximation by tanh; 'relu2' is relu(x)^2 (Primer, So et al. 2021, arXiv 2109.08668).
ACTIVATIONS = ('silu', 'gelu', 'gelu_tanh', 'relu', 'relu2')
REMAT = ('none', 'dots', 'transport', 'full')
DTYPES = ('float32', 'bfloat16', 'float16')


def positive(spec, *fields: str) -> list[Problem]:
  """Problems of those of `fields` that are not at least 1."""
  return [(field, getattr(spec, field), 'must be at least 1') for field in fields if getattr(spec, field) < 1]


def one_of(spec, field: str, choices) -> list[Problem]:
  """The problem when `field` is none of `choices`."""
  value = getattr(spec, field)
  return [] if value in choices else [(field, value, f'must be one of {", ".join(map(repr, choices))}')]


def some_of(spec, field: str, names: tuple[str, ...]) -> list[Problem]:
  """The problem when `field` is no selection of `names`, each once at most."""
  value = getattr(spec, field)
  if set(value) <= set(names) and len(set(value)) == len(value): return []
  return [(field, value, f'must hold some of {", ".join(map(repr, names))}, each once at most')]


def positive_or_none(spec, *fields: str) -> list[Problem]:
  """Problems of those of `fields` that are neither None nor above 0."""
  found = [(field, getattr(spec, field)) for field in fields]
  return [(field, value, 'must be positive, or None') for field, value in found if value is not None and not value > 0]


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class RMS:
  """Norms that divide by the root mean square (Zhang and Sennrich 2019), with a scale."""

  def build(self, size: int, eps: float):
    from efficient_lm.models.layers import RMSNorm
    return RMSNorm((size,), 'D', eps)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class LayerNorm:
  """Norms that subtract the mean and divide by the deviation (Ba et al. 2016, arXiv 1607.06450, eq. 4), with a scale and,
  by `bias`, a shift."""
  bias: bool = True

  def build(self, size: int, eps: float):
    from efficient_lm.models.layers import LayerNorm
    return LayerNorm(size, eps, self.bias)


@dataclasses.dataclass(frozen=True)
class Site:
  """Where a module is built: the model's width, its depth in layers (residual branches start smaller in a deeper
  model), the epsilon of its norms, and their kind."""
  dim: int
  depth: int
  norm_eps: float
  norm: Any = RMS()

  def new_norm(self):
    """One over the residual stream."""
    return self.norm.build(self.dim, self.norm_eps)


@dataclasses.dataclass(kw_only=True)
class GroupedQuery:
  """Grouped-query attention (Ainslie et al. 2023). `qk_norm` names the letters that queries and keys are normalised
  over before rotation: 'H' each head by itself (Qwen3), 'NH' all heads together (OLMoE), '' not at all. `window` lets
  a query see that many keys, itself included; None: all. `rope` None: positions come from elsewhere (`Learned`). `biases`:
  those of 'query', 'key', 'value', 'output' that have one. Scores are multiplied by `scale` (None: head_dim^-0.5), and with
  a `softcap` bounded as softcap * tanh(score / softcap) (Gemma 2)."""
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope: Rope | None = dataclasses.field(default_factory=Rope)
  qk_norm: str = ''
  window: int | None = None
  biases: tuple[str, ...] = added(())
  softcap: float | None = added(None)
  scale: float | None = added(None)

  def check(self):
    yield from positive(self, 'num_heads', 'num_kv_heads', 'head_dim')
    if self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads:
      yield 'num_kv_heads', self.num_kv_heads, f'must divide num_heads = {self.num_heads}'
    if self.rope is not None and self.head_dim % 2:
      yield 'head_dim', self.head_dim, 'must be even: rotary embedding rotates pairs'
    yield from one_of(self, 'qk_norm', ('', 'H', 'NH'))
    if self.window is not None and self.window < 1: yield 'window', self.window, 'must be at least 1, or None'
    yield from some_of(self, 'biases', ('query', 'key', 'value', 'output'))
    yield from positive_or_none(self, 'softcap', 'scale')

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


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class L1:
  """A loss of weight * mean |h| over tokens and hidden units of a layer, which drives units of a layer with relu or relu2 to
  exact zeros (TwELL, arXiv 2603.23198, trains so). The log has their share, `mlp/zeros`."""
  weight: float

  def check(self):
    if self.weight < 0: yield 'weight', self.weight, 'must be 0 or more'

  def report(self, h_BTF, segments_BT):
    """What the layer reports of its hidden units."""
    from efficient_lm.models.hidden import HiddenUnits
    return HiddenUnits.of(h_BTF, segments_BT, self.weight)


@dataclasses.dataclass(kw_only=True)
class Gated:
  """Gated feed-forward layer with any activation (Shazeer 2020): down(activation(gate(x)) * up(x)), with `hidden` units;
  'silu' is SwiGLU. `biases`: those of 'gate', 'up', 'down' that have one. `penalty`: a loss on hidden units, L1(…), or
  None."""
  hidden: int
  activation: str = 'silu'
  biases: tuple[str, ...] = ()
  penalty: L1 | None = added(None)

  def check(self):
    yield from positive(self, 'hidden')
    yield from one_of(self, 'activation', ACTIVATIONS)
    yield from some_of(self, 'biases', ('gate', 'up', 'down'))

  def build(self, site: Site, *, rngs):
    from efficient_lm.models.mlp import FeedForward
    layer = FeedForward(self.hidden, site, rngs=rngs, activation=self.activation, biases=self.biases)
    if self.penalty is not None: layer.penalty = self.penalty
    return layer


@dataclasses.dataclass(kw_only=True)
class Plain:
  """Feed-forward layer without a gate (Vaswani et al. 2017, eq. 2): down(activation(up(x))), with `hidden` units. `biases`:
  those of 'up', 'down' that have one. `penalty`: as in `Gated`."""
  hidden: int
  activation: str
  biases: tuple[str, ...] = ('up', 'down')
  penalty: L1 | None = added(None)

  def check(self):
    yield from positive(self, 'hidden')
    yield from one_of(self, 'activation', ACTIVATIONS)
    yield from some_of(self, 'biases', ('up', 'down'))

  def build(self, site: Site, *, rngs):
    from efficient_lm.models.mlp import PlainFeedForward
    return PlainFeedForward(self, site, rngs=rngs)


@dataclasses.dataclass(kw_only=True)
class SigmoidGated:
  """Feed-forward layer whose output is multiplied by sigmoid(x @ w), one number a token: the shared expert of Qwen2-MoE
  (arXiv 2407.10671)."""
  inner: Any

  def build(self, site: Site, *, rngs):
    from efficient_lm.models.mlp import SigmoidGated
    return SigmoidGated(self.inner, site, rngs=rngs)


@dataclasses.dataclass(kw_only=True)
class MoE:
  """Mixture of SwiGLU experts of `hidden` units each. `router` scores and chooses; `balance` is any selection of
  balancing terms; `capacity` None is dropless, else an expert accepts the first ceil(capacity * n * active / num_experts)
  rows of a document of n tokens; `num_shared` experts see every token (DeepSeekMoE), or `shared`, any feed-forward layer;
  `dispatch` moves tokens between the devices that hold experts."""
  num_experts: int
  hidden: int
  router: Any = dataclasses.field(default_factory=lambda: routing.SoftmaxTopK(top_k=2))
  balance: tuple[Any, ...] = (routing.LoadBalance(), routing.RouterZ())
  capacity: float | None = None
  num_shared: int = 0
  dispatch: Any = dataclasses.field(default_factory=lambda: routing.Dispatch())
  shared: Any = added(None)

  def check(self):
    yield from positive(self, 'num_experts', 'hidden')
    if self.num_shared < 0: yield 'num_shared', self.num_shared, 'must be 0 or more'
    if self.shared is not None and self.num_shared: yield 'shared', self.shared, 'must be None where num_shared is not 0'
    if isinstance(self.shared, MoE): yield 'shared', self.shared, 'must be a feed-forward layer that every token sees'
    if self.capacity is not None and self.capacity <= 0:
      yield 'capacity', self.capacity, 'must be positive, or None for dropless'
    if self.capacity is not None and self.capacity > self.num_experts:
      yield 'capacity', self.capacity, f'must be at most num_experts = {self.num_experts}, or None for dropless'
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


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class PreNorm:
  """Residual branches x + branch(norm(x)) (Xiong et al. 2020, arXiv 2002.04745)."""
  before, after = True, False


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class PostNorm:
  """Residual branches x + norm(branch(x)) (OLMo 2, arXiv 2501.00656, section 3.2). The stream itself is not normalised."""
  before, after = False, True


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class SandwichNorm:
  """Residual branches x + norm(branch(norm(x))) (Gemma 2, arXiv 2408.00118, section 2)."""
  before, after = True, True


@dataclasses.dataclass(kw_only=True)
class Layer:
  """One layer of a repeated pattern."""
  attention: Any
  mlp: Any


@dataclasses.dataclass(kw_only=True)
class Stack:
  """`num_layers` equal layers. `unroll` of them are written out in each step of the scan (on a CPU all of them run
  10-40 % faster than one); `remat` says what the backward pass recomputes: nothing, all but matrix products, all but
  what experts were sent and sent back, all. `block`: where the norms of a residual branch are."""
  num_layers: int
  attention: Any
  mlp: Any
  unroll: int = 1
  remat: str = 'none'
  block: Any = added(make=PreNorm)

  def check(self):
    yield from positive(self, 'num_layers', 'unroll')
    yield from one_of(self, 'remat', REMAT)
    if not hasattr(self.block, 'before'): yield 'block', self.block, 'must be PreNorm(), PostNorm() or SandwichNorm()'

  def build(self, site: Site, *, rngs):
    from efficient_lm.models.transformer import Stack
    return Stack(self, site, rngs=rngs)


@dataclasses.dataclass(kw_only=True)
class Repeated:
  """A pattern of unequal `layers`, `num_repeats` times: windows of all but every sixth layer, say (Gemma 3). The rest is as
  in `Stack`; `unroll` counts repeats."""
  num_repeats: int
  layers: tuple[Layer, ...]
  unroll: int = 1
  remat: str = 'none'
  block: Any = dataclasses.field(default_factory=PreNorm)

  def check(self):
    yield from positive(self, 'num_repeats', 'unroll')
    yield from one_of(self, 'remat', REMAT)
    if not hasattr(self.block, 'before'): yield 'block', self.block, 'must be PreNorm(), PostNorm() or SandwichNorm()'
    if not self.layers: yield 'layers', self.layers, 'must hold at least one Layer'

  @property
  def num_layers(self) -> int: return self.num_repeats * len(self.layers)

  def build(self, site: Site, *, rngs):
    from efficient_lm.models.transformer import Repeated
    return Repeated(self, site, rngs=rngs)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Learned:
  """A table of `length` positions that is trained and added to the embedding (GPT-2, OPT). No text may be longer."""
  length: int

  def check(self):
    yield from positive(self, 'length')


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Ends:
  """What a model does before its first layer and behind its last one. `positions`: a table of them, or None; the embedding
  is multiplied by `embed_scale`, rounded to the dtype of the computation (Gemma: sqrt(dim)); with a `softcap` logits are
  softcap * tanh(logits / softcap) (Gemma 2)."""
  positions: Learned | None = None
  embed_scale: float = 1.0
  softcap: float | None = None

  def check(self):
    if self.embed_scale <= 0: yield 'embed_scale', self.embed_scale, 'must be positive'
    yield from positive_or_none(self, 'softcap')


@dataclasses.dataclass(kw_only=True)
class Transformer:
  """Decoder-only language model: embedding, stacks of layers, final norm, head. `tied` reuses the embedding as head;
  `dtype` is that of the computation, parameters and their gradients stay float32. `norm`: of all layers and the final one;
  `ends`: what else there is before and behind the layers."""
  vocab_size: int
  dim: int
  stacks: tuple[Any, ...]
  tied: bool = False
  norm_eps: float = 1e-6
  dtype: str = 'float32'
  norm: Any = added(make=RMS)
  ends: Ends = added(make=Ends)

  def check(self):
    yield from positive(self, 'vocab_size', 'dim')
    if not self.stacks: yield 'stacks', self.stacks, 'must hold at least one Stack'
    if self.norm_eps <= 0: yield 'norm_eps', self.norm_eps, 'must be positive'
    yield from one_of(self, 'dtype', DTYPES)
    if not hasattr(self.norm, 'build'): yield 'norm', self.norm, 'must be RMS() or LayerNorm()'

  @property
  def layers(self) -> list[Stack]:
    """All layers in the order of computation, each as a stack of its own."""
    found = []
    for stack in self.stacks:
      pattern = stack.layers if isinstance(stack, Repeated) else (stack,)
      each = [Stack(num_layers=1, attention=one.attention, mlp=one.mlp, block=stack.block) for one in pattern]
      found += each * (stack.num_layers // len(each))
    return found

  def build(self, *, rngs):
    from efficient_lm.models.transformer import Transformer
    depth = sum(stack.num_layers for stack in self.stacks)
    return Transformer(self, Site(self.dim, depth, self.norm_eps, self.norm), rngs=rngs)
