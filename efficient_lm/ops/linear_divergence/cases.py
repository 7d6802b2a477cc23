"""Inputs on which every implementation of the divergences must agree, for tests and benchmarks."""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from efficient_lm.ops import linear_divergence as op

TEMPERATURE = 2.0
BETA = 0.3
LISTED = 8   # tokens of a teacher that are listed or drawn, at most


@dataclasses.dataclass(frozen=True)
class Case:
  """tokens: (B, T). dims: the widths of student and teacher. signal: 'dense', 'top_k' or 'sampled'. logits: their standard
  deviation. of: 'forward', or 'both' passes as training runs them, because implementations save different things between the
  passes."""
  tokens: tuple[int, int]
  dims: tuple[int, int]
  vocab: int
  signal: str = 'dense'
  kind: str = 'forward_kl'
  logits: float = 1.
  dtype: Any = jnp.float32
  of: str = 'forward'

  def arguments(self):
    """hidden_BTD, head_DV and the two arrays of the teacher; for both passes also the cotangent of the result."""
    *keys, ids, cotangent = jax.random.split(jax.random.key(self.tokens[1]), 6)
    draw = lambda key, *shape: jax.random.normal(key, shape)
    layer = lambda hidden, head, D: (draw(hidden, *self.tokens, D).astype(self.dtype),
                                     (draw(head, D, self.vocab) * self.logits * D ** -.5).astype(self.dtype))
    student = layer(*keys[:2], self.dims[0])
    if self.signal == 'dense': teacher = layer(*keys[2:], self.dims[1])
    else: teacher = self._sparse(*keys[2:], ids)
    return *student, *teacher, *((jax.random.uniform(cotangent, self.tokens),) if self.of == 'both' else ())

  def _sparse(self, values, counts, ids):
    listed = min(LISTED, self.vocab)
    shape = *self.tokens, listed
    if self.signal == 'sampled':
      return jax.random.randint(ids, shape, 0, self.vocab), jax.random.randint(counts, shape, 0, 5)
    # The ids of a token are different: they lie at equal distances, from a random first one on.
    first = jax.random.randint(ids, (*self.tokens, 1), 0, self.vocab)
    ids_BTA = (first + jnp.arange(listed) * max(self.vocab // listed, 1)) % self.vocab
    kept = 1. if listed == self.vocab else 0.8
    return ids_BTA, jax.nn.log_softmax(self.logits * jax.random.normal(values, shape)) + jnp.log(kept)

  def call(self, implementation: str, tiles=None):
    """arguments -> divergence_BT, or that and (dhidden_BTD, dhead_DV)."""
    table = {'dense': op.IMPLEMENTATIONS, 'top_k': op.TOP_K, 'sampled': op.SAMPLED}[self.signal]
    options = dict(temperature=TEMPERATURE) | ({} if self.signal == 'sampled' else dict(kind=self.kind, beta=BETA))
    if tiles is not None: run = functools.partial(table[implementation].run, tiles=tiles, **options)
    else: run = functools.partial(op.dispatch.run, 'linear_divergence', table, implementation, **options)
    if self.of == 'forward': return run
    def both(hidden_BTD, head_DV, first, second, g_BT):
      value_BT, pull = jax.vjp(lambda hidden, head: run(hidden, head, first, second), hidden_BTD, head_DV)
      return value_BT, pull(g_BT)
    return both

  @property
  def flops(self) -> float:
    """A product for each set of logits, and in the backward pass these again and one for each gradient."""
    B, T = self.tokens
    student, teacher = self.dims[0], self.dims[1] if self.signal == 'dense' else 0
    return 2. * B * T * self.vocab * (student + teacher if self.of == 'forward' else 4 * student + 2 * teacher)

  @property
  def bytes(self) -> float:
    """Hidden states and heads are read once in each pass; in the backward pass the student's gradients are written."""
    student, teacher = self.dims[0], self.dims[1] if self.signal == 'dense' else 0
    width = student + teacher if self.of == 'forward' else 3 * student + 2 * teacher
    return float((self.tokens[0] * self.tokens[1] + self.vocab) * width * jnp.dtype(self.dtype).itemsize)

  @property
  def precision(self) -> str: return jnp.dtype(self.dtype).name

  @property
  def tolerance(self) -> float:
    """Sums of float32 numbers in another order: 1e-5, and 2e-6 for each deviation of the logits, which have an error of some
    2**-24 of the largest one; exp makes that a relative error. In bfloat16 the gradient by the logits and both results of
    the backward pass are rounded to 8 bits, 2**-8 each."""
    return 2 ** -7 if self.dtype == jnp.bfloat16 and self.of == 'both' else max(1e-5, 2e-6 * self.logits)

  def baselines(self):
    """The divergence with all logits, as one would write it without this operation."""
    return {'jnp': self.call('reference')}


_FORWARD = {
  'forward KL': Case((2, 13), (16, 24), 50),
  'reverse KL': Case((2, 13), (16, 24), 50, kind='reverse_kl'),
  'Jensen-Shannon': Case((2, 13), (16, 24), 50, kind='jensen_shannon'),
  'top 8 and the rest': Case((2, 13), (16, 0), 50, 'top_k'),
  'top 8 and the rest, reverse': Case((2, 13), (16, 0), 50, 'top_k', 'reverse_kl'),
  'top 8 and the rest, Jensen-Shannon': Case((2, 13), (16, 0), 50, 'top_k', 'jensen_shannon'),
  'all are listed': Case((1, 9), (8, 0), 5, 'top_k'),
  'sampled': Case((2, 13), (16, 0), 50, 'sampled'),
  'one token': Case((1, 1), (8, 8), 5),
  'certain': Case((2, 5), (16, 8), 40, logits=200.),
  'certain, Jensen-Shannon': Case((2, 5), (16, 8), 40, kind='jensen_shannon', logits=200.),
  'certain, top 8': Case((2, 5), (16, 8), 40, 'top_k', logits=200.),
  'bfloat16': Case((2, 13), (16, 24), 50, dtype=jnp.bfloat16),
}
CASES = _FORWARD | {f'{name}, both': dataclasses.replace(case, of='both') for name, case in _FORWARD.items()}


def bench(platform: str) -> dict[str, Case]:
  """A student of 1B parameters with a teacher of 8B on accelerators (Llama 3.2 and 3.1), and a small pair on a CPU."""
  case = Case((1, 256), (128, 256), 8192) if platform == 'cpu' else Case(
    (2, 4096), (2048, 4096), 128256, dtype=jnp.bfloat16)
  signals = {'forward KL': {}, 'Jensen-Shannon': dict(kind='jensen_shannon'), 'top 8': dict(signal='top_k'),
             'sampled': dict(signal='sampled')}
  # The forward pass of Jensen-Shannon is plain JAX on every device.
  return {f'{name}, {of}': dataclasses.replace(case, of=of, **options) for name, options in signals.items()
          for of in ('forward', 'both') if (name, of) != ('Jensen-Shannon', 'forward')}
