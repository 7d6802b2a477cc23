"""The structure of a model as data: its modules, their settings, and the shape, dtype and letters of every array.

A stage stores it beside the arrays that it leaves, so that a model is known, shapes that depend on data included, without
running what made it. Classes are named by their own short names, never by modules; nothing is executed that a file names.
"""
import dataclasses
import functools
import importlib
import pkgutil
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm import models, weights
from efficient_lm.config import fields, names
from efficient_lm.errors import CheckpointError
from efficient_lm.tree import is_variable
from efficient_lm.weights.invariants import Pattern
from efficient_lm.weights.layout import Layout

STATIC = {cls.__name__: cls for cls in (Layout, Pattern)}   # dataclasses of weights that no config holds
PLAIN = (bool, int, float, str, type(None))
ROOMS = (models, weights)   # where classes of trees are defined


def described(node) -> Any:
  """JSON of a model, or a part of one: of arrays as of shapes."""
  if is_variable(node):
    leaf, = jax.tree.leaves(node)
    kept = {name: value for name, value in node.get_metadata().items() if name in ('axes', 'inputs', 'rate')}
    return {'variable': _name(type(node)), 'shape': list(leaf.shape), 'dtype': str(leaf.dtype), **kept}
  if isinstance(node, nnx.List): return {'list': [described(one) for one in node]}
  if isinstance(node, nnx.Module):
    attributes = {name: value for name, value in vars(node).items() if not name.startswith('_pytree__')}
    return {'module': _name(type(node)), **{name: described(value) for name, value in sorted(attributes.items())}}
  if isinstance(node, tuple): return {'tuple': [described(one) for one in node]}
  if isinstance(node, PLAIN): return fields.to_json(node)
  if type(node).__name__ in STATIC:
    settings = {field.name: described(getattr(node, field.name)) for field in dataclasses.fields(node)}
    return {'static': type(node).__name__, **settings}
  if fields.is_config(node): return {'config': fields.to_json(node)}
  raise TypeError(f'a model that holds a {type(node).__name__} cannot be described: use Modules, Variables and dataclasses')


def rebuilt(data) -> Any:
  """The inverse, with `jax.ShapeDtypeStruct` for arrays. Raises CheckpointError for a class that is not at hand."""
  if not isinstance(data, dict): return data
  kind = next((kind for kind in ('variable', 'list', 'module', 'tuple', 'static', 'config', 'float') if kind in data), None)
  rest = {name: value for name, value in data.items() if name != kind}
  if kind == 'variable':
    shape = jax.ShapeDtypeStruct(tuple(rest.pop('shape')), jnp.dtype(rest.pop('dtype')))
    return _class(nnx.Variable, data[kind])(shape, **rest)
  if kind == 'list': return nnx.List([rebuilt(one) for one in data[kind]])
  if kind == 'tuple': return tuple(rebuilt(one) for one in data[kind])
  if kind == 'module':
    made = _maker(_class(nnx.Module, data[kind]))({name: rebuilt(value) for name, value in rest.items()})
    object.__setattr__(made, '__class__', _class(nnx.Module, data[kind]))   # past nnx, which would keep it as an attribute
    return made
  if kind == 'static': return STATIC[data[kind]](**{name: rebuilt(value) for name, value in rest.items()})
  if kind == 'config': return fields.from_json(data[kind])
  return fields.from_json(data)


def _name(cls: type) -> str:
  """A class's short name, with the file in front for those from outside this package."""
  return cls.__name__ if cls.__module__.startswith('flax.') else names.name_of(cls)


def _class(base: type, name: str) -> type:
  """The subclass of `base` stored by this name, among all that have been imported. Raises CheckpointError."""
  _import_all()
  pending = [base]
  while pending:
    cls = pending.pop()
    if not cls.__dict__.get('made_of_data') and _name(cls) == name: return cls
    pending += cls.__subclasses__()
  raise CheckpointError(f'the model has a {name}, whose class is not at hand: give --config=FILE.py, the file that has it')


@functools.cache
def _import_all():
  for room in ROOMS:
    for module in pkgutil.walk_packages(room.__path__, f'{room.__name__}.'): importlib.import_module(module.name)


@functools.cache
def _maker(cls: type):
  """A subclass of a module's class whose constructor takes the attributes; the object is given its own class afterwards."""
  def __init__(self, attributes):
    for name, value in attributes.items(): setattr(self, name, value)
  return type(cls)(cls.__name__, (cls,), {'__init__': __init__, 'made_of_data': True})
