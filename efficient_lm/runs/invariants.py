"""What a stage must keep of what earlier ones have made: read from the model before it, and held against the model after
it."""
import dataclasses

import jax.numpy as jnp

from efficient_lm.errors import IncompatibleError
from efficient_lm.tree import select
from efficient_lm.weights.weight import Weight


def read(model) -> dict[str, tuple]:
  """What is promised of each weight of a model (None: nothing), by path; of those of which something is. It outlives the
  model's arrays."""
  kept = lambda one: dataclasses.replace(one, keep=jnp.copy(one.keep)) if hasattr(one, 'keep') else one
  if model is None: return {}
  promised = {path: tuple(map(kept, weight.invariants())) for path, weight in select(model, Weight)}
  return {path: found for path, found in promised.items() if found}


def check(before: dict[str, tuple], model, stage) -> list[str]:
  """Notes on what the stage has given up. Raises IncompatibleError, with weight and stage, for what it has lost without
  saying so.

  A stage that moves weights to other paths says where, by `follow(before) -> after`; one that may lose something says what,
  by `gives_up`, names of kinds ('zeros')."""
  name, gives_up = getattr(stage, 'name', type(stage).__name__), getattr(stage, 'gives_up', ())
  expected = stage.follow(before) if hasattr(stage, 'follow') else before
  weights, given_up = dict(select(model, Weight)), {}
  for path, promised in expected.items():
    for one in promised:
      if path in weights and one.held_by(weights[path]): continue
      if one.kind not in gives_up:
        what = 'is no longer there, with' if path not in weights else 'has lost'
        raise IncompatibleError(f'{path} {what} its {one.kind} ({one}) in {name}: if that is meant, write '
                                f'GivingUp(stage={name}(…), lost=({one.kind!r},))')
      given_up.setdefault(one.kind, []).append(path)
  return [f'{name} has given up the {kind} of {len(paths)} weights, such as {paths[0]}' for kind, paths in given_up.items()]
