"""Takes a model apart into the tensors of a checkpoint: the inverse of `load.py`, by the same places.

Tensors are made as they are asked for, one at a time: beside the model a writer needs memory for what it writes at once. A
weight that techniques have wrapped is written as what the model multiplies by; where its product does more than that, there
is nothing elsewhere that would do it, and the model is refused.
"""
import dataclasses
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.compression.rewriting import without_low_precision
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Affine
from efficient_lm.interop import families
from efficient_lm.interop.families import configs
from efficient_lm.interop.families.places import Part, Place
from efficient_lm.interop.written import Stored, Written
from efficient_lm.models import spec
from efficient_lm.models.described import alike, described, layers
from efficient_lm.models.mlp import SigmoidGated
from efficient_lm.ops import packing
from efficient_lm.parallel.sharding import axes_of
from efficient_lm.tree import rewrite, select
from efficient_lm.weights.biased import Biased
from efficient_lm.weights.block_sparse import BlockSparse
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.low_rank import LowRank
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.packed_masked import PackedMasked
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.rotated import Rotated
from efficient_lm.weights.weight import Dense, Weight

AS_FLOATS = (LowRank, PackedMasked, BlockSparse)   # written as the one matrix that they are multiplied as
KNOWN = (Dense, Biased, Masked, FakeQuantized, Rotated, Quantized)   # weights that are what they materialize as


def written(model, length: int = 2048, dtype: str | None = None) -> Written:
  """A model on its way out; `length`: tokens of a text that readers are told it is made for. Floats are written in `dtype`
  (None: as the model holds them, those of quantization in float32). Raises IncompatibleError, in a line that names the
  weight or the field, for a model that no family says."""
  model, notes = _plain(model)
  description, more = _without_capacity(described(model))
  config = configs.config_of(description, length, alike)
  meant = families.spec_of(config)
  apart = dataclasses.replace(meant, stacks=tuple(meant.layers))
  pieces: dict[str, list[Piece]] = {}
  for path, place in families.places(apart, config).items():
    found = _found(model, path)
    for name, expert in _names(place): pieces.setdefault(name, []).append(Piece(found, place.part, expert))
  return Written(config, _Tensors(pieces, dtype), (*notes, *more, *_joined_in_files(pieces)))


def _plain(model):
  """A model whose weights are as they are multiplied, and what is no longer said of it. Raises IncompatibleError."""
  model, notes = without_low_precision(model), []
  for kind in AS_FLOATS:
    if dict(select(model, kind)):
      model = rewrite(model, kind, lambda _, weight: Dense(weight.materialize(), weight.axes, weight.inputs))
  for path, weight in select(model, Weight):
    if (odd := _odd(weight)) is not None:
      raise IncompatibleError(f'{path}: a weight with {type(odd).__name__}, which computes more than a product, cannot be '
                              f'written for others')
  if dict(select(model, FakeQuantized)):
    model = rewrite(model, FakeQuantized, lambda _, weight: weight.converted())
  rotated = [path for path, weight in select(model, Weight) if _holds(weight, Rotated)]
  if rotated: notes.append(f'{len(rotated)} weights that read rotated inputs are written as floats, rotated back: no other '
                           f'engine rotates the inputs of {rotated[0]}.')
  return model, notes


def _joined_in_files(pieces: Mapping[str, list['Piece']]) -> Iterator[str]:
  """What has to be said of matrices in few bits that no tensor of the files is."""
  names = [name for name, parts in pieces.items() if any(one.in_few_bits and one.stored_as is None for one in parts)]
  if names:
    yield (f'{len(names)} matrices, such as {names[0]}, are written as floats: files of this family join what is in few '
           f'bits here with other matrices, or have its inputs first.')


def _odd(weight) -> Weight | None:
  """The first weight in a nest of them that is not known."""
  if not isinstance(weight, KNOWN): return weight
  return _odd(weight.inner) if hasattr(weight, 'inner') else None


def _holds(weight, kind: type) -> bool:
  return isinstance(weight, kind) or (hasattr(weight, 'inner') and _holds(weight.inner, kind))


def _without_capacity(description: spec.Transformer) -> tuple[spec.Transformer, tuple[str, ...]]:
  """Experts elsewhere have no capacity: they compute what generation here computes, which drops no token."""
  capped = [stack for stack in description.stacks if getattr(stack.mlp, 'capacity', None) is not None]
  if not capped: return description, ()
  free = lambda mlp: dataclasses.replace(mlp, capacity=None) if isinstance(mlp, spec.MoE) else mlp
  stacks = tuple(dataclasses.replace(stack, mlp=free(stack.mlp)) for stack in description.stacks)
  note = 'The capacity of experts is left out: no token is dropped elsewhere, as none is here where text is generated.'
  return dataclasses.replace(description, stacks=stacks), (note,)


def _names(place: Place) -> Iterator[tuple[str, int | None]]:
  """Names of one layer's tensors, each with the number of its expert."""
  by_expert = len(place.lead) == 2
  return ((name, e if by_expert else None) for e, name in enumerate(place.names))


