"""How arrays lie on a mesh: shardings from the letters of `efficient_lm.axes`, and functions that run on each device's
shards."""
import math

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from efficient_lm.axes import ACTIVATION, BATCH, MESH, WEIGHT
from efficient_lm.tree import is_variable


def weight_spec(axes: str, shape: tuple[int, ...], mesh) -> PartitionSpec:
  """How a weight lies on the mesh. Vectors are replicated. `E` splits only weights that are stacked by expert (a
  router's `DE` is small and every device routes its own tokens to all experts). A dimension that the mesh axis does not
  divide stays whole (fewer kv heads than tensor shards, say), and of two letters with one mesh axis the first has it."""
  entries = [None] * len(shape)
  for i, letter in enumerate(axes):
    name, at = WEIGHT.get(letter), len(shape) - len(axes) + i
    if len(axes) < 2 or name is None or name in entries or (letter == 'E' and i > 0): continue
    if shape[at] % mesh.shape[name] == 0: entries[at] = name
  return PartitionSpec(*entries)


def axes_of(node) -> str:
  """The letters of a Variable; none of what is not one, or carries none."""
  return node.get_metadata().get('axes', '') if is_variable(node) else ''


def shardings(tree, mesh):
  """A tree of `NamedSharding` like `tree`, read off each Variable's axes; what carries none is replicated."""
  def sharding(node):
    if not is_variable(node): return NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: NamedSharding(mesh, weight_spec(axes_of(node), leaf.shape, mesh)), node)
  return jax.tree.map(sharding, tree, is_leaf=is_variable)


def placed(abstract, mesh):
  """The same shapes (`jax.ShapeDtypeStruct`) with the sharding that each will have on `mesh`."""
  add = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  return jax.tree.map(add, abstract, shardings(abstract, mesh))


def activation_spec(axes: str) -> PartitionSpec:
  """How an activation with these letters lies on the mesh."""
  return PartitionSpec(*[ACTIVATION.get(letter) for letter in axes])


def splitting_mesh():
  """The mesh in force (`jax.set_mesh`) if it has our axes and arrays are cut over it by the compiler, else None: without a
  mesh, and inside `shard_map`."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.manual_axes or set(MESH) - set(mesh.axis_names) else mesh


def mesh_in_force():
  """The mesh of devices that `jax.set_mesh` has put in force, or None."""
  mesh = jax.sharding.get_mesh()
  return None if mesh.empty else mesh


def constrain(x, axes: str):
  """Pins an activation to its place on the mesh in force; without a mesh, or inside `shard_map`, x."""
  return x if splitting_mesh() is None else lax.with_sharding_constraint(x, activation_spec(axes))


def by_shard(function, arguments: tuple[str, ...], results):
  """`function` as run by each device on its own shards of the arguments, laid out as activations with these letters.

  For what is independent along all that the mesh splits, or sums over 'tensor' itself. Kernels need it: the compiler can cut
  an array, not a kernel. `results` is a tree of letters. Without a mesh of several devices, and where a dimension does not
  divide, the function itself, and the compiler cuts what it does.
  """
  def run(*arrays):
    mesh, specs = splitting_mesh(), tuple(map(activation_spec, arguments))
    if mesh is None or mesh.size == 1: return function(*arrays)
    if not all(_divides(mesh, *pair) for pair in zip(arrays, specs)): return function(*arrays)
    # vma checking would need every kernel to declare what it varies over.
    mapped = jax.shard_map(function, in_specs=specs, out_specs=jax.tree.map(activation_spec, results), check_vma=False)
    return mapped(*arrays)
  return run


def _divides(mesh, array, spec) -> bool:
  """Whether the mesh cuts the array into equal shards."""
  parts = [(names,) if isinstance(names, str) else names or () for names in spec]
  return all(size % math.prod(mesh.shape[name] for name in names) == 0 for size, names in zip(array.shape, parts))


def part_here(mesh, process: int | None = None) -> tuple[int, int]:
  """(i, n): the devices of this process (or of that number) read part i of n equal parts of each batch. Where they read
  other rows than such a part, as on a torus that the mesh winds through, (0, 1): the whole batch is to be read here.

  Processes that lie along 'tensor' read the same part.
  """
  process = jax.process_index() if process is None else process
  shards = math.prod(mesh.shape[name] for name in BATCH)
  order = [mesh.axis_names.index(name) for name in (*BATCH, *(set(mesh.axis_names) - set(BATCH)))]
  by_shard = mesh.devices.transpose(order).reshape(shards, -1)
  mine = [i for i, devices in enumerate(by_shard) if any(device.process_index == process for device in devices)]
  size = len(mine)
  is_part = size and shards % size == 0 and mine[0] % size == 0 and mine == list(range(mine[0], mine[0] + size))
  return (mine[0] // size, shards // size) if is_part else (0, 1)


def place(batch: dict, mesh) -> dict[str, jax.Array]:
  """Puts this process's rows of a batch, which are those that `part_here` says, on the mesh, split over its batch axes."""
  sharding, (part, parts) = NamedSharding(mesh, PartitionSpec(BATCH)), part_here(mesh)

  def put(array):
    first, shape = part * len(array), (parts * len(array), *array.shape[1:])
    def rows(index):
      start, stop, _ = index[0].indices(shape[0])
      return array[start - first:stop - first]
    return jax.make_array_from_callback(shape, sharding, rows)
  return {name: put(array) for name, array in batch.items()}


def single_device_mesh():
  """All of a model on the first device."""
  types = (jax.sharding.AxisType.Auto,) * len(MESH)
  return jax.make_mesh((1,) * len(MESH), MESH, devices=jax.devices()[:1], axis_types=types)


def wait_on_cpu(tree):
  """Waits for `tree` where several CPU devices share the threads of one machine, and returns it.

  Programs in flight there starve one another's collectives of threads until XLA aborts the process. Real accelerators
  queue programs by themselves, and are not waited for.
  """
  if jax.default_backend() == 'cpu' and jax.device_count() > 1: jax.block_until_ready(tree)
  return tree
