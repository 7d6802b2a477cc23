"""Mixture of experts: a router, experts as three grouped products, balancing terms, and optional shared experts."""
import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.axes import constrain
from efficient_lm.models import spec as specs
from efficient_lm.models.layers import gated
from efficient_lm.models.mlp import FeedForward
from efficient_lm.models.moe import routing
from efficient_lm.models.moe.dispatch import dispatch_experts
from efficient_lm.tree import rewrite
from efficient_lm.weights.weight import Weight, initial


class LoadBias(nnx.Param):
  """Selection bias of loss-free balancing, one number an expert; metadata `rate` is its step.

  What autodiff calls its gradient is the load violation load_e / mean load - 1 (see `tap`), so the update of Wang et al.
  is sign descent: value -= rate * sign(gradient). The optimizer does that for Variables of this type, and leaves them
  out of clipping; accumulation, sharding and a guard against non-finite steps treat them like any other parameter.
  """


@jax.custom_vjp
def tap(x, bias_E, violation_E):
  """x; the gradient of `bias_E` is violation_E, whatever the loss makes of x."""
  return x


tap.defvjp(lambda x, bias_E, violation_E: (x, violation_E), lambda violation_E, g: (g, violation_E, None))


class Experts(nnx.Module):
  """E SwiGLU layers of F hidden units: y = down_e(silu(gate_e(x)) * up_e(x)) for the expert e of each row."""

  def __init__(self, num_experts: int, hidden: int, site: 'specs.Site', *, rngs: nnx.Rngs):
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
  """y = sum over the chosen experts of gate_e(x) * expert_e(x), plus the shared experts, which see every token."""

  def __init__(self, spec: 'specs.MoE', site: 'specs.Site', *, rngs: nnx.Rngs):
    self.router = initial(rngs.params(), dict(D=site.dim, E=spec.num_experts), 'DE', 'D')
    self.experts = Experts(spec.num_experts, spec.hidden, site, rngs=rngs)
    shared = specs.SwiGLU(hidden=spec.num_shared * spec.hidden)
    self.shared = FeedForward(shared, site, rngs=rngs) if spec.num_shared else None
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

  def __call__(self, x_BTD):
    """y_BTD; {'losses': weighted balancing terms, 'metrics': arrays for the log}."""
    logits_BTE = constrain(self.router.contract('BTD,DE->BTE', x_BTD.astype(jnp.float32)), 'BTE')
    chosen, kept = self._routing(logits_BTE)
    # Cast before they are gathered over 'fsdp', not after: half the bytes, where the computation is in bfloat16.
    experts = rewrite(self.experts, Weight, lambda _, weight: weight.narrowed(x_BTD.dtype))
    y_BTD, overflow = dispatch_experts(experts, x_BTD, kept, self.dispatch, self.num_experts)
    probs_BTE = self.route.probs(logits_BTE)
    load_E = chosen.load(self.num_experts)
    if self.load_bias is not None: y_BTD = tap(y_BTD, self.load_bias.get_value(), load_E - 1)
    if self.shared is not None: y_BTD += self.shared(x_BTD)[0]
    losses = {name: loss for term in self.balance for name, loss in term(logits_BTE, probs_BTE, load_E).items()}
    refused = jnp.sum(kept.expert_R == self.num_experts)
    metrics = {
      'load_E': load_E,                                # share of the routed rows times E: 1 is balanced
      'max_violation': jnp.max(load_E) - 1,            # MaxVio of Wang et al. 2024
      'dead_experts': jnp.sum(load_E == 0).astype(jnp.float32),
      'router_entropy': jnp.mean(jnp.sum(jax.scipy.special.entr(probs_BTE), -1)),   # nats
      'dropped_share': (refused + overflow) / kept.expert_R.size,   # by capacity and by buffers
    }
    return y_BTD, {'losses': losses, 'metrics': metrics}

  def oracle(self, x_BTD):
    """y_BTD computed densely, every expert on every token: what `__call__` must equal if no buffer overflows."""
    logits_BTE = self.router.contract('BTD,DE->BTE', x_BTD.astype(jnp.float32))
    gate_BTE = self._routing(logits_BTE)[1].dense_gates(self.num_experts)
    y_BTD = jnp.einsum('BTED,BTE->BTD', self.experts.all(x_BTD), gate_BTE.astype(x_BTD.dtype))
    return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)[0]

  def _routing(self, logits_BTE):
    """What the router chose, and what capacity leaves of it."""
    bias_E = None if self.load_bias is None else jax.lax.stop_gradient(self.load_bias.get_value())
    chosen = self.route(logits_BTE, bias_E)
    if self.capacity is None: return chosen, chosen
    balanced = logits_BTE.shape[1] * self.active_experts / self.num_experts
    return chosen, chosen.capped(math.ceil(self.capacity * balanced), self.num_experts)
