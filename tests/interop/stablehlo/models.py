"""Small models of every kind whose export is tested, with numbers drawn by numpy."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm.data.tokenizers import SymbolTokenizer
from efficient_lm.formats import Format, Group, Int
from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.tree import rewrite
from efficient_lm.weights.quantized import round_to_nearest
from efficient_lm.weights.weight import Weight

TOKENIZER = SymbolTokenizer('abcdefghijklmnopqrstuvwxyz0')   # the vocabulary of the models is larger
INT4, INT8 = Int(bits=4, scales=Group(size=8)), Int(bits=8)


def described(kind: str) -> spec.Transformer:
  """A description. 'capped' has what some implementations of attention refuse."""
  experts = spec.MoE(num_experts=4, hidden=16, router=routing.SoftmaxTopK(top_k=2))
  chosen = spec.MoE(num_experts=4, hidden=16, router=routing.ExpertChoice(capacity=2.0))
  mlp = {'experts': experts, 'chosen': chosen}.get(kind, spec.SwiGLU(hidden=32))
  attention = spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8, softcap=20.0 if kind == 'capped' else None)
  if kind == 'latent': attention = spec.Latent(num_heads=2, query_rank=None, kv_rank=8, nope_dim=8, rope_dim=4, value_dim=8)
  ends = spec.Ends(positions=spec.Learned(length=16)) if kind == 'positions' else spec.Ends()
  stack = spec.Stack(num_layers=2, attention=attention, mlp=mlp)
  return spec.Transformer(vocab_size=32, dim=16, stacks=(stack,), ends=ends)


def abstract(kind: str):
  """Its shapes."""
  return jax.eval_shape(lambda: described(kind).build(rngs=nnx.Rngs(0)))


@functools.cache
def drawn(kind: str, format: Format | None = None):
  """A model, all of whose weights are stored in `format`."""
  rng = np.random.default_rng(0)
  model = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype), abstract(kind))
  return model if format is None else jax.jit(quantized, static_argnums=1)(model, format)


def quantized(model, format: Format):
  """All weights stored in `format`."""
  return rewrite(model, Weight, lambda _, weight: round_to_nearest(weight, format))


def wide(format: Format):
  """One layer, large enough for its weights to be most of a file."""
  stack = spec.Stack(num_layers=1, attention=spec.GroupedQuery(num_heads=4, num_kv_heads=4, head_dim=64),
                     mlp=spec.SwiGLU(hidden=1024))
  model = spec.Transformer(vocab_size=32, dim=256, stacks=(stack,)).build(rngs=nnx.Rngs(0))
  return jax.jit(quantized, static_argnums=1)(model, format)
