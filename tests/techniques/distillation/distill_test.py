"""A teacher pulls, and is not moved."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.models import spec
from efficient_lm.techniques.distillation.distill import Distill
from efficient_lm.training import trainer
from efficient_lm.training.learner import assemble, initial_state
from efficient_lm.training.losses import NextToken
from efficient_lm.training.optimizers import AdamW, WarmupStableDecay

V, D, B, T = 16, 8, 4, 6
TEACHER_SEED = 7


@functools.cache
def model(seed=0, vocab_size=V):
  """A model with numbers drawn by numpy."""
  stack = spec.Stack(num_layers=1, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=4),
                     mlp=spec.SwiGLU(hidden=8))
  described = spec.Transformer(vocab_size=vocab_size, dim=D, stacks=(stack,))
  rng = np.random.default_rng(seed)
  abstract = jax.eval_shape(lambda: described.build(rngs=nnx.Rngs(0)))
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.6, leaf.dtype), abstract)


class Given:
  """A teacher: anything that loads."""

  def __init__(self, made): self.made = made

  def load(self, mesh=None): return self.made


def batch_of(seed=0):
  tokens = np.random.default_rng(seed).integers(0, V, (B, T + 1)).astype(np.int32)
  ones = np.ones((B, T), np.int32)
  return {'inputs_BT': tokens[:, :-1], 'targets_BT': tokens[:, 1:], 'weights_BT': ones.astype(np.float32),
          'bytes_BT': ones, 'segments_BT': ones, 'positions_BT': np.tile(np.arange(T, dtype=np.int32), (B, 1))}


def learner_of(*techniques):
  optimizer = AdamW(schedule=WarmupStableDecay(peak=1e-2, warmup=0, decay=0), weight_decay=0.0).build(1000)
  return assemble(model(), optimizer, techniques, jax.random.key(0))


def losses(learner, count):
  """The metrics of each of `count` steps, and the last state."""
  state, step, rows = initial_state(learner), trainer.compiled_step(learner), []
  for i in range(count):
    state, metrics = step(state, learner.loss, batch_of(i % 2))
    rows.append(trainer.scalars(metrics))
  return rows, state


@functools.cache
def taught():
  """Taught by another model and by nothing else, for long enough to see it."""
  return losses(learner_of(Distill(teacher=Given(model(TEACHER_SEED)), weight=1.0)), 60)


@functools.cache
def plain():
  return losses(learner_of(), 4)


def test_the_student_comes_closer_to_its_teacher():
  divergence = [row['teacher_kl'] for row in taught()[0]]
  assert divergence[-1] < 0.2 * divergence[0] and min(divergence) > 0


def test_neither_teacher_nor_start_model_is_touched_by_sixty_donated_steps():
  before = {seed: [np.array(leaf) for leaf in jax.tree.leaves(jax.tree.map(jnp.copy, model(seed)))]
            for seed in (0, TEACHER_SEED)}
  taught()
  for seed, leaves in before.items():
    for a, b in zip(jax.tree.leaves(model(seed)), leaves, strict=True): np.testing.assert_array_equal(a, b)


def test_a_model_can_be_its_own_teacher_and_starts_with_divergence_0():
  """Its buffers serve both as teacher and as the start of the student, whose state is donated."""
  rows, _ = losses(learner_of(Distill(teacher=Given(model()), weight=0.5, temperature=2.0)), 2)
  # Differences of equal logarithms: a few times 2**-24.
  assert abs(rows[0]['teacher_kl']) < 1e-6 and rows[1]['teacher_kl'] > 1e-6
  assert rows[0]['loss'] == pytest.approx(rows[0]['cross_entropy'] / 2, rel=1e-5)


def test_the_loss_is_the_mix_that_was_asked_for():
  row = losses(learner_of(Distill(teacher=Given(model(TEACHER_SEED)), weight=0.25, temperature=3.0)), 1)[0][0]
  assert row['loss'] == pytest.approx(0.75 * row['cross_entropy'] + 0.25 * 9 * row['teacher_kl'], rel=1e-5)


def test_weight_0_trains_as_if_there_were_no_teacher_bit_for_bit():
  rows, state = losses(learner_of(Distill(teacher=Given(model(TEACHER_SEED)), weight=0.0)), 4)
  assert rows == plain()[0]
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(plain()[1]), strict=True): np.testing.assert_array_equal(a, b)


def test_the_teacher_is_no_part_of_what_is_saved():
  assert jax.tree.structure(taught()[1]) == jax.tree.structure(plain()[1])
  learner = learner_of(Distill(teacher=Given(model(TEACHER_SEED))))
  assert isinstance(learner.loss.inner, NextToken) and learner.loss.teacher is model(TEACHER_SEED)


def test_teachers_of_several_minds_add_up():
  """Distilling twice keeps the first teacher inside the second loss."""
  learner = learner_of(Distill(teacher=Given(model(1)), weight=0.5), Distill(teacher=Given(model(2)), weight=0.5))
  assert learner.loss.teacher is model(2) and learner.loss.inner.teacher is model(1)


def test_a_teacher_whose_logits_are_capped_is_refused_unless_it_weighs_nothing():
  teacher = jax.tree.map(lambda leaf: leaf, model())
  teacher.softcap = 5.
  with pytest.raises(ValueError, match='the teacher has a soft cap on its logits'):
    learner_of(Distill(teacher=Given(teacher)))
  learner_of(Distill(teacher=Given(teacher), weight=0.))


def test_a_teacher_of_another_vocabulary_is_refused():
  with pytest.raises(ValueError, match='vocabulary of 17, student with 16'):
    learner_of(Distill(teacher=Given(model(vocab_size=17))))


@pytest.mark.parametrize('field, value', [('weight', 1.5), ('weight', -0.1), ('temperature', 0.0)])
def test_a_wrong_field_is_named(field, value):
  assert [name for name, _, _ in Distill(teacher=None, **{field: value}).check()] == [field]
