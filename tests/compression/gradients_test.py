"""Gradients of a model's loss by its weights: those of autodiff, as a mean or as a mean of squares over batches."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.compression.gradients import gradients
from efficient_lm.errors import IncompatibleError
from efficient_lm.training import losses
from efficient_lm.tree import select
from efficient_lm.weights.weight import Weight
from tests.compressing import T, batch_of, model_of

WHERE = r'(up|value)$'
pytestmark = pytest.mark.usefixtures('quick_compilation')


def batches():
  ones = np.ones((8, T), np.int32)
  return [batch_of(seed) | {'weights_BT': ones.astype(np.float32), 'bytes_BT': ones} for seed in range(2)]


@jax.jit
def by_autodiff(model, batch):
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  loss = lambda params: losses.NextToken().task(losses.outputs_of(nnx.merge(graph, params, rest), batch), batch)[0]
  return nnx.merge(graph, jax.grad(loss)(params), rest)


@pytest.mark.parametrize('mlp', ['dense', 'experts'])
def test_they_are_those_of_the_loss(mlp):
  model = model_of(mlp=mlp)
  each = [dict(select(by_autodiff(model, batch), Weight, WHERE)) for batch in batches()]
  mean, square = (gradients(model, batches(), WHERE, statistic) for statistic in ('mean', 'mean_square'))
  assert set(mean) == set(square) == set(each[0]) and len(mean) == (2 if mlp == 'dense' else 3)
  for path in mean:
    of_batches = jnp.stack([one[path].materialize() for one in each])
    size = float(jnp.max(jnp.abs(of_batches)))   # float32 sums of two programs
    np.testing.assert_allclose(mean[path], of_batches.mean(0), atol=1e-5 * size)
    np.testing.assert_allclose(square[path], (of_batches ** 2).mean(0), atol=1e-5 * size ** 2)


def test_no_batch_is_refused():
  with pytest.raises(IncompatibleError, match='calibration has no data'): gradients(model_of(), [], WHERE, 'mean')
