"""The block-sparse product on a TPU: Mosaic kernels that keep a tile of rows in VMEM and stream the kept blocks past it.

Rows and their gradient: a block reads all inputs of its tile of rows from VMEM, wherever they lie, so that only blocks
come from HBM, M / tile times each. They are copied in the order in which they are multiplied, a few ahead, over the ends of
columns and of tiles, because a column of small blocks is over sooner than a copy arrives. The next tile of rows is copied
meanwhile. A column without blocks is a loop of no turns and leaves zeros.

The gradient of the blocks: a group of them is kept in VMEM as float32 while all rows stream by.

Which block comes when is known from prefetched scalars. Blocks must be multiples of 128 x 128, the registers' lanes; on
v6e and later blocks of 256 x 256 fill the matrix unit, smaller ones part of it.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_lm.ops.block_sparse_matmul.gradient import differentiable
from efficient_lm.ops.block_sparse_matmul.pattern import Pattern, Sweep
from efficient_lm.ops.block_sparse_matmul.tiles import PASSES, VMEM, TpuTiles, tpu_tiles_for

LANES = 128


def block_sparse_matmul(x_MK, blocks_QUV, pattern: Pattern, *, tiles: TpuTiles | None = None):
  """See the API."""
  product = differentiable(functools.partial(rows, tiles=tiles), functools.partial(weights, tiles=tiles))
  return product(x_MK, blocks_QUV, pattern)


def refuses(x_MK, blocks_QUV, pattern: Pattern) -> str:
  """Why these kernels cannot take such arguments, '' if they can."""
  (M, K), (_, U, V), N = x_MK.shape, blocks_QUV.shape, pattern.shape[1] * blocks_QUV.shape[2]
  if x_MK.dtype not in (jnp.bfloat16, jnp.float32): return f'rows are {x_MK.dtype}, neither bfloat16 nor float32'
  if U % LANES or V % LANES: return f'blocks are {U} x {V}, not multiples of {LANES} x {LANES}'
  sizes = K, N, U, V, x_MK.dtype.itemsize
  if max(tpu_tiles_for(M, *sizes).vmem(of, *sizes) for of in PASSES) > VMEM:
    return f'{K} inputs and {N} outputs of a tile of rows do not fit into VMEM'
  return ''


def rows(x_MK, blocks_QUV, sweep: Sweep, transposed: bool = False, *, tiles: TpuTiles | None = None):
  """y_o = the sum of x_i w_q over the sweep's blocks of each output block o, or of x_i w_q^T if `transposed`."""
  (M, K), (Q, U, V), num_outputs = x_MK.shape, blocks_QUV.shape, sweep.starts.shape[0] - 1
  read, write = (V, U) if transposed else (U, V)
  tiles = tiles or tpu_tiles_for(M, *((num_outputs * U, K) if transposed else (K, num_outputs * V)), U, V,
                                 x_MK.dtype.itemsize)
  tile = min(tiles.dgrad if transposed else tiles.forward, -(-M // 16) * 16)
  num_tiles = pl.cdiv(M, tile)
  # Rows are copied by hand, whole tiles: past the end there must be something.
  if M % tile: x_MK = jnp.pad(x_MK, ((0, num_tiles * tile - M), (0, 0)))
  cores = 1 + (num_tiles % 2 == 0)   # halves of the rows, for chips of two cores
  kernel = functools.partial(_rows_kernel, read=read, transposed=transposed)
  result = pl.pallas_call(
    kernel, out_shape=jax.ShapeDtypeStruct((num_tiles * tile, num_outputs * write), x_MK.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3, grid=(cores, num_tiles // cores, num_outputs),
      in_specs=[pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)],
      out_specs=pl.BlockSpec((tile, write), lambda core, m, o, *_: (core * (num_tiles // cores) + m, o)),
      scratch_shapes=[pltpu.VMEM((2, tile, K), x_MK.dtype), pltpu.VMEM((tiles.stages, U, V), blocks_QUV.dtype),
                      pltpu.VMEM((tile, write), jnp.float32),
                      pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA((tiles.stages,))]),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary', 'arbitrary'), vmem_limit_bytes=VMEM),
    cost_estimate=pl.CostEstimate(flops=2 * M * Q * U * V, transcendentals=0,
                                  bytes_accessed=x_MK.nbytes + num_tiles * blocks_QUV.nbytes),
    name='block_sparse_matmul_' + ('dgrad' if transposed else 'forward'),
  )(*(jnp.asarray(numbers, jnp.int32) for numbers in sweep), x_MK, blocks_QUV)
  return result[:M]


def _rows_kernel(starts, inputs_Q, blocks_Q, x_hbm, w_hbm, y_ref, x_ref, w_ref, sum_ref, x_arrived, w_arrived, *,
                 read: int, transposed: bool):
  """One output block of one tile of rows."""
  core, m, o = (pl.program_id(i) for i in range(3))
  num_tiles = pl.num_programs(1)
  num_blocks, tile, stages = blocks_Q.shape[0], x_ref.shape[1], w_ref.shape[0]

  def x_copy(m):
    first = pl.multiple_of((core * num_tiles + m) * tile, tile)
    return pltpu.make_async_copy(x_hbm.at[pl.ds(first, tile)], x_ref.at[lax.rem(m, 2)], x_arrived.at[lax.rem(m, 2)])

  def w_copy(turn):
    """turn: blocks multiplied so far, over all tiles of rows of this core."""
    slot = lax.rem(turn, stages)
    return pltpu.make_async_copy(w_hbm.at[blocks_Q[lax.rem(turn, num_blocks)]], w_ref.at[slot], w_arrived.at[slot])

  num_turns = num_tiles * num_blocks

  @pl.when((m == 0) & (o == 0))
  def _():
    x_copy(0).start()

    @pl.loop(0, jnp.minimum(stages - 1, num_turns))
    def _(turn): w_copy(turn).start()

  @pl.when(o == 0)
  def _():
    @pl.when(m + 1 < num_tiles)
    def _(): x_copy(m + 1).start()
    x_copy(m).wait()

  sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.loop(starts[o], starts[o + 1])
  def _(q):
    turn = m * num_blocks + q
    @pl.when(turn + stages - 1 < num_turns)
    def _(): w_copy(turn + stages - 1).start()   # into the slot whose block was multiplied last
    w_copy(turn).wait()
    x = x_ref[lax.rem(m, 2), :, pl.ds(pl.multiple_of(inputs_Q[q] * read, read), read)]
    sum_ref[...] += _dot(x, w_ref[lax.rem(turn, stages)], 1, int(transposed))

  y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def weights(x_MK, g_MN, blocks_QUV, pattern: Pattern, *, tiles: TpuTiles | None = None):
  """dw_q = x_r^T g_c for the row r and the column c of each kept block."""
  (M, K), N, (Q, U, V) = x_MK.shape, g_MN.shape[1], blocks_QUV.shape
  tiles = tiles or tpu_tiles_for(M, K, N, U, V, x_MK.dtype.itemsize)
  tile, group = min(tiles.wgrad, -(-M // 16) * 16), min(tiles.group, Q)
  return pl.pallas_call(
    functools.partial(_weights_kernel, num_rows=M),
    out_shape=jax.ShapeDtypeStruct((Q, U, V), blocks_QUV.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2, grid=(pl.cdiv(Q, group), pl.cdiv(M, tile)),
      in_specs=[pl.BlockSpec((tile, K), lambda i, m, *_: (m, 0)), pl.BlockSpec((tile, N), lambda i, m, *_: (m, 0))],
      out_specs=pl.BlockSpec((group, U, V), lambda i, m, *_: (i, 0, 0)),
      scratch_shapes=[pltpu.VMEM((group, U, V), jnp.float32)]),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=VMEM),
    cost_estimate=pl.CostEstimate(flops=2 * M * Q * U * V, transcendentals=0,
                                  bytes_accessed=pl.cdiv(Q, group) * (x_MK.nbytes + g_MN.nbytes) + blocks_QUV.nbytes),
    name='block_sparse_matmul_wgrad',
  )(jnp.asarray(pattern.rows_Q), jnp.asarray(pattern.columns_Q), x_MK, g_MN)


def _weights_kernel(rows_Q, columns_Q, x_ref, g_ref, dw_ref, sum_ref, *, num_rows: int):
  """One tile of rows for one group of blocks."""
  i, m = pl.program_id(0), pl.program_id(1)
  (tile, _), (group, U, V) = x_ref.shape, dw_ref.shape

  @pl.when(m == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  if num_rows % tile:   # past the end a block holds anything
    for ref in (x_ref, g_ref):
      there = m * tile + lax.broadcasted_iota(jnp.int32, ref.shape, 0) < num_rows
      ref[...] = jnp.where(there, ref[...], jnp.zeros_like(ref))

  @pl.loop(0, jnp.minimum(group, rows_Q.shape[0] - i * group))
  def _(j):
    row, column = rows_Q[i * group + j], columns_Q[i * group + j]
    x = x_ref[:, pl.ds(pl.multiple_of(row * U, U), U)]
    g = g_ref[:, pl.ds(pl.multiple_of(column * V, V), V)]
    sum_ref[j] += _dot(x, g, 0, 0)

  @pl.when(m == pl.num_programs(1) - 1)
  def _():
    dw_ref[...] = sum_ref[...].astype(dw_ref.dtype)


def _dot(a, b, over_a: int, over_b: int):
  # One pass of bfloat16 would be the default for float32 too.
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, (((over_a,), (over_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
