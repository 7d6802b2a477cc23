"""For each operation with kernels: where the tiles for a case stand in its `tiles.py`, and which are worth trying.

A space is (table, key, candidates of the kernel for the platform); None for a case whose kernel has no tiles.
"""
import jax.numpy as jnp

from efficient_lm.lazy import lazy

attention = lazy('efficient_lm.ops.decode_attention.tiles')
cross_entropy = lazy('efficient_lm.ops.linear_cross_entropy.tiles')
divergence = lazy('efficient_lm.ops.linear_divergence.tiles')
grouped = lazy('efficient_lm.ops.grouped_matmul.tiles')
quantized = lazy('efficient_lm.ops.quantized_matmul.tiles')
sparse = lazy('efficient_lm.ops.block_sparse_matmul.tiles')


def grouped_matmul(case, platform: str):
  """By pass, sizes and dtypes."""
  if case.of == 'all': return None
  x, w = jnp.dtype(case.dtype), jnp.dtype(case.weight or case.dtype)
  key = case.of, case.rows, *case.shape, len(case.sizes), x.name, w.name
  if platform == 'gpu': return 'TUNED_GPU', key, grouped.gpu_candidates(case.of, w)
  return 'TUNED_TPU', key, grouped.tpu_candidates(case.of, x, w)


def linear_cross_entropy(case, platform: str):
  """By family, pass and sizes of the head."""
  key = 'hopper' if platform == 'gpu' else platform, case.of, case.dim, case.vocab
  return 'TUNED', key, cross_entropy.candidates(platform, case.dim, jnp.dtype(case.dtype).itemsize)


def linear_divergence(case, platform: str):
  """By family, pass and sizes of the student's head. Both passes take the same tiles where they are given: those found for
  both stand for the backward one, which has most of the products."""
  of = 'backward' if case.of == 'both' else case.of
  key = 'hopper' if platform == 'gpu' else platform, of, case.dims[0], case.vocab
  return 'TUNED', key, divergence.candidates(platform, case.dims[0], jnp.dtype(case.dtype).itemsize)


def quantized_matmul(case, platform: str):
  """By sizes, bits, number of groups and what activations are rounded to; gradients have no kernel."""
  if case.of != 'forward': return None
  matrix, activations = case.matrix(*case.arguments()[1:]), case.scheme.activations
  key = case.rows, *matrix.shape, matrix.bits, matrix.scale_QN.shape[0], activations
  if platform == 'gpu': return 'TUNED_GPU', key, quantized.gpu_candidates(case.rows, matrix, activations)
  return 'TUNED_TPU', key, quantized.tpu_candidates(case.rows, matrix, activations)


def decode_attention(case, platform: str):
  """By heads of all sequences, slots, head dim and bits."""
  H, heads = case.heads[2], case.batch * case.heads[1]
  bits = jnp.finfo(case.storage).bits if 'float' in case.storage else int(case.storage.removeprefix('int'))
  key = platform, heads, case.slots, H, bits
  return 'TUNED', key, attention.candidates(platform, case.slots, H, bits, case.page, heads)


def block_sparse_matmul(case, platform: str):
  """By sizes of the product and of its blocks."""
  (R, C), (height, width) = case.grid, case.block
  key = case.M, R * height, C * width, height, width
  if platform == 'gpu': return 'TUNED_GPU', key, sparse.gpu_candidates(height, width)
  return 'TUNED_TPU', key, sparse.tpu_candidates(*key[1:], jnp.dtype(case.dtype).itemsize)


SPACES = dict(grouped_matmul=grouped_matmul, linear_cross_entropy=linear_cross_entropy, linear_divergence=linear_divergence,
              quantized_matmul=quantized_matmul, decode_attention=decode_attention, block_sparse_matmul=block_sparse_matmul)
