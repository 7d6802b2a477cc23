"""What a config says about a mixture of experts: who chooses, what balances, how tokens travel.

Every choice is a value: a new router or balancing term is a new dataclass with the same methods, in any file. The
classes are hashable by value because a module carries them beside its arrays; they are mutable because a config may be
overridden field by field. Nothing here loads JAX before a model runs.

  router(logits_BTE, bias_E, real_BT)
    The routing (`rows.py`): which expert sees which token, and with which gate. No expert sees padding (real_BT False).
  router.probs(logits_BTE)
    probs_BTE, which the balancing terms and the metrics read.
  term.sums(logits_BTE, probs_BTE, real_BT)
    What a balancing term needs of the tokens, summed over those that are not padding.
  term.loss(sums, load_E, num_tokens)
    {name: weighted loss}, from sums over tokens; load_E and num_tokens are those of the global batch.
  term.reads_load
    Whether `loss` depends on load_E. If not, a microbatch can be differentiated before the others have been read.

Gates are normalised in logits, and ties between scores that are equal in float32 (probabilities that underflow, sigmoids
that are 1) go to the larger logit: so gates are finite, and a load bias that is the same for all experts changes nothing.
"""
import dataclasses
import math
from typing import Any

from efficient_lm.errors import ConfigError
from efficient_lm.lazy import lazy

jax = lazy('jax')
jnp = lazy('jax.numpy')

TRANSPORTS = ('auto', 'gather', 'a2a', 'ragged', 'ragged_emulated')
config = dataclasses.dataclass(kw_only=True, unsafe_hash=True)


def _chosen(values_BTE, expert_BTA):
  """values at the chosen experts, (B, T, A). Compared and summed, not gathered: the gradient then needs no scatter."""
  chosen_BTAE = expert_BTA[..., None] == jnp.arange(values_BTE.shape[-1])
  return jnp.sum(jnp.where(chosen_BTAE, values_BTE[..., None, :], 0), -1)


def _best(score, tie_break, k: int):
  """Indices of the k largest scores in the last dimension; equal ones by the larger `tie_break`, then by the lower index."""
  order = jnp.argsort(tie_break, axis=-1, descending=True)
  _, place = jax.lax.top_k(jnp.take_along_axis(score, order, -1), k)
  return jnp.take_along_axis(order, place, -1)


def _check_top_k(top_k: int, num_experts: int):
  if not 1 <= top_k <= num_experts: yield 'top_k', top_k, f'must be from 1 to num_experts = {num_experts}'


@config
class SoftmaxTopK:
  """The `top_k` largest of a softmax over all experts (Shazeer et al. 2017; Switch, arXiv:2101.03961, eq. 1-2). `normalize`
  divides the gates by their sum (Mixtral does, OLMoE does not): the softmax of the chosen logits, which is finite where
  probabilities are too small to be divided."""
  top_k: int
  normalize: bool = True

  causal = True

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

  def __call__(self, logits_BTE, bias_E=None, real_BT=None):
    from efficient_lm.models.moe import rows
    fixed_BTE = jax.lax.stop_gradient(logits_BTE)
    if bias_E is None: _, expert_BTA = jax.lax.top_k(fixed_BTE, self.top_k)
    else: expert_BTA = _best(self.probs(fixed_BTE) + bias_E, fixed_BTE, self.top_k)
    if self.normalize: gate_BTA = jax.nn.softmax(_chosen(logits_BTE, expert_BTA))
    else: gate_BTA = _chosen(self.probs(logits_BTE), expert_BTA)
    return rows.TokenChoice(expert_BTA, gate_BTA).of_real(real_BT, logits_BTE.shape[-1])


@config
class SigmoidTopK:
  """The `top_k` largest sigmoids, their gates normalised and multiplied by `scale` (DeepSeek-V3, arXiv:2412.19437, eq.
  12-16). Experts in `num_groups` equal groups: a token chooses within its `top_groups` best groups only, a group's score
  being the sum of those of its two best experts (section 2.1.2, node-limited routing). Normalised in logarithms: finite
  where sigmoids are too small to be divided."""
  top_k: int
  num_groups: int = 1
  top_groups: int = 1
  scale: float = 1.0

  causal = True

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
    return jax.nn.softmax(jax.nn.log_sigmoid(logits_BTE))

  def __call__(self, logits_BTE, bias_E=None, real_BT=None):
    from efficient_lm.models.moe import rows
    fixed_BTE = jax.lax.stop_gradient(logits_BTE)
    # Without a bias the order of the scores is that of the logits.
    score_BTE = fixed_BTE if bias_E is None else jax.nn.sigmoid(fixed_BTE) + bias_E
    if self.top_groups < self.num_groups:
      score_BTE = jnp.where(self._allowed(fixed_BTE, bias_E), score_BTE, -jnp.inf)   # a bias may make true scores negative
    if bias_E is None: _, expert_BTA = jax.lax.top_k(score_BTE, self.top_k)
    else: expert_BTA = _best(score_BTE, fixed_BTE, self.top_k)
    gate_BTA = jax.nn.softmax(_chosen(jax.nn.log_sigmoid(logits_BTE), expert_BTA)) * self.scale
    return rows.TokenChoice(expert_BTA, gate_BTA).of_real(real_BT, logits_BTE.shape[-1])

  def _allowed(self, logits_BTE, bias_E):
    """Whether the expert is in one of the token's best groups, (B, T, E)."""
    # A group's sum in logarithms: it orders groups whose sigmoids are all 0 in float32, too.
    score = tie_break = jax.nn.logsumexp(self._two_best(jax.nn.log_sigmoid(logits_BTE)), -1)
    if bias_E is not None: score = jnp.sum(self._two_best(jax.nn.sigmoid(logits_BTE) + bias_E), -1)
    best = _best(score, tie_break, self.top_groups)
    allowed = jnp.any(best[..., None] == jnp.arange(self.num_groups), -2)
    return jnp.repeat(allowed, logits_BTE.shape[-1] // self.num_groups, -1)

  def _two_best(self, score_BTE):
    """The scores of the two best experts of each group, in a last dimension of their own."""
    grouped = score_BTE.reshape(*score_BTE.shape[:-1], self.num_groups, -1)
    return jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0]


