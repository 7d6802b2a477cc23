"""Learner: what computes, what is minimised, how it moves. A technique maps a Learner to a Learner."""
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from efficient_lm.errors import in_field, in_part
from efficient_lm.parallel.sharding import shardings
from efficient_lm.training.losses import NextToken
from efficient_lm.training.transforms import descend_rated, guarded
from efficient_lm.tree import rewrite, select, size
from efficient_lm.weights.biased import unbiased
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.weight import Weight


@dataclasses.dataclass(frozen=True)
class Learner:
  """model: a pytree of layers; loss: (outputs, batch) -> (scalar, metrics); optimizer: an optax transformation; notes:
  what each technique has to say of its reach, printed at start-up; steps: how many the training takes."""
  model: Any
  loss: Any
  optimizer: optax.GradientTransformation
  notes: tuple[str, ...] = ()
  steps: int = 0
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


def assemble(model, optimizer, techniques, key, steps: int = 0, field: str = 'config.techniques') -> Learner:
  """The plain learner with each technique applied in turn; `optimizer` is a config's, already built. Raises ConfigError for
  a technique that the model does not suit, which stands in the list `field` of the config.

  A model of shapes (`jax.ShapeDtypeStruct`), to resume from a checkpoint, becomes a learner with a model of shapes.
  """
  learner = Learner(model, NextToken(), descend_rated(optimizer), steps=steps)
  for i, technique in enumerate(techniques):
    with in_field(f'{field}[{i}]', technique): learner = _applied(technique, learner, jax.random.fold_in(key, i))
  # The guard goes around all that a technique may have wrapped: a refused step changes nothing.
  return learner.replace(optimizer=guarded(learner.optimizer), notes=(*learner.notes, *_frozen(learner.model)))


def _applied(technique, learner: Learner, key) -> Learner:
  """technique(learner, key); of a model of shapes, what touches the model is traced. What touches the loss is not: it may
  load a teacher."""
  shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(learner.model))
  if not shapes or technique.touches == 'loss': return technique(learner, key)
  made = []

  def rewritten(model):
    made.append(technique(learner.replace(model=model), key))
    return made[0].model

  model = jax.eval_shape(rewritten, learner.model)
  return made[0].replace(model=model)


def finished(model, opt_state, techniques):
  """What training leaves of a model: each technique's `finish(model, opt_state)`, where it has one, in their order; masks
  hold in the stored arrays, too."""
  for technique in techniques:
    if hasattr(technique, 'finish'): model = technique.finish(model, opt_state)
  if not dict(select(model, Masked)): return model
  return rewrite(model, Masked, lambda _, weight: weight.cleaned())


def _frozen(model) -> Iterator[str]:
  """What a training cannot change, as the codes of weights that are stored in few bits."""
  frozen = {path: weight for path, weight in select(model, Weight)
            if not jax.tree.leaves(nnx.state(unbiased(weight), nnx.Param))}
  if not frozen: return
  count = sum(math.prod(weight.shape) for weight in frozen.values())
  total = count + size(nnx.state(model, nnx.Param))
  yield f'{len(frozen)} weights are stored and not trained, {count / total:.1%} of parameters: {", ".join(frozen)}'


def _rewritten(model, training, techniques) -> Learner:
  """The learner of a model of shapes, under `jax.eval_shape`. Techniques of the loss leave no trace in the model."""
  learner = Learner(model, None, descend_rated(training.optimizer.build(training.steps)), steps=training.steps)
  for i, technique in enumerate(techniques):
    # Their keys differ from those of the training itself; shapes do not depend on them.
    with in_part(f'techniques[{i}]', technique):
      if technique.touches != 'loss': learner = technique(learner, jax.random.key(0))
  return learner


def trained_shapes(model, training, techniques):
  """The model as a training has it while it goes, under `jax.eval_shape`."""
  return _rewritten(model, training, techniques).model


def abstract_result(model, training, techniques):
  """The model that a training leaves, under `jax.eval_shape`."""
  learner = _rewritten(model, training, techniques)
  return finished(learner.model, learner.optimizer.init(nnx.state(learner.model, nnx.Param)), techniques)


def starting_state(learner: Learner) -> TrainState:
  """Step 0. Under `jax.eval_shape`, its shapes."""
  return TrainState(jnp.zeros((), jnp.int32), learner.model, learner.optimizer.init(nnx.state(learner.model, nnx.Param)))


def initial_state(learner: Learner, mesh=None, donate: bool = False) -> TrainState:
  """Step 0. The model's buffers are copied, since the training step donates its state and the learner may be used again,
  unless they may be taken over (`donate`)."""
  make, donated = lambda model: starting_state(learner.replace(model=model)), 0 if donate else ()
  if mesh is None: return jax.jit(make, donate_argnums=donated)(learner.model)
  abstract = jax.eval_shape(make, learner.model)
  with jax.set_mesh(mesh):
    return jax.jit(make, out_shardings=shardings(abstract, mesh), donate_argnums=donated)(learner.model)
