"""Cases of single operations, forward and backward, against what one would write without ours."""
import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm import measure
from efficient_lm.benches.result import OURS, Case, difference, within
from efficient_lm.ledger import quantity
from efficient_lm.ops.attention import attention as attention_op
from efficient_lm.ops.grouped_matmul import grouped_matmul as grouped_matmul_op
from efficient_lm.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy_op

TOLERANCE = {'float32': 1e-4, 'bfloat16': 3e-2}   # of results and gradients, relative to the largest of each


def dtype():
  """What this device multiplies in: float32 on CPU, bfloat16 elsewhere."""
  return jnp.dtype('float32' if jax.default_backend() == 'cpu' else 'bfloat16')


def normal(seed: int, *shape: int, scale: float = 1.0):
  """Random normal array in that dtype."""
  return scale * jax.random.normal(jax.random.key(seed), shape, dtype())


def both_ways(functions: dict, arguments: tuple, flops: float, target: float | None = None) -> Case:
  """Result and gradients of each function of float arrays, compiled. First comes OURS, then the baseline.

  flops: of the forward pass; the backward pass has two products for one.
  """
  def compiled(function):
    def run(cotangent, *arguments):
      result, pull = jax.vjp(function, *arguments)
      return result, *pull(cotangent)
    return jax.jit(run).lower(cotangent, *arguments).compile()
  shape = jax.eval_shape(next(iter(functions.values())), *arguments)
  cotangent = jax.random.normal(jax.random.key(99), shape.shape, shape.dtype)
  compiled = {name: compiled(function) for name, function in functions.items()}
  results = [run(cotangent, *arguments) for run in compiled.values()]
  candidates = {name: lambda run=run: jax.block_until_ready(run(cotangent, *arguments))
                for name, run in compiled.items()}
  apart = max(difference('result or a gradient', ours, theirs, TOLERANCE[dtype().name])
              for ours, theirs in zip(*results, strict=True))
  temporaries = [run.memory_analysis().temp_size_in_bytes for run in compiled.values()]
  memory = ' / '.join(quantity(size, 'B', 1024) for size in temporaries)
  return Case(candidates=candidates, flops=3 * flops, target=target,
              agreement=f'{within("result and gradients", apart)}; temporaries {memory}')


def group_sizes(num_groups: int, rows: int, skew: float) -> np.ndarray:
  """int32 sizes that sum to `rows`, proportional to 1 / rank**skew: 0 gives equal groups, 2 some empty."""
  end = np.cumsum(np.arange(1, num_groups + 1) ** -skew)
  return np.diff(np.round(end / end[-1] * rows), prepend=0).astype(np.int32)


def grouped_matmul(E: int, M: int, K: int, N: int, *, skew: float = 0.0, target: float | None = None) -> Case:
  """The product of a mixture's experts against XLA's own grouped product."""
  sizes_E = jnp.asarray(group_sizes(E, M, skew))
  return both_ways({OURS: lambda x, w: grouped_matmul_op(x, w, sizes_E),
                    'lax.ragged_dot': lambda x, w: jax.lax.ragged_dot(x, w, sizes_E)},
                   (normal(0, M, K), normal(1, E, K, N, scale=K ** -.5)), 2 * M * K * N, target)


def attention(B: int, T: int, N: int, K: int, H: int, *, documents: int) -> Case:
  """Causal attention within `documents` equal documents a row, against its equation."""
  segments_BT = jnp.broadcast_to(jnp.arange(T) * documents // T + 1, (B, T))
  run = lambda implementation: lambda q, k, v: attention_op(
    q, k, v, segments_BS=segments_BT, implementation=implementation)
  arguments = (normal(0, B, T, N, H), normal(1, B, T, K, H), normal(2, B, T, K, H))
  flops = 2 * 2 * B * T * N * H * measure.mean_keys(T // documents)
  return both_ways({OURS: run('auto'), "the equation ('reference')": run('reference')}, arguments, flops)


def linear_cross_entropy(tokens: int, D: int, V: int) -> Case:
  """The loss from the last layer's output, against building all logits."""
  labels_BT = jax.random.randint(jax.random.key(2), (1, tokens), 0, V)
  run = lambda implementation: lambda hidden, head: linear_cross_entropy_op(
    hidden, head, labels_BT, implementation=implementation)[0]
  return both_ways({OURS: run('auto'), "the equation ('reference')": run('reference')},
                   (normal(0, 1, tokens, D), normal(1, D, V, scale=D ** -.5)), 2 * tokens * D * V)


def peak_matmul(size: int, repeats: int = 5) -> float:
  """FLOP/s of the quickest of some large square products: what this machine can reach at all."""
  x, y = normal(0, size, size), normal(1, size, size)
  product = jax.jit(jnp.matmul)
  return 2 * size ** 3 / min(measure.interleaved({'product': lambda: product(x, y)}, repeats)['product'])
