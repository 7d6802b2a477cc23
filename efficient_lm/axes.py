"""One alphabet: the letter that ends a name is the letter of its einsum and the key of its sharding.

  B batch, T query tokens, S key tokens, D model, N query heads, K kv heads, G = N/K, H head dim, F hidden, V vocab,
  E experts, A experts per token, C capacity, M routed rows, L stacked layers, R rank, Q quantization block.

A weight carries its letters (`axes='EDF'`); the tables below turn them into a `PartitionSpec`. Letters name the last
dimensions of an array: whatever stands in front of them is a stack of layers (L), which is never split.
"""
import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

MESH = ('data', 'fsdp', 'expert', 'tensor')
BATCH = ('data', 'fsdp', 'expert')   # the mesh axes that split tokens: experts receive other devices' tokens by dispatch
WEIGHT = {'D': 'fsdp', 'R': 'fsdp', 'V': 'tensor', 'N': 'tensor', 'K': 'tensor', 'F': 'tensor', 'E': 'expert'}
ACTIVATION = {'B': BATCH, 'M': BATCH, 'V': 'tensor', 'N': 'tensor', 'K': 'tensor', 'F': 'tensor'}


def dims(axes: str, letters: str) -> tuple[int, ...]:
  """Positions of `letters` in an array whose last dimensions are `axes`, counted from the right (layers may precede)."""
  return tuple(axes.index(letter) - len(axes) for letter in letters)


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


def is_variable(node) -> bool:
  """Whether a node of a tree is an `nnx.Variable`, told by its metadata."""
  return hasattr(node, 'get_metadata')


def shardings(tree, mesh):
  """A tree of `NamedSharding` like `tree`, read off each Variable's axes; what carries none is replicated."""
  def sharding(node):
    if not is_variable(node): return NamedSharding(mesh, PartitionSpec())
    axes = node.get_metadata().get('axes', '')
    return jax.tree.map(lambda leaf: NamedSharding(mesh, weight_spec(axes, leaf.shape, mesh)), node)
  return jax.tree.map(sharding, tree, is_leaf=is_variable)


def activation_spec(axes: str) -> PartitionSpec:
  """How an activation with these letters lies on the mesh."""
  return PartitionSpec(*[ACTIVATION.get(letter) for letter in axes])


def constrain(x, axes: str):
  """Pins an activation to its place on the mesh in force (`jax.set_mesh`); without a mesh, or inside `shard_map`, x."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes or set(MESH) - set(mesh.axis_names): return x
  return lax.with_sharding_constraint(x, activation_spec(axes))


def settle(tree):
  """Waits for `tree` where several CPU devices share the threads of one machine, and returns it.

  Programs in flight there starve one another's collectives of threads until XLA aborts the process. Real accelerators
  queue programs by themselves, and are not waited for.
  """
  if jax.default_backend() == 'cpu' and jax.device_count() > 1: jax.block_until_ready(tree)
  return tree


def max_over(x, axes: str, letters: str):
  """max over `letters`, dimensions kept; global also where `shard_map` has cut one of them into local shards."""
  local = x.max(dims(axes, letters), keepdims=True)
  manual = jax.sharding.get_abstract_mesh().manual_axes
  names = [WEIGHT[letter] for letter in letters if WEIGHT.get(letter) in manual and WEIGHT[letter] == 'tensor']
  return lax.pmax(local, tuple(names)) if names else local
