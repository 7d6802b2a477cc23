"""A batch, models of one layer, and checkpoints that are kept in memory, for tests of the trainer."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm.errors import CheckpointError
from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.tree import path_name

B, T, V, D, E = 8, 8, 32, 16, 4
BALANCE = (routing.LoadBalance(), routing.LossFreeBias(), routing.RouterZ())
MLPS = {
  'dense': spec.SwiGLU(hidden=16), 'experts': spec.MoE(num_experts=E, hidden=16, balance=BALANCE),
  # Terms that weigh as much as the task.
  'balanced': spec.MoE(num_experts=E, hidden=16, capacity=0.75, balance=(
    routing.LoadBalance(weight=1.0), routing.LossFreeBias(), routing.RouterZ(weight=0.3))),
  'without load': spec.MoE(num_experts=E, hidden=16, balance=BALANCE[1:]),
}


def batch_of(seed=0):
  """Random rows, each beginning with a token of its own, so that every target can be known."""
  tokens = np.random.default_rng(seed).integers(0, V, (B, T + 1)).astype(np.int32)
  tokens[:, 0] = np.arange(B)
  ones = np.ones((B, T), np.int32)
  return {'inputs_BT': tokens[:, :-1], 'targets_BT': tokens[:, 1:], 'weights_BT': ones.astype(np.float32),
          'bytes_BT': 2 * ones, 'segments_BT': ones, 'positions_BT': np.tile(np.arange(T, dtype=np.int32), (B, 1))}


@functools.cache
def model_of(kind, seed=0, num_layers=1):
  """A model with numbers drawn by numpy; norm scales one, biases zero, as they start."""
  stack = spec.Stack(num_layers=num_layers, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=2, head_dim=8),
                     mlp=MLPS[kind])
  described = spec.Transformer(vocab_size=V, dim=D, stacks=(stack,))
  rng = np.random.default_rng(seed)
  def number(path, leaf):
    if 'scale' in path_name(path): return jnp.ones(leaf.shape)
    return jnp.asarray(rng.normal(size=leaf.shape) * (0 if 'load_bias' in path_name(path) else 0.25), leaf.dtype)
  return jax.tree_util.tree_map_with_path(number, jax.eval_shape(lambda: described.build(rngs=nnx.Rngs(0))))


class Memory:
  """Checkpoints that are kept in memory, and refuse a state of another structure."""

  def __init__(self, kept=()): self.kept, self.folder, self.sane = dict(kept), 'memory', {}

  def steps(self): return sorted(self.kept)

  def save(self, step, state, wait, sane=None, spared=None):
    self.kept[step] = jax.tree.map(np.array, state)
    if sane is not None: self.sane = dict([sane])

  def sane_step(self): return next(iter(self.sane), None)

  def sane_loss(self): return next(iter(self.sane.values()), float('inf'))

  def wait(self): pass

  def restore(self, abstract):
    return self._as(abstract, self.kept[max(self.kept)])

  def restore_model(self, abstract, step):
    return self._as(abstract, self.kept[step].model)

  def _as(self, abstract, state):
    if jax.tree.structure(abstract) != jax.tree.structure(state): raise CheckpointError('holds another state')
    return jax.tree.map(lambda like, leaf: jax.device_put(leaf, like.sharding), abstract, state)
