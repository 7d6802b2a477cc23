"""A learner is put together in order, starts from copies, and lies on a mesh as its letters say."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_lm.formats import Int
from efficient_lm.models import spec
from efficient_lm.training.learner import TrainState, assemble, finished, initial_state, new_model
from efficient_lm.training.optimizers import AdamW
from efficient_lm.training.transforms import GuardState
from efficient_lm.tree import num_bytes, path_name, rewrite, size
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.quantized import round_to_nearest
from efficient_lm.weights.weight import Weight


def described():
  stack = spec.Stack(num_layers=1, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=2, head_dim=8),
                     mlp=spec.SwiGLU(hidden=16))
  return spec.Transformer(vocab_size=32, dim=16, stacks=(stack,))


@pytest.fixture(scope='module')
def model():
  return new_model(described(), jax.random.key(0))


@pytest.fixture(scope='module')
def learner(model):
  return assemble(model, AdamW().build(10), (), jax.random.key(0))


def assert_same_bits(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True): np.testing.assert_array_equal(x, y)


@dataclasses.dataclass
class Noting:
  """A technique that does nothing but write down that it was here, and with which key."""
  name: str

  def __call__(self, learner, key):
    return learner.replace(notes=(*learner.notes, (self.name, tuple(jax.random.key_data(key).tolist()))))


def test_a_model_is_a_function_of_its_key(model):
  assert_same_bits(new_model(described(), jax.random.key(0)), model)
  other = new_model(described(), jax.random.key(1))
  assert np.any(other.embed.materialize() != model.embed.materialize())


def test_no_two_matrices_of_a_model_are_drawn_alike(model):
  rows = [np.asarray(leaf).ravel()[:8] / np.std(leaf) for leaf in jax.tree.leaves(model) if np.std(leaf) > 0]
  assert len(rows) == 2 + 4 + 3
  assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(rows) for b in rows[:i])


def test_a_model_made_on_a_mesh_has_the_same_numbers_and_no_device_holds_it_all(model, mesh):
  with mesh(1, 4, 1, 2): made = new_model(described(), jax.random.key(0), jax.sharding.get_mesh())
  for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(model), strict=True):
    # The same random bits; their logarithms may be rounded otherwise in another program.
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  on_first = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(made))
  assert on_first < num_bytes(model) / 4


def test_techniques_are_applied_in_order_with_a_key_each(model):
  names = ['a', 'b', 'a']
  notes = assemble(model, AdamW().build(10), [Noting(name) for name in names], jax.random.key(0)).notes
  assert [name for name, _ in notes] == names
  assert len({key for _, key in notes}) == 3
  again = assemble(model, AdamW().build(10), [Noting(name) for name in names], jax.random.key(0)).notes
  assert notes == again


def test_what_a_training_cannot_change_is_said(model):
  stored = rewrite(model, Weight, lambda path, weight: round_to_nearest(weight, Int()), 'mlp/(up|down)$')
  note, = assemble(stored, AdamW().build(10), (), jax.random.key(0)).notes
  # 2 matrices of 16 x 16, of 2 x 32 x 16 for embedding and head, 4 + 3 layers' matrices of 16 x 16 and 3 norms of 16.
  assert note == (f'2 weights are stored and not trained, {512 / (1024 + 7 * 256 + 3 * 16):.1%} of parameters: '
                  'stacks/0/blocks/mlp/down, stacks/0/blocks/mlp/up')
  assert not assemble(model, AdamW().build(10), (), jax.random.key(0)).notes


def test_the_guard_is_outermost_and_the_state_starts_at_step_0(learner):
  state = jax.eval_shape(lambda: initial_state(learner))
  assert isinstance(state, TrainState) and isinstance(state.opt_state, GuardState)
  state = initial_state(learner)
  assert int(state.step) == 0 and int(state.opt_state.skipped) == 0
  assert_same_bits(state.model, learner.model)
  moments = optax.tree.get(state.opt_state, 'mu')
  assert size(moments) == size(nnx.state(learner.model, nnx.Param)) and not any(map(np.any, jax.tree.leaves(moments)))


def test_a_state_shares_no_buffer_with_its_learner(learner):
  """The step donates its state; a learner whose buffers went with it could not start a second run."""
  state = initial_state(learner)
  for leaf in jax.tree.leaves(state): leaf.delete()
  assert_same_bits(initial_state(learner).model, learner.model)


def test_a_model_that_may_be_taken_over_is_and_the_state_is_the_same(learner):
  given = jax.tree.map(jnp.copy, learner.model)
  state = initial_state(learner.replace(model=given), donate=True)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
  assert_same_bits(state, initial_state(learner))


@dataclasses.dataclass
class Scaling:
  """A technique that doubles the model and, at the end, scales it and says so."""
  by: float
  touches = 'model'

  def __call__(self, learner, key):
    return learner.replace(model=jax.tree.map(lambda leaf: 2 * leaf, learner.model), notes=(*learner.notes, self.by))

  def finish(self, model, opt_state):
    return jax.tree.map(lambda leaf: leaf + self.by, model)


class Teaching:
  """A technique of the loss, which no tracing may reach: it loads a teacher."""
  touches = 'loss'

  def __call__(self, learner, key):
    return learner.replace(loss=float(jnp.ones(())))


def test_shapes_are_assembled_as_arrays_are_and_what_touches_the_loss_is_not_traced(model):
  techniques = [Scaling(1.0), Teaching(), Scaling(2.0)]
  shapes = jax.eval_shape(lambda: model)
  found, wanted = (assemble(one, AdamW().build(10), techniques, jax.random.key(0)) for one in (shapes, model))
  assert found.notes == wanted.notes == (1.0, 2.0) and found.loss == wanted.loss == 1.0
  assert jax.tree.structure(found.model) == jax.tree.structure(wanted.model)
  assert [leaf.shape for leaf in jax.tree.leaves(found.model)] == [leaf.shape for leaf in jax.tree.leaves(wanted.model)]
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(found.model))
  np.testing.assert_array_equal(wanted.model.embed.materialize(), 4 * model.embed.materialize())


def test_techniques_finish_in_their_order_and_masks_hold_in_what_is_stored(model):
  kept = jnp.arange(32 * 16).reshape(32, 16) % 3 == 0
  masked = rewrite(model, Weight, lambda _, weight: Masked(weight, kept), where='^embed$')
  assert np.any(masked.embed.inner.materialize()[~kept])
  left = finished(masked, None, (Noting('no end'),))
  np.testing.assert_array_equal(left.embed.inner.materialize()[~kept], 0)
  np.testing.assert_array_equal(left.embed.materialize(), masked.embed.materialize())
  techniques = (Scaling(1.0), Noting('no end'), Scaling(2.0))
  np.testing.assert_allclose(finished(model, None, techniques).norm.scale.get_value(), model.norm.scale.get_value() + 3)


def test_a_state_on_a_mesh_splits_moments_as_it_splits_parameters(learner, mesh):
  with mesh(1, 4, 1, 2): state = initial_state(learner, jax.sharding.get_mesh())
  where = {path_name(path): leaf.sharding.spec for path, leaf in jax.tree_util.tree_leaves_with_path(
    nnx.state(state.model, nnx.Param))}
  assert any('fsdp' in spec and 'tensor' in spec for spec in where.values())
  for name in ('mu', 'nu'):
    moments = jax.tree_util.tree_leaves_with_path(optax.tree.get(state.opt_state, name))
    assert {path_name(path): leaf.sharding.spec for path, leaf in moments} == where
