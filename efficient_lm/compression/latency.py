"""How long a model takes to read a text, beside the one that it was made from, on the devices at hand."""
import time

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.axes import BATCH
from efficient_lm.parallel.sharding import place

ROUNDS = 7


class Reading:
  """Of texts of `length` tokens, as many as the mesh cuts a batch into, logits for the last token of each."""

  def __init__(self, whole, length: int, mesh):
    rows = int(np.prod([mesh.shape[axis] for axis in BATCH]))
    same = lambda row: np.broadcast_to(np.asarray(row, np.int32), (rows, length))
    self._batch = place(dict(inputs_BT=same(0), positions_BT=same(np.arange(length)), segments_BT=same(1)), mesh)
    self._whole = self._program(whole)

  def _program(self, model):
    compiled = _read.lower(model, self._batch).compile()
    jax.block_until_ready(compiled(model, self._batch))   # the first call is of another kind
    def seconds():
      start = time.perf_counter()
      jax.block_until_ready(compiled(model, self._batch))
      return time.perf_counter() - start
    return seconds

  def share(self, model) -> float:
    """The model's seconds over those of the whole one: the least of some turns that both take. What else a machine does
    only adds to them."""
    own = self._program(model)
    turns = [(own(), self._whole()) for _ in range(ROUNDS)]
    return min(mine for mine, _ in turns) / min(whole for _, whole in turns)


@jax.jit
def _read(model, batch):
  outputs = model(batch['inputs_BT'], batch['positions_BT'], batch['segments_BT'])
  return outputs.head.contract('BTD,DV->BTV', outputs.hidden_BTD[:, -1:], jnp.float32)
