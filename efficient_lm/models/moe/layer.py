"""Mixture of experts: a router, experts as three grouped products, balancing terms, and optional shared experts."""
import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.layers import gated
from efficient_lm.models.mlp import FeedForward
from efficient_lm.models.moe import routing
from efficient_lm.models.moe.dispatch import dispatch_experts
from efficient_lm.models.moe.statistics import Statistics
from efficient_lm.parallel.sharding import constrain
from efficient_lm.tree import rewrite
from efficient_lm.weights.weight import Weight, initial


class LoadBias(nnx.Param):
  """Selection bias of loss-free balancing, one number an expert; metadata `rate` is its step.

  What autodiff calls its gradient is E times the excess of the expert's rows over their mean (see `tap`), so the update of
  Wang et al. is sign descent: value -= rate * sign(gradient). It is a whole number, so that an excess of 0 is exactly 0
  when microbatches are added up. The optimizer does that for Variables of this type, and leaves them out of clipping;
  accumulation, sharding and a guard against non-finite steps treat them like any other parameter.
  """


@jax.custom_vjp
def tap(x, bias_E, excess_E):
  """x; the gradient of `bias_E` is excess_E, whatever the loss makes of x."""
  return x


tap.defvjp(lambda x, bias_E, excess_E: (x, excess_E), lambda excess_E, g: (g, excess_E, None))


class Experts(nnx.Module):
  """E SwiGLU layers of F hidden units: y = down_e(silu(gate_e(x)) * up_e(x)) for the expert e of each row."""

  def __init__(self, num_experts: int, hidden: int, site, *, rngs: nnx.Rngs):
    sizes = dict(E=num_experts, D=site.dim, F=hidden)
    self.gate = initial(rngs.params(), sizes, 'EDF', 'D')
    self.up = initial(rngs.params(), sizes, 'EDF', 'D')
    self.down = initial(rngs.params(), sizes, 'EFD', 'F', scale=(2 * site.depth) ** -.5)

  def __call__(self, x_MD, sizes_E):
    """Rows sorted by expert, sizes_E of each -> y_MD, zero for rows past the sum."""
    h_MF = gated(self.gate.contract_grouped(x_MD, sizes_E), self.up.contract_grouped(x_MD, sizes_E))
    return self.down.contract_grouped(h_MF, sizes_E)

  def all(self, x_BTD):
    """y_BTED, every expert on every token."""
    h_BTEF = gated(self.gate.contract('BTD,EDF->BTEF', x_BTD), self.up.contract('BTD,EDF->BTEF', x_BTD))
    return self.down.contract('BTEF,EFD->BTED', h_BTEF)


