"""Scores are what their equations say, and remember what they have to."""
import types

import jax
import numpy as np
import pytest

from efficient_lm.compression.scores import AtRandom, ByMagnitude, ByMovement, BySaliency

rng = np.random.default_rng(0)
STEPS = [(rng.normal(size=(4, 6)).astype(np.float32), rng.normal(size=(4, 6)).astype(np.float32)) for _ in range(5)]


def after(score):
  """What a score says after five steps."""
  memory = score.start(STEPS[0][0]) if score.remembers else None
  for values, gradient in STEPS: memory = score.remembered(memory, values, gradient)
  return np.asarray(score.of(types.SimpleNamespace(values=STEPS[-1][0], memory=memory, key=jax.random.key(1))))


def test_magnitude(): np.testing.assert_array_equal(after(ByMagnitude()), np.abs(STEPS[-1][0]))


@pytest.mark.parametrize('decay', [0., 0.9])
def test_saliency_is_a_running_mean(decay):
  expected = sum((1 - decay) * decay ** (4 - i) * np.abs(w * g) for i, (w, g) in enumerate(STEPS))
  np.testing.assert_allclose(after(BySaliency(decay=decay)), expected, rtol=1e-5)   # five float32 sums


def test_movement_is_what_steps_against_the_gradient_have_taken_away_from_zero():
  np.testing.assert_allclose(after(ByMovement()), -sum(w * g for w, g in STEPS), rtol=1e-4, atol=1e-6)   # float32 sums


def test_random_scores_are_those_of_their_key():
  of = lambda key: np.asarray(AtRandom().of(types.SimpleNamespace(values=STEPS[0][0], key=jax.random.key(key))))
  np.testing.assert_array_equal(of(0), of(0))
  assert np.all(of(0) != of(1))


def test_a_wrong_decay_is_named():
  assert [field for field, _, _ in BySaliency(decay=1.).check()] == ['decay'] and not list(BySaliency(decay=0.).check())
