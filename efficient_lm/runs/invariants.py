"""What a stage must keep of what earlier ones have made: read from the model before it, and held against the model after
it."""
import dataclasses

import jax
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


def check(before: dict[str, tuple], model, stage, followed=None) -> list[str]:
  """Notes on what the stage has given up. Raises IncompatibleError, with weight and stage, for what it has lost without
  saying so.

  A stage that moves weights to other paths says where, by `follow(before) -> after`, or, where it knows that only once it
  has been performed, to its context (`followed`); one that may lose something says what, by `gives_up`, names of kinds
  ('zeros')."""
  name, gives_up = getattr(stage, 'name', type(stage).__name__), getattr(stage, 'gives_up', ())
  follow = followed or getattr(stage, 'follow', lambda before: before)
  weights, given_up = dict(select(model, Weight)), {}
  for path, promised in follow(before).items():
    for one in promised:
      if path in weights and one.held_by(weights[path]): continue
      if one.kind not in gives_up:
        what = 'is no longer there, with' if path not in weights else 'has lost'
        raise IncompatibleError(f'{path} {what} its {one.kind} ({one}) in {name}: {_fix(name, one.kind)}')
      given_up.setdefault(one.kind, []).append(path)
  return [f'{name} has given up the {kind} of {len(paths)} weights, such as {paths[0]}' for kind, paths in given_up.items()]


def check_shapes(before, after, stage):
  """Refuses, before anything is trained, a stage that is known to lose what it is given (`cannot_keep`, names of kinds), by
  the shapes of the models around it. Raises IncompatibleError."""
  lost = set(getattr(stage, 'cannot_keep', ())) - set(getattr(stage, 'gives_up', ()))
  if not lost: return
  promised, kept, name = _kinds(before), _kinds(after), getattr(stage, 'name', type(stage).__name__)
  for path, kinds in promised.items():
    for kind in sorted(kinds & lost - kept.get(path, set())):
      raise IncompatibleError(f'{path} would lose its {kind} in {name}: {_fix(name, kind)}')


def _kinds(model) -> dict[str, set[str]]:
  """Of what is promised of each weight, from shapes alone."""
  found = {}
  def look(model): found.update({path: {one.kind for one in weight.invariants()} for path, weight in select(model, Weight)})
  jax.eval_shape(look, model)
  return found


def _fix(name: str, kind: str) -> str: return f'if that is meant, write GivingUp(stage={name}(…), lost=({kind!r},))'
