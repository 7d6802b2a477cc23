"""Fills a model with the tensors of a checkpoint: array by array, and of each array shard by shard.

A host makes only the shards of its own devices, one array at a time, from views of the mapped files: beside the model it
needs memory for one array. Arrays stay in the dtype that they are stored in (bfloat16, float16 or float32), except that what
is computed on the way, 1 + w, is kept in float32, and that tensors of different dtypes in one array meet in the wider one.
"""
import dataclasses
import math
from collections.abc import Container, Mapping, Sequence

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from efficient_lm.errors import CheckpointError
from efficient_lm.interop import families
from efficient_lm.interop.checkpoint import Checkpoint, Tensor
from efficient_lm.interop.families.keys import Keys
from efficient_lm.interop.families.places import Place
from efficient_lm.parallel.sharding import axes_of, placed, single_device_mesh
from efficient_lm.tree import is_variable, path_name

STORED = tuple(map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.float16)))
HEAD = 'lm_head.weight'
SHOWN = 5    # names in a message
STRIP = 16   # numbers
ALIGNMENT = 64   # bytes


def abstract(spec, checkpoint: Checkpoint, dtype: str | None = None):
  """The shapes of the model, in the dtypes that its arrays will have: those of the files, or `dtype` for all. Raises
  CheckpointError for tensors that are missing, unexpected, or of another shape."""
  places, tensors = _matched(spec, checkpoint)
  shapes = jax.eval_shape(lambda key: spec.build(rngs=nnx.Rngs(params=key)), jax.random.key(0))
  variables = dict(_variables(shapes))
  if set(variables) != set(places):   # a family that does not know its own model
    raise RuntimeError(f'places and model differ: {sorted(set(variables) ^ set(places))[:SHOWN]}')
  _check_shapes(variables, places, tensors, checkpoint.where)

  def typed(path, node):
    if not is_variable(node): return node
    wanted = np.dtype(dtype) if dtype else _dtype(places[path_name(path)], tensors)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, wanted), node)
  return jax.tree_util.tree_map_with_path(typed, shapes, is_leaf=is_variable)


def load(spec, checkpoint: Checkpoint, mesh=None, dtype: str | None = None, leave: Container[str] = ()):
  """The model on `mesh` (default: one device), its arrays as `abstract` says. Those whose paths are in `leave` stay shapes.
  Raises CheckpointError."""
  mesh = mesh or single_device_mesh()
  places, tensors = _matched(spec, checkpoint)
  _check_tied(spec, checkpoint.where, places, tensors)

  def filled(path, node):
    if not is_variable(node) or path_name(path) in leave: return node
    source = Source(places[path_name(path)], axes_of(node), tensors)
    return jax.tree.map(source.array, node)
  with jax.set_mesh(mesh):   # whatever mesh the caller is in
    return jax.tree_util.tree_map_with_path(filled, placed(abstract(spec, checkpoint, dtype), mesh), is_leaf=is_variable)


