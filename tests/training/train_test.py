"""Training as a config names it: what is refused by name, and what the stage says of its result before it runs."""
import dataclasses

import jax
import pytest
from flax import nnx

from efficient_lm.config.fields import to_json
from efficient_lm.errors import IncompatibleError
from efficient_lm.models import spec
from efficient_lm.training.learner import abstract_result
from efficient_lm.training.train import Train, Training

GOOD = dict(steps=10, batch_size=8, sequence_length=16)


def shapes():
  stack = spec.Stack(num_layers=1, attention=spec.GroupedQuery(num_heads=1, num_kv_heads=1, head_dim=4),
                     mlp=spec.SwiGLU(hidden=8))
  return jax.eval_shape(lambda: spec.Transformer(vocab_size=8, dim=4, stacks=(stack,)).build(rngs=nnx.Rngs(0)))


@dataclasses.dataclass
class Picky:
  """A technique that suits trainings of at least `least` steps, and widens nothing."""
  least: int
  touches = 'model'

  def check_training(self, training):
    if training.steps < self.least: yield 'least', self.least, f'must be at most the {training.steps} steps of the training'

  def __call__(self, learner, key):
    if learner.steps < self.least: raise IncompatibleError('too short')
    return learner.replace(notes=(*learner.notes, 'picky'))


@pytest.mark.parametrize('field, value', [
  ('steps', -1), ('batch_size', 0), ('sequence_length', 1), ('accumulate', 0), ('log_every', 0), ('eval_every', 0),
  ('checkpoint_every', 0), ('replay_every', -1), ('batch_size', 7.5)])
def test_a_wrong_field_is_named(field, value):
  assert (field, value) in [(name, found) for name, found, _ in Training(**GOOD | {field: value}).check()]


def test_what_came_later_is_stored_only_where_it_is_set():
  """So that runs of earlier versions keep their keys."""
  assert 'replay_every' not in to_json(Training(**GOOD)) and to_json(Training(**GOOD, replay_every=5))['replay_every'] == 5


def test_a_batch_divides_into_equal_parts():
  assert list(Training(**GOOD, accumulate=4).check()) == []
  assert [name for name, _, _ in Training(**GOOD, accumulate=3).check()] == ['batch_size']
  assert Training(**GOOD, accumulate=4).tokens_per_step == 8 * 16


def test_a_technique_that_does_not_suit_the_training_is_named_by_its_place():
  training = Training(**GOOD)
  assert list(Train(training=training, techniques=(Picky(10), object())).check()) == []
  problems = list(Train(training=training, techniques=(object(), Picky(11))).check())
  assert [(name, value) for name, value, _ in problems] == [('techniques[1].least', 11)]


def test_shapes_of_the_result_are_known_before_it_is_trained():
  stage = Train(training=Training(**GOOD), techniques=(Picky(10),))
  found = jax.eval_shape(stage.abstract, shapes())
  wanted = jax.eval_shape(lambda model: abstract_result(model, stage.training, stage.techniques), shapes())
  assert jax.tree.structure(found) == jax.tree.structure(wanted) == jax.tree.structure(shapes())
  with pytest.raises(IncompatibleError, match='too short'):
    jax.eval_shape(Train(training=Training(**GOOD), techniques=(Picky(11),)).abstract, shapes())
