"""What a config says about a mixture of experts: who chooses, what balances, how tokens travel.

Every choice is a value: a new router or balancing term is a new dataclass with the same methods, in any file. The
classes are hashable by value because a module carries them beside its arrays; they are mutable because a config may be
overridden field by field. Nothing here loads JAX before a model runs.

  router(logits_BTE, bias_E) -> the routing (`efficient_lm/parallel/rows.py`): which expert sees which token, and its gate
  router.probs(logits_BTE)   -> probs_BTE, what the balancing terms and the metrics read
  term(logits_BTE, probs_BTE, load_E) -> {name: weighted loss}
"""
from __future__ import annotations

import dataclasses
import math

from efficient_lm.errors import ConfigError
from efficient_lm.lazy import lazy

jax = lazy('jax')
jnp = lazy('jax.numpy')
rows = lazy('efficient_lm.models.moe.rows')

TRANSPORTS = ('auto', 'gather', 'a2a', 'ragged', 'ragged_emulated')
config = dataclasses.dataclass(kw_only=True, unsafe_hash=True)


def _gates(values_BTE, expert_BTA):
  """values at the chosen experts, (B, T, A). Compared and summed, not gathered: the gradient then needs no scatter."""
  chosen_BTAE = expert_BTA[..., None] == jnp.arange(values_BTE.shape[-1])
  return jnp.sum(jnp.where(chosen_BTAE, values_BTE[..., None, :], 0), -1)


def _check_top_k(top_k: int, num_experts: int):
  if not 1 <= top_k <= num_experts: yield 'top_k', top_k, f'must be from 1 to num_experts = {num_experts}'


@config
class SoftmaxTopK:
  """The `top_k` largest of a softmax over all experts (Shazeer et al. 2017; Switch, arXiv:2101.03961, eq. 1-2).
  `normalize` divides the gates by their sum (Mixtral does, OLMoE does not)."""
  top_k: int
  normalize: bool = True

  def check(self):
    if self.top_k < 1: yield 'top_k', self.top_k, 'must be at least 1'

  def check_experts(self, num_experts: int):
    yield from _check_top_k(self.top_k, num_experts)

  @property
  def active(self) -> int:
    """Experts a token visits."""
    return self.top_k

  def probs(self, logits_BTE):
    return jax.nn.softmax(logits_BTE)

  def __call__(self, logits_BTE, bias_E=None):
    probs_BTE = self.probs(logits_BTE)
    score_BTE = probs_BTE if bias_E is None else probs_BTE + bias_E
    _, expert_BTA = jax.lax.top_k(jax.lax.stop_gradient(score_BTE), self.top_k)
    gate_BTA = _gates(probs_BTE, expert_BTA)
    if self.normalize: gate_BTA /= jnp.sum(gate_BTA, -1, keepdims=True)
    return rows.TokenChoice(expert_BTA, gate_BTA)