@dataclasses.dataclass(frozen=True)
class Source:
  """What one array of the model is made of; `axes`: its letters, behind those of layers."""
  place: Place
  axes: str
  tensors: Mapping[str, Tensor]

  def array(self, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """The array, each device's shard made by the host that has the device."""
    made = {}   # replicas of a shard are made once

    def shard(index):
      key = tuple((part.start, part.stop) for part in index)
      if key not in made: made[key] = self.read(wanted.shape, index, wanted.dtype)
      return made[key]
    return jax.make_array_from_callback(wanted.shape, wanted.sharding, shard)

  def read(self, shape: tuple[int, ...], index: tuple[slice, ...], dtype) -> np.ndarray:
    """The part `index` of the array, in memory of its own: never the file's, which cannot be written."""
    ranges = [range(*part.indices(size)) for part, size in zip(index, shape)]
    lead, n = self.place.lead, len(self.place.lead)
    out = aligned([len(one) for one in ranges], dtype)
    for at in np.ndindex(*out.shape[:n]):
      number = np.ravel_multi_index([ranges[d][i] for d, i in enumerate(at)], lead) if n else 0
      tensor = self.tensors[self.place.names[number]]
      _copy(self._view(tensor, shape[n:])[tuple(index[n:])], out[at], self.place.part.plus)
      tensor.release()
    return out

  def _view(self, tensor: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor, seen in the letters of the model; nothing is copied."""
    part, letters = self.place.part, self.axes[len(self.axes) - len(shape):]
    sizes = dict(zip(letters, shape))
    view = tensor.read().reshape(part.sizes(sizes))
    if part.cut:
      letter, first, _ = part.cut
      view = view[(slice(None),) * part.letters.index(letter) + (slice(first, first + sizes[letter]),)]
    return view.transpose([part.letters.index(letter) for letter in letters])


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """An array that begins where JAX wants one to begin, which on a CPU it then takes as it is, in place of a copy."""
  size = math.prod(shape) * dtype.itemsize
  whole = np.empty(size + ALIGNMENT, np.uint8)
  start = -whole.ctypes.data % ALIGNMENT
  return whole[start:start + size].view(dtype).reshape(shape)


def _copy(view: np.ndarray, out: np.ndarray, plus: float):
  """out = view + plus. Where the file has another order, by strips of few of its rows: a matrix of 8192 x 4096 in bfloat16
  took a fifth of the time of one assignment, half of that in square blocks."""
  if plus: view = view.astype(np.float32) + np.float32(plus)
  elif view.dtype == out.dtype:   # bits; numpy copies its own numbers faster than those of ml_dtypes
    bits = np.dtype(f'u{view.dtype.itemsize}')
    view, out = view.view(bits), out.view(bits)
  if view.ndim < 2 or view.strides[-1] == view.itemsize:
    out[...] = view
    return
  for j in range(0, view.shape[-1], STRIP): out[..., j:j + STRIP] = view[..., j:j + STRIP]


# ------------------------------------------------------------------ what is checked before

def _matched(spec, checkpoint: Checkpoint) -> tuple[dict[str, Place], Mapping[str, Tensor]]:
  """Places, and the tensors by the names that these use. Raises CheckpointError."""
  family, where = families.family_of(checkpoint.config), checkpoint.where
  layers = sum(stack.num_layers for stack in spec.stacks)
  if layers > len(checkpoint.tensors):
    raise CheckpointError(f'{where} has {len(checkpoint.tensors)} tensors, too few for {layers} layers')
  places, tensors = families.places(spec, checkpoint.config), checkpoint.tensors
  if not any(name.startswith(family.prefix) for name in tensors):
    tensors = {name if name == HEAD else family.prefix + name: tensor for name, tensor in tensors.items()}
  expected = {name for place in places.values() for name in place.names}
  _refuse(where, 'is without', [name for place in places.values() for name in place.names if name not in tensors])
  ignored = family.ignored(Keys(checkpoint.config, where))
  more = [name for name in tensors if name not in expected and not name.startswith(ignored or '\0')
          and not name.endswith(family.buffers) and not (spec.tied and name == HEAD)]
  _refuse(where, 'holds what its config.json has no place for:', more)
  of_dtype = [f'{name} is {tensors[name].dtype}' for name in sorted(expected) if tensors[name].dtype not in STORED]
  _refuse(where, 'holds numbers that are not float32, bfloat16 or float16:', of_dtype)
  return places, tensors


def _check_shapes(variables, places, tensors, where: str):
  wrong = []
  for path, variable in variables.items():
    place, shape = places[path], variable.get_value().shape
    axes, n = axes_of(variable), len(place.lead)
    letters = axes[len(axes) - len(shape[n:]):]
    needed = place.part.shape(dict(zip(letters, shape[n:])))
    wrong += [f'{name} is {tensors[name].shape} and should be {needed}' for name in place.names
              if tensors[name].shape != needed]
  _refuse(where, 'has other shapes than its config.json says:', list(dict.fromkeys(wrong)))


def _check_tied(spec, where: str, places, tensors):
  """A tied model may be stored with its head: then it must be the embedding."""
  if not spec.tied or HEAD not in tensors: return
  head, embed = tensors[HEAD].read(), tensors[places['embed/array'].names[0]].read()
  blocks = range(0, len(embed), 1024)   # rows: a comparison of all would take their memory once more
  same = head.shape == embed.shape and head.dtype == embed.dtype and all(
    head[i:i + 1024].tobytes() == embed[i:i + 1024].tobytes() for i in blocks)
  if not same:
    raise CheckpointError(f'{where}: {HEAD} is not the embedding, though tie_word_embeddings says so: set that to false in '
                          f'config.json if the head is to be used')


def _dtype(place: Place, tensors) -> np.dtype:
  stored = {tensors[name].dtype for name in place.names}
  return np.dtype(np.float32) if place.part.plus or len(stored) > 1 else stored.pop()


def _variables(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable)
  return ((path_name(path), node) for path, node in leaves if is_variable(node))


def _refuse(where: str, what: str, names: list[str]):
  if not names: return
  more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
  raise CheckpointError(f'{where} {what} {", ".join(names[:SHOWN])}{more}')
