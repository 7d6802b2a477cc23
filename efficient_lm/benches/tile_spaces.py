"""For each operation with tunable kernels: the entry of a case in the tables of its `tiles.py`, and the tiles to try.

A space is (table, key, candidates for the platform's kernel); None for a case whose kernel has no tiles.
"""
import jax.numpy as jnp

from efficient_lm.ops.block_sparse_matmul import tiles as sparse
from efficient_lm.ops.decode_attention import tiles as attention
from efficient_lm.ops.grouped_matmul import tiles as grouped
from efficient_lm.ops.linear_cross_entropy import tiles as cross_entropy
from efficient_lm.ops.linear_divergence import tiles as divergence
from efficient_lm.ops.quantized_matmul import tiles as quantized


def grouped_matmul(case, platform: str):
  """The key is the pass, sizes and dtypes."""
  if case.of == 'all': return None
  x, w = jnp.dtype(case.dtype), jnp.dtype(case.weight or case.dtype)
  key = case.of, case.rows, *case.shape, len(case.sizes), x.name, w.name
  if platform == 'gpu': return 'TUNED_GPU', key, grouped.gpu_candidates(case.of, w)
  return 'TUNED_TPU', key, grouped.tpu_candidates(case.of, x, w)


def linear_cross_entropy(case, platform: str):
  """The key is the device family, the pass and the sizes of the head."""
  key = 'hopper' if platform == 'gpu' else platform, case.of, case.dim, case.vocab
  return 'TUNED', key, cross_entropy.candidates(platform, case.dim, jnp.dtype(case.dtype).itemsize)


def linear_divergence(case, platform: str):
  """The key is the device family, the pass and the sizes of the student's head. A case of both passes runs both with the
  same tiles; the best ones are kept for the backward pass, which has most of the products."""
  of = 'backward' if case.of == 'both' else case.of
  key = 'hopper' if platform == 'gpu' else platform, of, case.dims[0], case.vocab
  return 'TUNED', key, divergence.candidates(platform, case.dims[0], jnp.dtype(case.dtype).itemsize)


def quantized_matmul(case, platform: str):
  """The key is the sizes, bits, number of groups and the dtype of activations. Gradients have no kernel."""
  if case.of != 'forward': return None
  matrix, activations = case.matrix(*case.arguments()[1:]), case.scheme.activations
  key = case.rows, *matrix.shape, matrix.bits, matrix.scale_QO.shape[0], activations
  if platform == 'gpu': return 'TUNED_GPU', key, quantized.gpu_candidates(case.rows, matrix, activations)
  return 'TUNED_TPU', key, quantized.tpu_candidates(case.rows, matrix, activations)


def decode_attention(case, platform: str):
  """The key is the heads of all sequences, slots, head dim and bits."""
  H, heads = case.heads[2], case.batch * case.heads[1]
  bits = jnp.finfo(case.storage).bits if 'float' in case.storage else int(case.storage.removeprefix('int'))
  key = platform, heads, case.slots, H, bits
  return 'TUNED', key, attention.candidates(platform, case.slots, H, bits, case.page, heads)


def block_sparse_matmul(case, platform: str):
  """The key is the sizes of the product and of its blocks."""
  (R, C), (height, width) = case.grid, case.block
  key = case.M, R * height, C * width, height, width
  if platform == 'gpu': return 'TUNED_GPU', key, sparse.gpu_candidates(height, width)
  return 'TUNED_TPU', key, sparse.tpu_candidates(*key[1:], jnp.dtype(case.dtype).itemsize)


SPACES = dict(grouped_matmul=grouped_matmul, linear_cross_entropy=linear_cross_entropy, linear_divergence=linear_divergence,
              quantized_matmul=quantized_matmul, decode_attention=decode_attention, block_sparse_matmul=block_sparse_matmul)
