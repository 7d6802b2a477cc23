"""What tests of compression after training share: small models of numbers drawn by numpy, and what a stage gets."""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm.compression import pruning
from efficient_lm.compression.patterns import PerMatrix
from efficient_lm.compression.scores import Magnitude
from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.parallel.sharding import place
from efficient_lm.training import losses

V, D, F, H, B, T = 48, 32, 40, 8, 8, 16
ATTENTIONS = {
  'grouped': spec.GroupedQuery(num_heads=4, num_kv_heads=2, head_dim=H, qk_norm='H'),
  'latent': spec.Latent(num_heads=2, query_rank=16, kv_rank=24, nope_dim=8, rope_dim=4, value_dim=16),
}
MLPS = {
  'dense': spec.SwiGLU(hidden=F),
  'experts': spec.MoE(num_experts=4, hidden=24, num_shared=1, router=routing.SoftmaxTopK(top_k=2)),
}


BIASED = dataclasses.replace(ATTENTIONS['grouped'], biases=('query', 'key', 'value', 'output'))
PATTERN = (spec.Layer(attention=dataclasses.replace(BIASED, window=5),
                      mlp=spec.Gated(hidden=F, biases=('gate', 'up', 'down'))),
           spec.Layer(attention=ATTENTIONS['grouped'], mlp=spec.Gated(hidden=F, activation='gelu')))
SHARED = dataclasses.replace(MLPS['experts'], num_shared=0, shared=spec.SigmoidGated(inner=spec.SwiGLU(hidden=F)))
STACKS = {
  'plain': spec.Stack(num_layers=2, attention=dataclasses.replace(BIASED, rope=None),
                      mlp=spec.Plain(hidden=F, activation='gelu')),
  'pattern': spec.Repeated(num_repeats=2, layers=PATTERN, block=spec.SandwichNorm()),
  'behind': spec.Stack(num_layers=2, attention=ATTENTIONS['grouped'], mlp=MLPS['dense'], block=spec.PostNorm()),
  'shared': spec.Stack(num_layers=2, attention=BIASED, mlp=SHARED),
}
# Parts of other families: as GPT-2, Gemma 2, OLMo 2, and Qwen2-MoE with positions from a table.
FAMILIES = {
  'plain': dict(norm=spec.LayerNorm(), ends=spec.Ends(positions=spec.Learned(length=T)), tied=True),
  'pattern': dict(tied=True, ends=spec.Ends(embed_scale=2., softcap=5.)), 'behind': {},
  'shared': dict(ends=spec.Ends(positions=spec.Learned(length=T), embed_scale=2.)),
}


@functools.cache
def model_of(attention: str = 'grouped', mlp: str = 'dense', tied: bool = False, num_layers: int = 2):
  """A float model; its norms have scales, and some channels of its embedding are large."""
  stack = spec.Stack(num_layers=num_layers, attention=ATTENTIONS[attention], mlp=MLPS[mlp])
  return drawn(spec.Transformer(vocab_size=V, dim=D, stacks=(stack,), tied=tied))


@functools.cache
def family(name: str):
  """As `model_of`, of FAMILIES."""
  return drawn(spec.Transformer(vocab_size=V, dim=D, stacks=(STACKS[name],), **FAMILIES[name]))


def drawn(described):
  """A model of numbers drawn by numpy."""
  rng = np.random.default_rng(0)

  def number(leaf):
    scale = 1 if len(leaf.shape) < 3 and leaf.shape[-1] != V and leaf.shape[0] != V else 0
    return jnp.asarray(scale + rng.normal(size=leaf.shape) * 0.3, leaf.dtype)
  model = jax.tree.map(number, jax.eval_shape(lambda: described.build(rngs=nnx.Rngs(0))))
  model.embed.array[...] = model.embed.array[...] * jnp.where(jnp.arange(D) % 11 == 3, 8., 1.)
  return model


def batch_of(seed: int = 0, rows: int = B) -> dict[str, np.ndarray]:
  """Tokens of two documents a row."""
  tokens = np.random.default_rng(seed).integers(0, V, (rows, T + 1)).astype(np.int32)
  place = np.tile(np.arange(T, dtype=np.int32), (rows, 1))
  return {'inputs_BT': tokens[:, :-1], 'targets_BT': tokens[:, 1:], 'positions_BT': place % (T // 2),
          'segments_BT': place // (T // 2) + 1}


@dataclasses.dataclass
class Context:
  """As `runs.context.Context`."""
  key: Any = dataclasses.field(default_factory=lambda: jax.random.key(3))
  mesh: Any = None
  available: int = 4
  followed: Any = None

  def follow(self, followed): self.followed = followed

  def batches(self, count: int):
    found = (batch_of(seed) for seed in range(min(count, self.available)))
    return found if self.mesh is None else (place(batch, self.mesh) for batch in found)


@jax.jit
def logits_of(model, batch=None):
  """(B, T, V) float32."""
  return losses.outputs_of(model, batch_of() if batch is None else batch).logits_BTV


def assert_the_same(model, other):
  """Two models that compute the same: float32 sums in other orders, logits of order ten."""
  a, b = logits_of(model), logits_of(other)
  np.testing.assert_allclose(a, b, atol=3e-4 * float(jnp.abs(a).max()))


def abstractly(stage, model):
  """What `stage.abstract` says of the structure, shapes and dtypes."""
  return jax.eval_shape(stage.abstract, model)


def assert_structure(abstract, model):
  """That it told the truth."""
  assert jax.tree.structure(abstract) == jax.tree.structure(model)
  shapes = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
  assert shapes(abstract) == shapes(model)


def masked_once(weight, sparsity=0.5, pattern=None):
  """The weight without the smallest magnitudes of each of its matrices."""
  pattern = pattern or PerMatrix()
  return pruning.masked(weight, {}, pattern.share(sparsity), score=Magnitude(), pattern=pattern)
