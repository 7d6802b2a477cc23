"""What is minimised. A loss reads `Outputs` and a batch and returns (scalar, metrics); it is an argument of the step.

A batch holds inputs_BT, targets_BT, weights_BT (1 where the target counts), bytes_BT (bytes of text a target stands for),
positions_BT and segments_BT.
"""
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from efficient_lm import axes as alphabet
from efficient_lm.ops.linear_divergence import linear_divergence


def outputs_of(model, batch):
  """Runs a model on a batch: attention stays within documents."""
  return model(batch['inputs_BT'], batch['positions_BT'], batch['segments_BT'])


def last_layer(outputs):
  """hidden_BTD and head_DV, whose product is the logits."""
  hidden_BTD = outputs.head.rounded(outputs.hidden_BTD, 'BTD')
  return hidden_BTD, outputs.head.materialize().astype(hidden_BTD.dtype)


def divergence(student, teacher, **options):
  """linear_divergence_BT of two last layers, each device on its own tokens: sums over shards of the vocabulary would have
  to meet in both passes. Devices that share the vocabulary share a sequence's tokens instead, and have both heads whole."""
  function = functools.partial(linear_divergence, **options)
  # T by the mesh axis of V.
  return alphabet.by_shard(function, ('BVD', 'DD', 'BVD', 'DD'), 'BV')(*student, *teacher)


def weighted_mean(values_BT, weights_BT):
  """sum(values * weights) / sum(weights); 0 for a batch in which nothing counts."""
  return jnp.sum(values_BT * weights_BT) / jnp.maximum(jnp.sum(weights_BT), 1)


def auxiliary(aux) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the layers' auxiliary losses (they are weighted already), and each by name, averaged over layers."""
  total, named = jnp.zeros(()), {}
  for stack in aux:
    for name, loss_L in stack.get('losses', {}).items():
      total += jnp.sum(loss_L)
      named.setdefault(name, []).append(loss_L.reshape(-1))
  return total, {name: jnp.concatenate(losses).mean() for name, losses in named.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NextToken:
  """Cross-entropy of the next token in nats, plus what the layers ask for (load balance, router z-loss …)."""

  def __call__(self, outputs, batch):
    nll_BT, _ = outputs.head.nll(outputs.hidden_BTD, batch['targets_BT'])
    cross_entropy = weighted_mean(nll_BT, batch['weights_BT'])
    extra, named = auxiliary(outputs.aux)
    per_byte = jnp.sum(batch['weights_BT']) / jnp.maximum(jnp.sum(batch['bytes_BT']), 1)
    metrics = {'cross_entropy': cross_entropy, 'bits_per_byte': cross_entropy * per_byte / math.log(2), **named}
    return cross_entropy + extra, metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distilled:
  """(1 - weight) * inner + weight * temperature^2 * KL(teacher || student), at `temperature` (Hinton et al. 2015, eq. 4).

  The teacher is a pytree in the loss, so it is neither differentiated, nor donated, nor saved with the student.
  """
  inner: Any
  teacher: Any
  weight: float = dataclasses.field(default=0.5, metadata=dict(static=True))
  temperature: float = dataclasses.field(default=1.0, metadata=dict(static=True))

  def __call__(self, outputs, batch):
    loss, metrics = self.inner(outputs, batch)
    if self.weight == 0: return loss, metrics
    teacher = last_layer(outputs_of(self.teacher, batch))
    kl_BT = divergence(last_layer(outputs), teacher, kind='forward_kl', temperature=self.temperature)
    kl = weighted_mean(kl_BT, batch['weights_BT'])
    return (1 - self.weight) * loss + self.weight * self.temperature ** 2 * kl, {**metrics, 'teacher_kl': kl}