@config
class ExpertChoice:
  """Each expert takes its ceil(capacity * n / E) best tokens of a sequence of n tokens, padding not counted (Zhou et al.
  2022, arXiv:2202.09368, eq. 1), so a token visits `capacity` experts on average, some none. Perfectly balanced, but NOT
  CAUSAL: who is chosen depends on the whole sequence, all its documents, so a language model trained with it leaks the
  future and cannot decode as it trained.
  """
  capacity: float

  causal = False

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

  def __call__(self, logits_BTE, bias_E=None, real_BT=None):
    """`bias_E` moves all scores of an expert alike, which changes none of its choices."""
    from efficient_lm.models.moe import rows
    length, num_experts = logits_BTE.shape[1:]
    accepted = [math.ceil(self.capacity * n / num_experts) for n in range(length + 1)]   # of a sequence of n tokens
    probs_BTE = self.probs(logits_BTE)
    if real_BT is not None: probs_BTE = jnp.where(real_BT[..., None], probs_BTE, -1)
    gate_BEC, token_BEC = jax.lax.top_k(jnp.swapaxes(probs_BTE, 1, 2), accepted[length])
    if real_BT is not None:
      accepted_B = jnp.asarray(accepted)[jnp.sum(real_BT, 1)]
      empty_B1C = jnp.arange(accepted[length]) >= accepted_B[:, None, None]
      token_BEC, gate_BEC = jnp.where(empty_B1C, length, token_BEC), jnp.where(empty_B1C, 0, gate_BEC)
    return rows.ExpertsChoice(token_BEC, gate_BEC, length)


@config
class Skipping:
  """The choices of `inner` without those whose gate is below `beta` times the token's largest: dynamic skipping (Lu et al.
  2024, arXiv 2402.14800, section 3.3, with two experts a token). The gates that stay are multiplied to the sum that all had.
  A token visits `active` experts at most."""
  inner: Any
  beta: float

  causal = True

  def check(self):
    if not 0 <= self.beta <= 1: yield 'beta', self.beta, 'must be from 0, which skips nothing, to 1'
    if not getattr(self.inner, 'causal', False): yield 'inner', self.inner, 'must be a router in which tokens choose'

  def check_experts(self, num_experts: int):
    yield from self.inner.check_experts(num_experts)

  @property
  def active(self) -> int:
    """The most experts that a token visits."""
    return self.inner.active

  @property
  def num_groups(self) -> int:
    """Of experts, that the choice is limited to some of."""
    return getattr(self.inner, 'num_groups', 1)

  def probs(self, logits_BTE):
    return self.inner.probs(logits_BTE)

  def __call__(self, logits_BTE, bias_E=None, real_BT=None):
    found, num_experts = self.inner(logits_BTE, bias_E, real_BT), logits_BTE.shape[-1]
    gate_BTA = found.gate_BTA
    skip_BTA = gate_BTA < self.beta * jnp.max(gate_BTA, -1, keepdims=True)
    left_BTA = jnp.where(skip_BTA, 0, gate_BTA)
    left_BTA *= jnp.sum(gate_BTA, -1, keepdims=True) / jnp.sum(left_BTA, -1, keepdims=True)
    return dataclasses.replace(found, expert_BTA=jnp.where(skip_BTA, num_experts, found.expert_BTA), gate_BTA=left_BTA)


@config
class LoadBalance:
  """weight * E * sum_e f_e P_e over the global batch: f_e the share of routed rows that went to expert e, P_e its mean
  probability (Switch, arXiv:2101.03961, eq. 4-6). Balanced routing gives exactly `weight`, whatever top_k is."""
  weight: float = 0.01

  def check(self):
    if self.weight < 0: yield 'weight', self.weight, 'must be 0 or more'

  reads_load = True

  def sums(self, logits_BTE, probs_BTE, real_BT):
    """The experts' probabilities, (E,)."""
    return jnp.sum(probs_BTE * real_BT[..., None], (0, 1))

  def loss(self, sums, load_E, num_tokens):
    return {'load_balance': self.weight * jnp.sum(load_E * sums, -1) / num_tokens}


@config
class RouterZ:
  """weight * mean over tokens of logsumexp(logits)^2, which keeps router logits small (ST-MoE, arXiv:2202.08906, eq. 5)."""
  weight: float = 0.001

  def check(self):
    if self.weight < 0: yield 'weight', self.weight, 'must be 0 or more'

  reads_load = False

  def sums(self, logits_BTE, probs_BTE, real_BT):
    """The squared log normalisers."""
    return jnp.sum(jax.nn.logsumexp(logits_BTE, -1) ** 2 * real_BT)

  def loss(self, sums, load_E, num_tokens):
    return {'router_z': self.weight * sums / num_tokens}


@config
class LossFreeBias:
  """A bias on the scores, for the selection only, that each step moves by `rate` towards the experts with less than
  the mean load (Wang et al. 2024, arXiv:2408.15664, algorithm 1). No loss: see `LoadBias` in models/moe/layer.py."""
  rate: float = 0.001

  def check(self):
    if self.rate <= 0: yield 'rate', self.rate, 'must be positive'

  reads_load = False

  def sums(self, logits_BTE, probs_BTE, real_BT): return ()

  def loss(self, sums, load_E, num_tokens): return {}


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