class MoE(nnx.Module):
  """y = sum over the chosen experts of gate_e(x) * expert_e(x), plus the shared experts, or a shared layer of any kind,
  which see every token."""

  def __init__(self, spec, site, *, rngs: nnx.Rngs):
    self.router = initial(rngs.params(), dict(D=site.dim, E=spec.num_experts), 'DE', 'D')
    self.experts = Experts(spec.num_experts, spec.hidden, site, rngs=rngs)
    if spec.shared is not None: self.shared = spec.shared.build(site, rngs=rngs)
    else: self.shared = FeedForward(spec.num_shared * spec.hidden, site, rngs=rngs) if spec.num_shared else None
    rates = [term.rate for term in spec.balance if isinstance(term, routing.LossFreeBias)]
    self.load_bias = LoadBias(jnp.zeros(spec.num_experts), axes='E', rate=rates[0]) if rates else None
    # Copies: a module's static parts must not change with the config that it was built from.
    self.route, self.dispatch = dataclasses.replace(spec.router), dataclasses.replace(spec.dispatch)
    self.balance = tuple(dataclasses.replace(term) for term in spec.balance)
    self.num_experts, self.capacity = spec.num_experts, spec.capacity

  @property
  def active_experts(self) -> float:
    """Routed experts a token visits (on average where experts choose); shared ones come on top."""
    return self.route.active

  @property
  def refuses_cache(self) -> str:
    """Why the layer cannot read tokens through a cache; '' if it can."""
    return '' if self.route.causal else 'expert choice looks at whole sequences: it cannot decode token by token'

  def __call__(self, x_BTD, segments_BT=None, cached: bool = False):
    """y_BTD and `Statistics`. Tokens of segment 0 are padding: no expert sees them, nothing counts them. Capacity is for
    whole documents: a token that is read through a cache (`cached`) is never dropped, so the result does not depend on how
    a text is cut."""
    real_BT = jnp.ones(x_BTD.shape[:2], bool) if segments_BT is None else segments_BT > 0
    logits_BTE = constrain(self.router.contract('BTD,DE->BTE', x_BTD.astype(jnp.float32)), 'BTE')
    chosen = self._chosen(logits_BTE, None if segments_BT is None else real_BT)
    kept = chosen if self.capacity is None or cached else self._capped(chosen, segments_BT)
    # Cast before they are gathered over 'fsdp', not after: half the bytes, where the computation is in bfloat16.
    experts = rewrite(self.experts, Weight, lambda _, weight: weight.cast(x_BTD.dtype))
    y_BTD, overflow = dispatch_experts(experts, x_BTD, kept, self.dispatch, self.num_experts)
    statistics = self._statistics(logits_BTE, chosen, kept, overflow, real_BT.astype(jnp.float32))
    rows_E = statistics.rows_E
    excess_E = self.num_experts * rows_E - jnp.sum(rows_E)
    if self.load_bias is not None: y_BTD = tap(y_BTD, self.load_bias.get_value(), excess_E)
    if self.shared is not None: y_BTD += self.shared(x_BTD)[0]
    return y_BTD, statistics

  def _statistics(self, logits_BTE, chosen, kept, overflow, real_BT) -> Statistics:
    probs_BTE = self.route.probs(logits_BTE)
    # For the log, so it is not differentiated: where a probability is 0 its derivative is infinite.
    entropy_BT = jnp.sum(jax.scipy.special.entr(jax.lax.stop_gradient(probs_BTE)), -1)
    refused = jnp.sum(kept.expert_R == self.num_experts) - jnp.sum(chosen.expert_R == self.num_experts)
    return Statistics(
      rows_E=chosen.rows_by_expert(self.num_experts), num_tokens=jnp.sum(real_BT),
      entropy=jnp.sum(entropy_BT * real_BT), dropped=refused + overflow,
      term_sums=tuple(term.sums(logits_BTE, probs_BTE, real_BT) for term in self.balance), balance=self.balance)

  def oracle(self, x_BTD):
    """y_BTD computed densely, every expert on every token: what `__call__` must equal if no buffer overflows."""
    chosen = self.routing(x_BTD)
    kept = chosen if self.capacity is None else self._capped(chosen, None)
    gate_BTE = kept.dense_gates(self.num_experts)
    y_BTD = jnp.einsum('BTED,BTE->BTD', self.experts.all(x_BTD), gate_BTE.astype(x_BTD.dtype))
    return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)[0]

  def routing(self, x_BTD, real_BT=None):
    """Which expert sees which token, and with which gate, before any capacity (see `rows.py`)."""
    return self._chosen(self.router.contract('BTD,DE->BTE', x_BTD.astype(jnp.float32)), real_BT)

  def _chosen(self, logits_BTE, real_BT):
    bias_E = None if self.load_bias is None else jax.lax.stop_gradient(self.load_bias.get_value())
    return self.route(logits_BTE, bias_E, real_BT)

  def _capped(self, chosen, segments_BT):
    """What `capacity` leaves of the choices."""
    balanced = self.active_experts / self.num_experts   # rows of an expert a token
    room = [math.ceil(self.capacity * n * balanced) for n in range(chosen.expert_BTA.shape[1] + 1)]
    return chosen.capped(room, self.num_experts, segments_BT)
