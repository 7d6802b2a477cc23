"""What is minimised. A loss reads `Outputs` and a batch and returns (scalar, metrics); it is an argument of the step.

A batch holds inputs_BT, targets_BT, weights_BT (1 where the target counts), bytes_BT (bytes of text a target stands for),
positions_BT and segments_BT (0 is padding). A microbatch also holds `totals`, those of its global batch, and a loss divides
its sums by them. So losses and metrics of microbatches add up to those of the global batch, however unequal they are.
"""
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from efficient_lm.errors import IncompatibleError
from efficient_lm.ops.linear_divergence import linear_divergence
from efficient_lm.parallel.sharding import by_shard
from efficient_lm.weights.weight import SoftCapped


@functools.partial(jax.tree_util.register_dataclass, meta_fields=[],
                   data_fields=['weight', 'num_bytes', 'num_tokens', 'reports'])
@dataclasses.dataclass(frozen=True)
class Totals:
  """Of a global batch: the weight of its targets, the bytes of text they stand for, its input tokens without padding, and
  what its layers report, summed over microbatches (as `Outputs.aux`; None where the batch is not divided, or where no loss
  reads more of them than a microbatch's own)."""
  weight: jax.Array
  num_bytes: jax.Array
  num_tokens: jax.Array
  reports: Any = None

  @classmethod
  def of(cls, batch) -> 'Totals':
    """Those that a microbatch brings; of a batch that is not divided, its own."""
    if 'totals' in batch: return batch['totals']
    return cls(jnp.sum(batch['weights_BT']), jnp.sum(batch['bytes_BT']), jnp.sum(batch['segments_BT'] > 0))


def outputs_of(model, batch):
  """Runs a model on a batch: attention stays within documents."""
  return model(batch['inputs_BT'], batch['positions_BT'], batch['segments_BT'])


def last_layer(outputs):
  """hidden_BTD and head_DV, whose product is the logits. Raises IncompatibleError where logits are more than that."""
  if isinstance(outputs.head, SoftCapped):
    raise IncompatibleError('logits have a soft cap: a divergence of two models is not computed of those')
  hidden_BTD = outputs.head.prepare_input(outputs.hidden_BTD, 'BTD')
  return hidden_BTD, outputs.head.materialize().astype(hidden_BTD.dtype)


def divergence(student, teacher, **options):
  """linear_divergence_BT of two last layers, each device on its own tokens: sums over shards of the vocabulary would have
  to meet in both passes. Devices that share the vocabulary share a sequence's tokens instead, and have both heads whole."""
  function = functools.partial(linear_divergence, **options)
  # T by the mesh axis of V.
  return by_shard(function, ('BVD', 'DD', 'BVD', 'DD'), 'BV')(*student, *teacher)


def weighted_mean(values_BT, batch):
  """sum(values * weights) over the weight of the global batch; 0 for one in which nothing counts."""
  weight = Totals.of(batch).weight
  return jnp.sum(values_BT * batch['weights_BT']) / jnp.where(weight == 0, 1, weight)


def auxiliary(outputs, batch) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the auxiliary losses of the layers, which are weighted already, and each by its name, averaged over layers."""
  total, named, totals = jnp.zeros(()), {}, Totals.of(batch)
  for report, whole in zip(outputs.aux, totals.reports or [None] * len(outputs.aux), strict=True):
    if report is None: continue
    for name, loss_L in report.losses(totals.num_tokens, whole).items():
      total += jnp.sum(loss_L)
      named.setdefault(name, []).append(loss_L.reshape(-1))
  return total, {name: jnp.concatenate(losses).mean() for name, losses in named.items()}


class Loss:
  """A loss of tokens, `task(outputs, batch) -> (scalar, metrics)`, plus the auxiliary losses of the layers (load balance,
  router z-loss …). These are added whole: a technique that mixes losses mixes tasks."""

  def task(self, outputs, batch):
    raise NotImplementedError

  def __call__(self, outputs, batch):
    value, metrics = self.task(outputs, batch)
    extra, named = auxiliary(outputs, batch)
    return value + extra, {**metrics, **named}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NextToken(Loss):
  """Cross-entropy of the next token in nats."""

  def task(self, outputs, batch):
    nll_BT, _ = outputs.head.nll(outputs.hidden_BTD, batch['targets_BT'])
    cross_entropy, totals = weighted_mean(nll_BT, batch), Totals.of(batch)
    per_byte = totals.weight / jnp.maximum(totals.num_bytes, 1)
    return cross_entropy, {'cross_entropy': cross_entropy, 'bits_per_byte': cross_entropy * per_byte / math.log(2)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distilled(Loss):
  """(1 - weight) * task of `inner` + weight * temperature^2 * KL(teacher || student), at `temperature` (Hinton et al. 2015,
  eq. 4). The auxiliary losses of the layers are added whole.

  The teacher is a pytree in the loss, so it is neither differentiated, nor donated, nor saved with the student.
  """
  inner: Any
  teacher: Any
  weight: float = dataclasses.field(default=0.5, metadata=dict(static=True))
  temperature: float = dataclasses.field(default=1.0, metadata=dict(static=True))

  def task(self, outputs, batch):
    task, metrics = self.inner.task(outputs, batch)
    if self.weight == 0: return task, metrics
    teacher = last_layer(outputs_of(self.teacher, batch))
    kl_BT = divergence(last_layer(outputs), teacher, kind='forward_kl', temperature=self.temperature)
    kl = weighted_mean(kl_BT, batch)
    return (1 - self.weight) * task + self.weight * self.temperature ** 2 * kl, {**metrics, 'teacher_kl': kl}
