"""Gradients of a trained model's loss by its weights, as statistics over calibration batches."""
import functools

import jax
import jax.numpy as jnp

from efficient_lm.compression.calibration import EMPTY
from efficient_lm.compression.rewriting import apply_where
from efficient_lm.errors import IncompatibleError
from efficient_lm.training.losses import outputs_of
from efficient_lm.weights.weight import Dense


def gradients(model, batches, where: str, statistic: str) -> dict:
  """Of each weight whose path matches, the array of its gradients' mean over batches ('mean'), or of their squares'
  ('mean_square'), float32; of the values that it multiplies by, whatever wraps them.

  The loss is the mean negative log-likelihood of a batch's targets. Raises IncompatibleError if there is no batch, or a
  gradient is not finite."""
  arrays = {}
  apply_where(model, where, lambda path, weight: arrays.setdefault(path, weight.materialize()) is None or weight)
  total, count = None, 0
  for batch in batches:
    found = _of_batch(model, arrays, batch, where=where, square=statistic == 'mean_square')
    total = found if total is None else jax.tree.map(jnp.add, total, found)
    count += 1
  if total is None: raise IncompatibleError(EMPTY)
  for path, array in total.items():
    if not bool(jnp.isfinite(jnp.sum(array))): raise IncompatibleError(f'{path}: its gradients are not finite')
  return jax.tree.map(lambda array: array / count, total)


@functools.partial(jax.jit, static_argnames=('where', 'square'))
def _of_batch(model, arrays, batch, *, where: str, square: bool):
  def loss(arrays):
    dense = lambda path, weight: Dense(arrays[path], weight.axes, weight.inputs)
    outputs = outputs_of(apply_where(model, where, dense), batch)
    nll_BT, _ = outputs.head.nll(outputs.hidden_BTD, batch['targets_BT'])
    return jnp.sum(nll_BT * batch['weights_BT']) / jnp.maximum(jnp.sum(batch['weights_BT']), 1)
  found = jax.tree.map(lambda array: array.astype(jnp.float32), jax.grad(loss)(arrays))
  return jax.tree.map(jnp.square, found) if square else found
