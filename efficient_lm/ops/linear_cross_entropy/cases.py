"""Inputs on which every implementation of the linear cross-entropy must agree, for tests and benchmarks."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from efficient_lm.ops import linear_cross_entropy as op
from efficient_lm.ops.linear_cross_entropy import reference


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes, the standard deviation of the logits, the dtype, and the pass `of`: 'forward' or 'backward'."""
  batch: int
  length: int
  dim: int
  vocab: int
  logits: float = 1.
  dtype: Any = jnp.float32
  of: str = 'forward'

  def arguments(self):
    """hidden_BTD, head_DV and labels_BT; for the backward pass also logsumexp_BT and the cotangents of both results."""
    hidden, head, labels, nll, logsumexp = jax.random.split(jax.random.key(self.length), 5)
    tokens = (self.batch, self.length)
    head_DV = jax.random.normal(head, (self.dim, self.vocab)) * self.logits * self.dim ** -.5
    arguments = (jax.random.normal(hidden, (*tokens, self.dim), self.dtype), head_DV.astype(self.dtype),
                 jax.random.randint(labels, tokens, 0, self.vocab))
    if self.of == 'forward': return arguments
    _, logsumexp_BT = op.linear_cross_entropy(*arguments, implementation='xla')
    return *arguments, logsumexp_BT, jax.random.uniform(nll, tokens), jax.random.uniform(logsumexp, tokens)

  def call(self, implementation: str, tiles=None):
    """arguments -> (nll_BT, logsumexp_BT), or (dhidden_BTD, dhead_DV)."""
    table = op.IMPLEMENTATIONS if self.of == 'forward' else op.BACKWARD
    if tiles is not None: return lambda *arguments: table[implementation].run(*arguments, tiles=tiles)
    return lambda *arguments: op.dispatch.run('linear_cross_entropy', table, implementation, *arguments)

  @property
  def flops(self) -> float:
    """One product forward, and three backward: the logits again, and one for each gradient."""
    return (2. if self.of == 'forward' else 6.) * self.batch * self.length * self.dim * self.vocab

  @property
  def bytes(self) -> float:
    """Both operands are read once, and in the backward pass as much is written. The scalars of tokens are not counted."""
    operands = (self.batch * self.length + self.vocab) * self.dim * jnp.dtype(self.dtype).itemsize
    return operands * (1. if self.of == 'forward' else 2.)

  @property
  def precision(self) -> str: return jnp.dtype(self.dtype).name

  @property
  def tolerance(self) -> float:
    """Sums of D, M or V float32 numbers in another order: 1e-5. In bfloat16 the forward pass differs no more, because it is
    float32 from the products on; the terms and the result of each gradient are rounded to 8 bits, 2**-8 each. Logits have an
    error of some 2**-24 of the largest one, four deviations, which exp makes a relative error: 2e-6 for each deviation."""
    if self.of == 'forward': return 1e-5
    return 2 ** -7 if self.dtype == jnp.bfloat16 else max(1e-5, 2e-6 * self.logits)

  def baselines(self):
    """The loss with all logits in the dtype of hidden, as one would write it without this operation."""
    if self.of == 'forward': return {'jnp': _unfused}
    def backward(hidden_BTD, head_DV, labels_BT, _, g_nll_BT, g_logsumexp_BT):
      _, pull = jax.vjp(lambda hidden, head: _unfused(hidden, head, labels_BT), hidden_BTD, head_DV)
      return pull((g_nll_BT, g_logsumexp_BT))
    return {'jnp': backward, 'jnp, float32 logits': reference.backward}


def _unfused(hidden_BTD, head_DV, labels_BT):
  logits_BTV = jnp.einsum('BTD,DV->BTV', hidden_BTD, head_DV).astype(jnp.float32)
  logsumexp_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  return logsumexp_BT - jnp.take_along_axis(logits_BTV, labels_BT[..., None], axis=-1)[..., 0], logsumexp_BT


CASES = {
  'small': Case(2, 24, 16, 50),
  'one token': Case(1, 1, 8, 5),
  'a prime number of tokens': Case(3, 13, 8, 31),
  'one word': Case(2, 4, 8, 1),
  'certain': Case(2, 9, 16, 20, logits=200.),   # exp of such logits overflows
  'more tokens than words': Case(4, 50, 8, 7),
  'bfloat16': Case(2, 24, 16, 50, dtype=jnp.bfloat16),
}
CASES |= {f'{name}, backward': dataclasses.replace(case, of='backward') for name, case in CASES.items()}

_MODELS = {   # tokens, D, V of public models
  'llama 3 8B': (16384, 4096, 128256),
  '16k x 4096 x 128k': (16384, 4096, 131072),
  'qwen 3 4B': (16384, 2560, 151936),   # V is no multiple of the tile
  'gemma 3 1B': (8192, 1152, 262144),
  'olmo 1B': (16384, 2048, 50304),
}


def bench(platform: str) -> dict[str, Case]:
  """The last layers of public models on accelerators, and a small one on a CPU."""
  sizes = {'research': (512, 256, 8192)} if platform == 'cpu' else _MODELS
  dtype = jnp.float32 if platform == 'cpu' else jnp.bfloat16
  return {f'{name}, {of}': Case(1, tokens, D, V, dtype=dtype, of=of)
          for name, (tokens, D, V) in sizes.items() for of in ('forward', 'backward')}
