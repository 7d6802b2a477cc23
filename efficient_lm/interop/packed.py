"""Loads a model whose matrices stay in the few bits that a file stores them in, as `Quantized` weights.

A matrix is kept where all tensors that it is made of (its layers, its experts) are in one format that says what the file
says; the others are loaded as `load` does. A host holds one kept weight at a time beside the model, all its layers.
"""
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from efficient_lm.formats import Encoded
from efficient_lm.formats.format import Scales
from efficient_lm.interop import families
from efficient_lm.interop import load as floats
from efficient_lm.interop.checkpoint import Checkpoint, Tensor
from efficient_lm.parallel.sharding import shardings, single_device_mesh
from efficient_lm.tree import rewrite, select
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.weight import Dense

ROWS = 2048   # of a matrix that are unpacked at once


class Kept(NamedTuple):
  """parts: the tensors of a weight, in the order of `lead` (layers, experts)."""
  lead: tuple[int, ...]
  parts: tuple[Tensor, ...]
  layout: Layout

  @property
  def format(self) -> Any: return self.parts[0].packed.format

  def shapes(self) -> Encoded:
    """Of all layers and experts."""
    rows, one = self.parts[0].shape[0], self.parts[0].packed.fetch(slice(0, 1))
    whole = lambda row, *shape: None if row is None else jax.ShapeDtypeStruct((*self.lead, *shape), row.dtype)
    scales = (whole(row, len(one.scales.scale), rows) for row in (one.scales.scale, one.scales.zero))
    return Encoded(whole(one.values, rows, one.values.shape[1]), Scales(*scales))

  def encoded(self) -> Encoded:
    """Of all layers and experts, in numpy."""
    made = jax.tree.map(lambda leaf: floats.aligned(leaf.shape, leaf.dtype), self.shapes())
    for at, tensor in zip(np.ndindex(*self.lead), self.parts, strict=True):
      for start in range(0, tensor.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        part = tensor.packed.fetch(rows)
        made.values[at][rows] = part.values
        made.scales.scale[at][:, rows] = part.scales.scale
        if part.scales.zero is not None: made.scales.zero[at][:, rows] = part.scales.zero
      tensor.release()
    return made


def abstract(spec, checkpoint: Checkpoint, dtype: str | None = None):
  """The shapes of the model, as `load.abstract`, some of its weights `Quantized`."""
  model = floats.abstract(spec, checkpoint, dtype)
  kept = _kept(model, spec, checkpoint)

  def change(path: str, weight: Dense):
    if path not in kept: return weight
    return jax.eval_shape(lambda encoded: _quantized(kept[path], encoded), kept[path].shapes())
  return rewrite(model, Dense, change)


def load(spec, checkpoint: Checkpoint, mesh=None, dtype: str | None = None):
  """The model on `mesh` (default: one device). Raises CheckpointError, as `load.load`."""
  mesh = mesh or single_device_mesh()
  kept = _kept(floats.abstract(spec, checkpoint, dtype), spec, checkpoint)
  model = floats.load(spec, checkpoint, mesh, dtype, leave={f'{path}/array' for path in kept})

  def change(path: str, weight: Dense):
    if path not in kept: return weight
    made = _quantized(kept[path], kept[path].encoded())
    return jax.tree.map(_put, made, shardings(made, mesh))
  with jax.set_mesh(mesh): return rewrite(model, Dense, change)


def _quantized(kept: Kept, encoded: Encoded) -> Quantized:
  return Quantized(encoded, kept.format, kept.layout)


def _put(array, sharding: NamedSharding) -> jax.Array:
  array = np.asarray(array)
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _kept(model, spec, checkpoint: Checkpoint) -> dict[str, Kept]:
  """By the paths of weights."""
  places, tensors = families.places(spec, checkpoint.config), checkpoint.tensors
  found = {}
  for path, weight in select(model, Dense):
    place, layout = places[f'{path}/array'], Layout.of(weight)
    parts = tuple(tensors[name] for name in place.names)
    same = all(part.packed for part in parts) and len({part.packed.format for part in parts}) == 1
    rows = place.part.layout == f'{layout.outputs} {layout.inputs}' and not place.part.cut and not place.part.plus
    if same and rows: found[path] = Kept(place.lead, parts, layout)
  return found
