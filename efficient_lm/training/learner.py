"""Learner: what computes, what is minimised, how it moves. A technique maps a Learner to a Learner."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from efficient_lm.axes import shardings
from efficient_lm.errors import blaming
from efficient_lm.training.losses import NextToken
from efficient_lm.training.optimizers import descend_rated, guarded


@dataclasses.dataclass(frozen=True)
class Learner:
  """model: a pytree of layers; loss: (outputs, batch) -> (scalar, metrics); optimizer: an optax transformation; notes:
  what each technique has to say of its reach, printed at start-up."""
  model: Any
  loss: Any
  optimizer: optax.GradientTransformation
  notes: tuple[str, ...] = ()
  replace = dataclasses.replace


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a checkpoint holds: the step reached (int32), the model, the optimizer's state."""
  step: jax.Array
  model: Any
  opt_state: Any
  replace = dataclasses.replace


def new_model(spec, key, mesh=None):
  """A freshly drawn model, made where it will live: no device ever holds more than its shards."""
  build = lambda key: spec.build(rngs=nnx.Rngs(params=key))
  if mesh is None: return jax.jit(build)(key)
  with jax.set_mesh(mesh):
    return jax.jit(build, out_shardings=shardings(jax.eval_shape(build, key), mesh))(key)


def assemble(model, optimizer, techniques, key) -> Learner:
  """The plain learner with each technique applied in turn; `optimizer` is a config's, already built. Raises ConfigError for
  a technique that the model does not suit."""
  learner = Learner(model, NextToken(), descend_rated(optimizer))
  for i, technique in enumerate(techniques):
    with blaming(f'config.techniques[{i}]', technique): learner = technique(learner, jax.random.fold_in(key, i))
  # The guard goes around all that a technique may have wrapped: a refused step changes nothing.
  return learner.replace(optimizer=guarded(learner.optimizer))


def initial_state(learner: Learner, mesh=None) -> TrainState:
  """Step 0. The model's buffers are copied: the training step donates its state and the learner may be used again."""
  def make(model):
    return TrainState(jnp.zeros((), jnp.int32), model, learner.optimizer.init(nnx.state(model, nnx.Param)))
  if mesh is None: return jax.jit(make)(learner.model)
  abstract = jax.eval_shape(make, learner.model)
  with jax.set_mesh(mesh):
    return jax.jit(make, out_shardings=shardings(abstract, mesh))(learner.model)
