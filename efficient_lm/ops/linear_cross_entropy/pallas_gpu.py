"""Mosaic GPU kernels for Hopper: a dense product whose epilogue reduces the logits in registers.

Each block of three warpgroups computes its share of the tiles of the logits (a persistent grid). One warpgroup copies tiles
of hidden and head into shared memory, up to `stages` steps ahead, and those of the next tile while the epilogue of the last
one runs. Each of the other two multiplies (wgmma) its half of the tokens by all columns of the tile, so that the sums over
columns stay within a warpgroup, with four threads for each row. Copies (TMA) read zeros past the end of an array and write
nothing there, so that V need not be a multiple of the tile.

Forward, a tile leaves a logsumexp for each token, and the label's logit or 0: [2, V / columns, M] float32, which is 1 / 64
of bfloat16 logits; XLA combines them. A block does not keep its tokens for the whole vocabulary: every block would read its
own tokens again for every tile, which exceeds the L2 cache. Tiles are ordered in bands instead, which share both operands.
Backward, a kernel writes the gradient by a chunk of logits, in 16 bits, and cuBLAS multiplies it: see vocabulary.py.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from efficient_lm.ops import dispatch
from efficient_lm.ops.linear_cross_entropy import vocabulary
from efficient_lm.ops.linear_cross_entropy.tiles import STORE_COLUMNS, GpuTiles, gpu_tiles_for

LOG2_E = math.log2(math.e)
H200_CORES = 132   # multiprocessors, where the device is not known
ROW = plgpu.Layout.WGMMA.reduce(1)   # the layout of one value for each token, which sums over a tile's columns have


def linear_cross_entropy(hidden_BTD, head_DV, labels_BT, *, tiles: GpuTiles | None = None):
  """See the API."""
  return vocabulary.linear_cross_entropy(KERNELS, hidden_BTD, head_DV, labels_BT, tiles)


def backward(*arguments, tiles: GpuTiles | None = None):
  """See the API."""
  return vocabulary.backward(KERNELS, *arguments, tiles)


def _forward(hidden_MD, head_DV, labels_M, tiles):
  M, V = hidden_MD.shape[0], head_DV.shape[1]
  num_tiles = pl.cdiv(V, tiles.columns)

  def epilogue(logits, rows, n, half, out, smem):
    """logits: those of one warpgroup, in registers. rows: its slice of tokens. n: the tile's number along the vocabulary."""
    labels_gmem, result_gmem = out
    column = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA)
    label = plgpu.load(labels_gmem.at[rows], layout=ROW, optimized=False) - n * tiles.columns
    at_label = column == lax.broadcast_in_dim(label, logits.shape, [0])
    hit = jnp.where(at_label, logits, 0.).sum(axis=1)
    if V % tiles.columns: logits = jnp.where(column < V - n * tiles.columns, logits, -jnp.inf)
    maximum = logits.max(axis=1)
    # exp2 of a fused multiply-add takes fewer instructions than exp of a difference.
    total = jnp.exp2(logits * LOG2_E - lax.broadcast_in_dim(maximum * LOG2_E, logits.shape, [0])).sum(axis=1)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem[half, 0] = maximum + jnp.log(total)
    smem[half, 1] = hit
    plgpu.commit_smem()
    for i in range(2): plgpu.copy_smem_to_gmem(smem.at[half, i], result_gmem.at[i, n, rows])

  def body(hidden, head, labels, result):
    smem = plgpu.SMEM((2, 2, tiles.rows), jnp.float32)
    product(hidden, head, 0, V, tiles, smem, functools.partial(epilogue, out=(labels, result)))

  result = persistent(body, jax.ShapeDtypeStruct((2, num_tiles, M), jnp.float32), 'linear_cross_entropy_forward')(
    hidden_MD, head_DV, labels_M)
  return jax.nn.logsumexp(result[0], axis=0), jnp.sum(result[1], axis=0)