@config
class SigmoidTopK:
  """The `top_k` largest sigmoids, their gates normalised and multiplied by `scale` (DeepSeek-V3, arXiv:2412.19437, eq.
  12-16). Experts in `num_groups` equal groups: a token chooses within its `top_groups` best groups only, a group being
  worth the sum of its two best experts (section 2.1.2, node-limited routing)."""
  top_k: int
  num_groups: int = 1
  top_groups: int = 1
  scale: float = 1.0

  def check(self):
    if self.top_k < 1: yield 'top_k', self.top_k, 'must be at least 1'
    if self.num_groups < 1: yield 'num_groups', self.num_groups, 'must be at least 1'
    if not 1 <= self.top_groups <= self.num_groups:
      yield 'top_groups', self.top_groups, f'must be from 1 to num_groups = {self.num_groups}'
    if self.scale <= 0: yield 'scale', self.scale, 'must be positive'

  def check_experts(self, num_experts: int):
    yield from _check_top_k(self.top_k, num_experts)
    if self.num_groups < 1: return
    if num_experts % self.num_groups: yield 'num_groups', self.num_groups, f'must divide num_experts = {num_experts}'
    elif self.top_k > (reach := self.top_groups * num_experts // self.num_groups):
      yield 'top_groups', self.top_groups, f'leaves a token {reach} experts, fewer than top_k = {self.top_k}'

  @property
  def active(self) -> int:
    """Experts a token visits."""
    return self.top_k

  def probs(self, logits_BTE):
    """Sigmoids divided by their sum over experts, as in eq. 18 of the paper; only gates and scores use them bare."""
    score_BTE = jax.nn.sigmoid(logits_BTE)
    return score_BTE / jnp.sum(score_BTE, -1, keepdims=True)

  def __call__(self, logits_BTE, bias_E=None):
    gate_BTE = jax.nn.sigmoid(logits_BTE)
    score_BTE = jax.lax.stop_gradient(gate_BTE if bias_E is None else gate_BTE + bias_E)
    if self.top_groups < self.num_groups: score_BTE = self._limited(score_BTE)
    _, expert_BTA = jax.lax.top_k(score_BTE, self.top_k)
    gate_BTA = _gates(gate_BTE, expert_BTA)
    return rows.TokenChoice(expert_BTA, gate_BTA / jnp.sum(gate_BTA, -1, keepdims=True) * self.scale)

  def _limited(self, score_BTE):
    """-inf outside the token's best groups: a bias may make true scores negative, so 0 would not exclude."""
    grouped = score_BTE.reshape(*score_BTE.shape[:-1], self.num_groups, -1)
    two_best, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
    _, best = jax.lax.top_k(jnp.sum(two_best, -1), self.top_groups)
    allowed = jnp.any(best[..., None] == jnp.arange(self.num_groups), -2)
    return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(score_BTE.shape)


@config
class ExpertChoice:
  """Each expert takes its C = ceil(capacity * T / E) best tokens of each sequence (Zhou et al. 2022, arXiv:2202.09368,
  eq. 1), so a token visits `capacity` experts on average, some none. Perfectly balanced, but NOT CAUSAL: who is chosen
  depends on the whole sequence, so a language model trained with it leaks the future and cannot decode as it trained.
  """
  capacity: float

  def check(self):
    if self.capacity <= 0: yield 'capacity', self.capacity, 'must be positive'

  def check_experts(self, num_experts: int):
    if self.capacity > num_experts:
      yield 'capacity', self.capacity, f'must be at most num_experts = {num_experts}, where every expert sees all'

  @property
  def active(self) -> float:
    """Experts a token visits on average."""
    return self.capacity

  def probs(self, logits_BTE):
    return jax.nn.softmax(logits_BTE)

  def __call__(self, logits_BTE, bias_E=None):
    """`bias_E` moves all scores of an expert alike, which changes none of its choices."""
    length, num_experts = logits_BTE.shape[1:]
    accepted = min(length, math.ceil(self.capacity * length / num_experts))
    gate_BEC, token_BEC = jax.lax.top_k(jnp.swapaxes(self.probs(logits_BTE), 1, 2), accepted)
    return rows.ExpertsChoice(token_BEC, gate_BEC, length)


@config
class LoadBalance:
  """weight * E * sum_e f_e P_e over the global batch: f_e the share of routed rows that went to expert e, P_e its mean
  probability (Switch, arXiv:2101.03961, eq. 4-6). Balanced routing gives exactly `weight`, whatever top_k is."""
  weight: float = 0.01

  def check(self):
    if self.weight < 0: yield 'weight', self.weight, 'must be 0 or more'

  def __call__(self, logits_BTE, probs_BTE, load_E):
    return {'load_balance': self.weight * jnp.sum(load_E * jnp.mean(probs_BTE, (0, 1)))}


@config
class RouterZ:
  """weight * mean over tokens of logsumexp(logits)^2, which keeps router logits small (ST-MoE, arXiv:2202.08906, eq. 5)."""
  weight: float = 0.001

  def check(self):
    if self.weight < 0: yield 'weight', self.weight, 'must be 0 or more'

  def __call__(self, logits_BTE, probs_BTE, load_E):
    return {'router_z': self.weight * jnp.mean(jax.nn.logsumexp(logits_BTE, -1) ** 2)}


@config
class LossFreeBias:
  """A bias on the scores, for the selection only, that each step moves by `rate` towards the experts with less than
  the mean load (Wang et al. 2024, arXiv:2408.15664, algorithm 1). No loss: see `LoadBias` in models/moe.py."""
  rate: float = 0.001

  def check(self):
    if self.rate <= 0: yield 'rate', self.rate, 'must be positive'

  def __call__(self, logits_BTE, probs_BTE, load_E):
    return {}


@config
class Dispatch:
  """How tokens reach the devices that hold their experts, when a mesh splits the experts.

  transport: all of them compute the same thing.
    'gather' every device sees the tokens of its whole expert axis and keeps its experts' rows; least traffic while the
      axis is shorter than the number of experts a token visits. 'a2a' padded all_to_all. 'ragged' exact row counts (TPU
      and GPU only). 'ragged_emulated' the same arithmetic anywhere, for tests. 'auto' gather on CPU or where the axis is
      short, else ragged.
  buffer: None holds the worst case, so no row is ever dropped; a factor such as 1.25 holds that multiple of the balanced
    load (of each pair of devices in 'a2a'), and the rows beyond are dropped and reported as `dropped_share`.
  """
  transport: str = 'auto'
  buffer: float | None = None

  def check(self):
    if self.transport not in TRANSPORTS:
      yield 'transport', self.transport, f'must be one of {", ".join(map(repr, TRANSPORTS))}'
    if self.buffer is not None and self.buffer <= 0: yield 'buffer', self.buffer, 'must be positive, or None for dropless'

  def resolve(self, platform: str, num_shards: int, active: float) -> str:
    """The transport to use on `platform` for experts split over `num_shards`, a token visiting `active` of them.

    Raises:
      ConfigError: the named transport does not exist there.
    """
    if self.transport == 'ragged' and platform == 'cpu':
      raise ConfigError('transport', 'ragged', "does not exist on cpu; choose 'auto', 'gather' or 'a2a'")
    if num_shards == 1: return 'local'
    if self.transport != 'auto': return self.transport
    return 'gather' if platform == 'cpu' or num_shards < active else 'ragged'
