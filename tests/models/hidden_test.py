"""The penalty on hidden units is its equation, over real tokens of the global batch, and drives units of relu to zero."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.models import spec
from efficient_lm.models.hidden import HiddenUnits
from efficient_lm.training import learner, losses, trainer
from efficient_lm.training.optimizers import AdamW
from tests.compressing import B, D, T, V, batch_of, drawn

pytestmark = pytest.mark.usefixtures('quick_compilation')

F = 24
KINDS = {'gated': spec.Gated(hidden=F, activation='relu2'), 'plain': spec.Plain(hidden=F, activation='relu2')}


def built(kind, **changes):
  return dataclasses.replace(KINDS[kind], **changes).build(spec.Site(D, 1, 1e-6), rngs=nnx.Rngs(0))


def batch(real=T):
  ones = (np.arange(T) < real).astype(np.int32) * np.ones((B, 1), np.int32)
  return batch_of() | {'segments_BT': ones, 'weights_BT': ones.astype(np.float32), 'bytes_BT': ones}


def model(weight, kind='gated'):
  penalty = None if weight is None else spec.L1(weight=weight)
  stack = spec.Stack(num_layers=2, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=2, head_dim=8),
                     mlp=dataclasses.replace(KINDS[kind], penalty=penalty))
  return drawn(spec.Transformer(vocab_size=V, dim=D, stacks=(stack,)))


@pytest.mark.parametrize('kind', KINDS)
def test_the_report_is_of_the_squared_relu_of_real_tokens(kind):
  layer = built(kind, penalty=spec.L1(weight=3.))
  x, segments = np.random.default_rng(0).normal(size=(2, 5, D)).astype(np.float32), np.array([[1, 1, 1, 0, 0], [1] * 5])
  y, report = layer(x, segments)
  h = np.maximum(layer.gate.contract('BTD,DF->BTF', x) if kind == 'gated' else layer.up.contract('BTD,DF->BTF', x), 0) ** 2
  if kind == 'gated': h = h * np.asarray(layer.up.contract('BTD,DF->BTF', x))
  real = h[segments > 0]
  np.testing.assert_allclose(report.losses()['l1'], 3 * np.abs(real).mean(), rtol=1e-5)
  np.testing.assert_allclose(report.metrics()['mlp/zeros'], np.mean(real == 0), rtol=1e-5)
  np.testing.assert_array_equal(y, built(kind)(x, segments)[0])
  assert built(kind)(x, segments)[1] is None, 'nothing is reported without a penalty'


def test_the_loss_has_it_of_every_layer_and_the_log_the_share_of_zeros():
  made = learner.assemble(model(2.), AdamW().build(3), (), jax.random.key(0), steps=3)
  outputs = losses.outputs_of(made.model, batch())
  total, named = losses.auxiliary(outputs, batch())
  report, = outputs.aux
  np.testing.assert_allclose(total, jnp.sum(report.losses()['l1']), rtol=1e-6)
  np.testing.assert_allclose(named['l1'], total / 2, rtol=1e-6)
  _, metrics = trainer.compiled_step(made)(learner.initial_state(made), made.loss, batch())
  logged = trainer.scalars(metrics)
  assert 0.2 < logged['mlp/zeros'] < 0.8 and logged['l1'] > 0


def test_microbatches_add_up_to_the_global_batch():
  made = learner.assemble(model(2.), AdamW().build(3), (), jax.random.key(0), steps=3)
  found = [trainer.compiled_step(made, accumulate=n)(learner.initial_state(made), made.loss, batch(real=10))[1]['loss']
           for n in (1, 4)]
  np.testing.assert_allclose(*found, rtol=1e-5)


def test_a_weight_of_zero_trains_as_without_and_a_large_one_makes_units_small_and_zero():
  def trained(weight):
    made = learner.assemble(model(weight), AdamW().build(60), (), jax.random.key(0), steps=60)
    state, step = learner.initial_state(made), trainer.compiled_step(made)
    for _ in range(60): state, metrics = step(state, made.loss, batch())
    return jax.tree.leaves(state.model), metrics
  without, none, much = trained(None), trained(0.), trained(100.)
  for ours, theirs in zip(without[0], none[0], strict=True): np.testing.assert_array_equal(ours, theirs)
  small, large = (metrics['layers'][0] for _, metrics in (much, none))
  # 60 steps: 0.17 times the magnitude and 1.19 times the zeros, which grow on (120 steps: 0.04 and 1.43).
  assert np.mean(small.magnitude) < 0.5 * np.mean(large.magnitude) and np.mean(small.zeros) > 1.1 * np.mean(large.zeros)


def test_reports_add_up_as_arrays_do():
  one = HiddenUnits.of(jnp.ones((2, 3, 4)), None, 1.)
  both = jax.tree.map(jnp.add, one, one)
  assert both.losses()['l1'] == one.losses()['l1'] == 1 and both.num_tokens == 12 and not one.reads_load


@pytest.mark.parametrize('wrong, field', [(spec.L1(weight=-1.), 'weight'), (spec.L1(weight=0.), None)], ids=repr)
def test_a_wrong_weight_is_named(wrong, field):
  assert [name for name, _, _ in wrong.check()] == ([field] if field else [])