def _dlogits(hidden_MD, head_DV, per_token, start, width: int, tiles):
  transforms = swizzled(STORE_COLUMNS, hidden_MD.dtype)

  def epilogue(logits, rows, n, half, out, smem):
    *per_token, start, d_gmem = out
    label, logsumexp, p_scale, label_scale = (plgpu.load(x.at[rows], layout=ROW, optimized=False) for x in per_token)
    label, shift = label - (start + n * tiles.columns), logsumexp * LOG2_E
    shape = tiles.rows, STORE_COLUMNS
    wide = lambda x: lax.broadcast_in_dim(x, shape, [0])
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    for i in range(tiles.columns // STORE_COLUMNS):
      first = i * STORE_COLUMNS
      p = jnp.exp2(logits[:, first:first + STORE_COLUMNS] * LOG2_E - wide(shift)) * wide(p_scale)
      d = p - jnp.where(column == wide(label - first), wide(label_scale), 0.)
      # The copy before the last one has freed this slot; for the first, also the last one of the tile before must have.
      plgpu.wait_smem_to_gmem(min(i, 1), wait_read_only=True)
      smem[half, i % 2] = d.astype(d_gmem.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(smem.at[half, i % 2],
                              d_gmem.at[rows, pl.ds(n * tiles.columns + first, STORE_COLUMNS)])

  def body(hidden, head, labels, logsumexp, p_scale, label_scale, start, d):
    smem = plgpu.SMEM((2, 2, tiles.rows, STORE_COLUMNS), hidden_MD.dtype, transforms=transforms)
    first = start[0]
    product(hidden, head, first, width, tiles, smem,
             functools.partial(epilogue, out=(labels, logsumexp, p_scale, label_scale, first, d)))

  return persistent(body, jax.ShapeDtypeStruct((hidden_MD.shape[0], width), hidden_MD.dtype),
                 'linear_cross_entropy_dlogits')(
    hidden_MD, head_DV, *per_token, jnp.reshape(start, 1).astype(jnp.int32))


def persistent(body, out_type, name: str):
  """`body` as a kernel of as many blocks as the device has multiprocessors, of three warpgroups each."""
  return plgpu.kernel(
    body, out_type=out_type, kernel_name=name, grid=(dispatch.device().num_cores or H200_CORES,), grid_names=('block',),
    num_threads=3, thread_name='warpgroup', compiler_params=plgpu.CompilerParams(approx_math=True))


def swizzled(columns: int, dtype):
  """The layout in shared memory of rows with so many columns."""
  swizzle = plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8)
  return (plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle))


def product(hidden, head, start, width: int, tiles: GpuTiles, smem, epilogue):
  """Calls `epilogue` with each of this block's tiles of hidden_MD @ head_DV[:, start:start + width].

  epilogue: (logits, slice of tokens, number of the tile along the columns, warpgroup, shared memory `smem`).
  """
  (M, D), rows = hidden.shape, 2 * tiles.rows
  shape = M // rows, pl.cdiv(width, tiles.columns)
  pipeline = functools.partial(
    plgpu.emit_pipeline_warp_specialized, grid=(D // tiles.inner,), memory_registers=40, wg_axis='warpgroup',
    num_compute_wgs=2, max_concurrent_steps=tiles.stages, in_specs=[
      plgpu.BlockSpec((rows, tiles.inner), lambda k: (0, k), delay_release=1,
                      transforms=swizzled(tiles.inner, hidden.dtype)),
      plgpu.BlockSpec((tiles.inner, tiles.columns), lambda k: (k, 0), delay_release=1,
                      transforms=swizzled(tiles.inner, head.dtype))])
  nothing = lambda *_: None

  @functools.partial(pl.run_scoped, allocations=pipeline(nothing, compute_context=nothing).get_allocations(hidden, head),
                     smem=smem, collective_axes='warpgroup')
  def _(allocations, smem):
    half = lax.axis_index('warpgroup')

    @plgpu.nd_loop((shape[0] * shape[1],), collective_axes='block')
    def _(loop):
      m, n = plgpu.planar_snake(loop.index[0], shape, 0, tiles.band)
      # Chunks begin at multiples of every tile; the copy has to know that it begins at a whole swizzled row of 64.
      first = pl.multiple_of(start + n * tiles.columns, 64)

      def tile(run_pipeline):
        @functools.partial(pl.run_scoped, accumulator=plgpu.ACC((tiles.rows, tiles.columns), jnp.float32))
        def _(accumulator):
          run_pipeline(accumulator)
          epilogue(accumulator[...], pl.ds(m * rows + half * tiles.rows, tiles.rows), n, half, smem=smem)

      def step(_, hidden_smem, head_smem, accumulator):
        plgpu.wgmma(accumulator, hidden_smem.at[pl.ds(half * tiles.rows, tiles.rows)], head_smem)
        plgpu.wgmma_wait(1)   # for the product of the previous step, whose shared memory is freed: see delay_release
        return accumulator

      pipeline(step, compute_context=tile)(
        hidden.at[pl.ds(m * rows, rows), :], head.at[:, pl.ds(first, tiles.columns)],
        allocations=allocations)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


KERNELS = vocabulary.Kernels(_forward, _dlogits, gpu_tiles_for, lambda tiles: 2 * tiles.rows)