def _found(model, path: str):
  """What a place names: a Weight, or a Variable of another kind, of one layer. `path` is that in a model of plain weights
  with a stack for each layer: a weight ends in 'array', one with a bias in 'inner/array', the bias itself in 'bias'."""
  words, number = path.split('/'), None
  if words[0] == 'stacks':
    node, number = layers(model)[int(words[1])]
    words = words[3:]
  else: node = model
  for word in words:
    if word == 'array': break
    if word != 'inner' or isinstance(node, (Biased, SigmoidGated)): node = getattr(node, word)
  return node if number is None else jax.tree.map(lambda a: a[number], node)


@dataclasses.dataclass(frozen=True)
class Piece:
  """A weight, or another array, that is a tensor of the file or a part of one. `expert`: which of the weight's it is."""
  found: Weight
  part: Part
  expert: int | None

  @property
  def axes(self) -> str:
    """Letters of its array."""
    axes = self.found.axes if isinstance(self.found, Weight) else axes_of(self.found)
    return axes[1:] if self.expert is not None else axes

  @property
  def sizes(self) -> dict[str, int]:
    shape = self.found.shape if isinstance(self.found, Weight) else self.found.get_value().shape
    return dict(zip(self.axes, shape[len(shape) - len(self.axes):]))

  def array(self) -> np.ndarray:
    """In the letters of the file, one dimension each, and what the file adds taken off."""
    array = self.found.materialize() if isinstance(self.found, Weight) else self.found.get_value()
    array = np.asarray(array if self.expert is None else array[self.expert])
    if self.part.plus: array = array.astype(np.float32) - np.float32(self.part.plus)
    return array.transpose([self.axes.index(letter) for letter in self.part.letters])

  @property
  def in_few_bits(self) -> bool:
    return _holds(self.found, Quantized) and not _holds(self.found, Rotated)

  @property
  def stored_as(self) -> Quantized | None:
    """The weight in few bits that is a whole matrix of the file, a row an output."""
    if not self.in_few_bits or self.part.cut: return None
    weight = self.found.inner if isinstance(self.found, Masked) else self.found
    outputs = ''.join(letter for letter in self.axes if letter not in weight.inputs)
    return weight if self.part.layout == f'{outputs} {weight.inputs}' else None

  def stored(self) -> Stored | None:
    """In few bits, where it is; a mask's zeros are no numbers of a grid that begins anywhere."""
    weight = self.stored_as
    keep = self.found.keep.get_value() if isinstance(self.found, Masked) else None
    if weight is None or (keep is not None and isinstance(weight.format, Affine)): return None
    return _stored(weight, keep, self.expert)


def _stored(weight: Quantized, keep, expert: int | None) -> Stored:
  format, encoded = weight.format, weight.encoded
  one = lambda x: x if expert is None or x is None else x[expert]
  numbers_OI = format.numbers(packing.unpack(one(encoded.values), format.bits))
  step, zero = format.steps(jax.tree.map(one, encoded.scales))
  rows = numbers_OI.shape[0] // step.shape[0]
  step_OQ, zero_OQ = (None if x is None else np.repeat(np.asarray(x, np.float32), rows, 0) for x in (step, zero))
  if keep is not None:
    keep_OI = one(weight.layout.matrix(keep))
    groups = numbers_OI.shape[1] // step_OQ.shape[1]
    numbers_OI = jnp.where(keep_OI, numbers_OI, 0 if zero_OQ is None else np.repeat(zero_OQ, groups, 1))
  numbers_OI = np.asarray(numbers_OI)
  whole = format.offset == 0 and jnp.issubdtype(encoded.values.dtype, jnp.integer)
  activations = None if weight.activations is None else weight.activations.format
  return Stored(numbers_OI.astype(np.int8) if whole else numbers_OI, step_OQ, zero_OQ, format, activations)


class _Tensors(Mapping):
  """Tensors by name, each made when it is asked for."""

  def __init__(self, pieces: Mapping[str, list[Piece]], dtype: str | None):
    self.pieces, self.dtype = pieces, dtype

  def __iter__(self): return iter(self.pieces)
  def __len__(self): return len(self.pieces)

  def __getitem__(self, name: str) -> np.ndarray | Stored:
    pieces = self.pieces[name]
    if len(pieces) == 1 and (stored := pieces[0].stored()) is not None: return stored
    array = _joined(pieces)
    return array if self.dtype is None else array.astype(jnp.dtype(self.dtype))


def _joined(pieces: list[Piece]) -> np.ndarray:
  """The tensor of which these are all parts; rows that none has are zero."""
  first = pieces[0]
  sizes = first.sizes
  shape = [math.prod(group) for group in _groups(first.part, first.part.sizes(sizes))]
  if first.part.cut is None: return first.array().reshape(shape)
  whole = None
  for piece in pieces:
    letter, begin, _ = piece.part.cut
    array = piece.array()
    if whole is None: whole = np.zeros(first.part.sizes(sizes), array.dtype)
    at = (slice(None),) * piece.part.letters.index(letter)
    whole[(*at, slice(begin, begin + piece.sizes[letter]))] = array
  return whole.reshape(shape)


def _groups(part: Part, sizes: list[int]) -> Iterator[list[int]]:
  sizes = iter(sizes)
  return ([next(sizes) for _ in group] for group in part.layout.split(' '))
