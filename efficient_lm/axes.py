"""One alphabet: the letter that ends a name is the letter of its einsum and the key of its sharding.

  B batch, T query tokens, S key tokens, D model, N query heads, K kv heads, G = N/K, H head dim, F hidden, V vocab,
  E experts, A experts per token, C capacity, M routed rows, L stacked layers, R rank, P rank of an adapter.

Matrices inside `ops` and `formats`, whichever dimensions of a model they are, have an alphabet of their own, in which a
product is y_MO = x_MI @ w_IO, or x_MI @ w_OI^T for a matrix that is stored with its outputs first:

  M rows, I inputs (contracted), O outputs, Q groups along the inputs that share a scale, J the numbers of one group.

A weight carries its letters (`axes='EDF'`); `parallel.sharding` turns them, by the tables below, into a `PartitionSpec`.
Letters name the last dimensions of an array: whatever stands in front of them is a stack of layers (L), which is never
split.

"axis" is an axis of the mesh, "dim" a dimension of an array.
"""
MESH = ('data', 'fsdp', 'expert', 'tensor')
BATCH = ('data', 'fsdp', 'expert')   # the mesh axes that split tokens: experts receive other devices' tokens by dispatch
WEIGHT = {'D': 'fsdp', 'R': 'fsdp', 'V': 'tensor', 'N': 'tensor', 'K': 'tensor', 'F': 'tensor', 'E': 'expert'}
ACTIVATION = {'B': BATCH, 'M': BATCH, 'V': 'tensor', 'N': 'tensor', 'K': 'tensor', 'F': 'tensor'}


def dims(axes: str, letters: str) -> tuple[int, ...]:
  """Positions of `letters` in an array whose last dimensions are `axes`, counted from the right (layers may precede)."""
  return tuple(axes.index(letter) - len(axes) for letter in letters)
