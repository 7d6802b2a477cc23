"""Losses count what weighs, average as they say, and a teacher pulls towards itself."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.models.transformer import Outputs
from efficient_lm.ops import mosaic
from efficient_lm.training import losses
from efficient_lm.training.losses import Distilled, NextToken, auxiliary, weighted_mean
from efficient_lm.weights.weight import Dense

B, T, V = 2, 4, 6


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def outputs_with(logits_BTV, aux=()):
  """Outputs whose logits are given: the hidden state times an identity."""
  return Outputs(jnp.asarray(logits_BTV), Dense(jnp.eye(V), 'DV', 'D'), aux)


def batch_of(seed=0):
  rng = np.random.default_rng(seed)
  return {'inputs_BT': rng.integers(0, V, (B, T)), 'targets_BT': rng.integers(0, V, (B, T)),
          'weights_BT': np.array([[1, 1, 0, 1], [1, 0, 0, 1]], np.float32), 'bytes_BT': rng.integers(1, 5, (B, T)),
          'positions_BT': np.zeros((B, T), int), 'segments_BT': np.ones((B, T), int)}


class Teacher:
  """Answers with fixed logits, whatever it is asked."""

  def __init__(self, logits_BTV):
    self.logits_BTV = logits_BTV

  def __call__(self, tokens_BT, positions_BT, segments_BT):
    return outputs_with(self.logits_BTV)


class Report:
  """What a layer reports: auxiliary losses, given."""

  def __init__(self, losses): self.given = losses

  def losses(self, num_tokens, whole): return self.given


# Of a stack of two layers, of one without, and of one.
REPORTS = (Report({'a': jnp.array([1.0, 2.0]), 'b': jnp.array([5.0, 7.0])}), None, Report({'a': jnp.array([6.0])}))


def log_softmax(logits):
  return logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))


def test_weighted_mean_is_the_mean_of_what_counts_and_zero_where_nothing_does():
  values, batch = draw(B, T), batch_of()
  for scale in (1, 0.01):
    weights = batch['weights_BT'] * scale
    mean = weighted_mean(values, batch | {'weights_BT': weights})
    assert float(mean) == pytest.approx(np.average(values, weights=weights), rel=1e-6)
  assert float(weighted_mean(values, batch | {'weights_BT': np.zeros((B, T))})) == 0


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
  loss, metrics = NextToken()(outputs_with(np.zeros((B, T, V))), batch_of())
  assert float(loss) == float(metrics['cross_entropy']) == pytest.approx(math.log(V), rel=1e-6)


def test_cross_entropy_and_bits_per_byte_by_hand():
  logits, batch = draw(B, T, V), batch_of()
  _, metrics = NextToken()(outputs_with(logits), batch)
  nats = -np.take_along_axis(log_softmax(logits), batch['targets_BT'][..., None], -1)[..., 0] * batch['weights_BT']
  assert float(metrics['cross_entropy']) == pytest.approx(nats.sum() / 5, rel=1e-5)
  bits = nats.sum() / math.log(2)
  assert float(metrics['bits_per_byte']) == pytest.approx(bits / batch['bytes_BT'].sum(), rel=1e-5)


def test_a_target_that_does_not_count_changes_nothing():
  batch, logits = batch_of(), draw(B, T, V)
  other = {**batch, 'targets_BT': np.where(batch['weights_BT'] > 0, batch['targets_BT'], 0)}
  assert np.any(other['targets_BT'] != batch['targets_BT'])
  assert float(NextToken()(outputs_with(logits), batch)[0]) == float(NextToken()(outputs_with(logits), other)[0])


def test_auxiliary_losses_are_summed_over_layers_and_reported_as_their_mean():
  total, named = auxiliary(outputs_with(draw(B, T, V), REPORTS), batch_of())
  assert float(total) == 21 and {name: float(value) for name, value in named.items()} == {'a': 3, 'b': 6}
  plain, _ = NextToken()(outputs_with(draw(B, T, V)), batch_of())
  loss, metrics = NextToken()(outputs_with(draw(B, T, V), REPORTS), batch_of())
  assert float(loss - plain) == pytest.approx(21, rel=1e-6) and float(metrics['a']) == 3


def test_layers_are_told_the_totals_of_the_global_batch():
  """The number of its tokens without padding, and what the same layer reports of all of it where that is known."""
  class Asking(Report):
    def losses(self, num_tokens, whole): return {'a': jnp.float32(num_tokens + (whole or 0))}
  batch = batch_of() | {'segments_BT': np.array([[1, 1, 1, 0], [1, 0, 0, 0]])}
  assert float(auxiliary(outputs_with(draw(B, T, V), (Asking(()), None)), batch)[0]) == 4
  batch['totals'] = losses.Totals(jnp.float32(5), jnp.float32(9), 40, (100, None))
  assert float(auxiliary(outputs_with(draw(B, T, V), (Asking(()), None)), batch)[0]) == 140


@pytest.mark.parametrize('cut', [1, 2])
def test_losses_of_parts_of_a_batch_add_up_to_that_of_the_batch(cut):
  """However many of their targets count: all divide by the totals of the whole."""
  student, teacher, batch = draw(B, T, V), draw(B, T, V, seed=1), batch_of()
  rows = [slice(i * B // cut, (i + 1) * B // cut) for i in range(cut)]
  def found(part, totals):
    loss = Distilled(NextToken(), Teacher(teacher[part]), 0.5, 2.0)
    return loss(outputs_with(student[part]), {name: x[part] for name, x in batch.items()} | totals)
  whole, metrics = found(slice(None), {})
  parts = [found(part, {'totals': losses.Totals.of(batch)}) for part in rows]
  assert float(sum(value for value, _ in parts)) == pytest.approx(float(whole), rel=1e-6)
  for name in metrics:
    assert float(sum(part[name] for _, part in parts)) == pytest.approx(float(metrics[name]), rel=1e-6), name


@pytest.mark.parametrize('weight', [0.25, 1.0])
@pytest.mark.parametrize('temperature', [1.0, 3.0])
@pytest.mark.parametrize('reports, extra', [((), 0), (REPORTS, 21)], ids=['dense', 'mixture'])
def test_distillation_is_its_equation(weight, temperature, reports, extra):
  """What the layers ask for is added whole, whatever the weight."""
  student, teacher, batch = draw(B, T, V), draw(B, T, V, seed=1), batch_of()
  loss, metrics = Distilled(NextToken(), Teacher(teacher), weight, temperature)(outputs_with(student, reports), batch)
  log_p, log_q = (log_softmax(logits / temperature) for logits in (teacher, student))
  kl = np.average(np.sum(np.exp(log_p) * (log_p - log_q), -1), weights=batch['weights_BT'])
  assert float(metrics['teacher_kl']) == pytest.approx(kl, rel=1e-4)
  inner = float(metrics['cross_entropy'])
  assert float(loss) == pytest.approx((1 - weight) * inner + weight * temperature ** 2 * kl + extra, rel=1e-4)


@pytest.mark.parametrize('weights', [(0.0, 0.7), (0.25, 1.0), (0.5, 0.0, 0.9)])
def test_distilling_several_times_mixes_tokens_losses_and_leaves_the_layers_alone(weights):
  student, batch, loss = draw(B, T, V), batch_of(), NextToken()
  wanted = float(loss(outputs_with(student), batch)[0])
  for seed, weight in enumerate(weights, 1):
    teacher, temperature = Teacher(draw(B, T, V, seed=seed)), 4.0 - seed
    kl = float(Distilled(NextToken(), teacher, 1.0, temperature)(outputs_with(student), batch)[0])   # times temperature^2
    loss, wanted = Distilled(loss, teacher, weight, temperature), (1 - weight) * wanted + weight * kl
  assert float(loss(outputs_with(student, REPORTS), batch)[0]) == pytest.approx(wanted + 21, rel=1e-5)


def test_a_teacher_equal_to_the_student_has_divergence_0_and_pulls_nowhere():
  student = draw(B, T, V)
  only_teacher = Distilled(NextToken(), Teacher(student), 1.0, 2.0)
  value, slope = jax.value_and_grad(lambda logits: only_teacher(outputs_with(logits), batch_of())[0])(student)
  # Each is a difference of equal numbers; the gradient is a softmax minus itself.
  assert abs(float(value)) < 1e-6 and np.abs(slope).max() < 1e-6


def test_a_high_temperature_matches_logits():
  """Hinton et al. 2015, eq. 4: T^2 KL tends to the mean over V of (z - v)^2 / 2, logits centred; the error is 1 / T."""
  student, teacher, batch = draw(B, T, V), draw(B, T, V, seed=1), batch_of()
  batch['weights_BT'] = np.ones((B, T), np.float32)
  loss, _ = Distilled(NextToken(), Teacher(teacher), 1.0, 100.0)(outputs_with(student), batch)
  centred = (student - student.mean(-1, keepdims=True)) - (teacher - teacher.mean(-1, keepdims=True))
  assert float(loss) == pytest.approx(np.mean(centred ** 2) / 2, rel=0.05)


def test_weight_0_is_the_inner_loss_bit_for_bit_and_never_asks_the_teacher():
  student, batch = outputs_with(draw(B, T, V)), batch_of()
  loss, metrics = Distilled(NextToken(), None, 0.0)(student, batch)
  plain, plain_metrics = NextToken()(student, batch)
  assert float(loss) == float(plain) and metrics.keys() == plain_metrics.keys()


def test_the_teacher_receives_no_gradient():
  def loss(teacher):
    return Distilled(NextToken(), Teacher(teacher), 1.0)(outputs_with(draw(B, T, V)), batch_of())[0]
  np.testing.assert_array_equal(jax.grad(loss)(jnp.asarray(draw(B, T, V, seed=1))), 0)


@pytest.mark.parametrize('sizes', [(2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 1, 8), (8, 1, 1, 1)])
@pytest.mark.parametrize('tokens', [8, 7])
def test_shards_of_a_divergence_are_the_whole_and_kernels_can_stand_there(sizes, tokens, mesh, monkeypatch):
  """In value and gradients; where the tokens do not divide, the compiler cuts what it can."""
  op, seen = losses.linear_divergence, []
  def observed(*arrays, **options):
    seen.append((mosaic.cut_by_compiler(), arrays[0].shape))
    return op(*arrays, **options)
  monkeypatch.setattr(losses, 'linear_divergence', observed)
  arrays = draw(8, tokens, 6), draw(6, 24, seed=1), draw(8, tokens, 4, seed=2), draw(4, 24, seed=3)
  weights_BT = draw(8, tokens, seed=4)
  def both():
    total = lambda hidden, head: jnp.sum(weights_BT * losses.divergence((hidden, head), arrays[2:], kind='reverse_kl'))
    return jax.jit(jax.value_and_grad(total, (0, 1)))(*arrays[:2])
  alone = both()
  with mesh(*sizes): shared = both()
  for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(alone), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())   # sums of at most 64 tokens in another order
  why, shape = seen[-1]
  divides = tokens % sizes[-1] == 0
  assert (not why) == divides
  assert shape == ((8 // math.prod(sizes[:3]), tokens // sizes[-1], 6) if divides else (8, tokens, 6))
