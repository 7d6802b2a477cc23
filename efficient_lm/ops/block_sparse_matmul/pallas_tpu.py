"""The block-sparse product on a TPU: Mosaic kernels that keep a tile of rows in VMEM and stream the kept blocks through it.

Rows and their gradient: all inputs of a tile of rows lie in VMEM, so that only the blocks are read from HBM, each once for
every tile of rows. They are copied in the order in which they are multiplied, a few ahead, across columns and tiles, because
the products of a column of small blocks take less time than a copy. The next tile of rows is copied at the same time. A
column without blocks has a loop without iterations, which leaves zeros.

The gradient of the blocks: a group of them stays in VMEM as float32 while all rows stream through.

The order of the blocks is known from prefetched scalars. Blocks must be multiples of 128 x 128, the lanes of a register. On
v6e and later blocks of 256 x 256 fill the matrix unit, and smaller ones a part of it.
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


def block_sparse_matmul(x_MI, blocks_ZUV, pattern: Pattern, *, tiles: TpuTiles | None = None):
  """See the API."""
  product = differentiable(functools.partial(rows, tiles=tiles), functools.partial(weights, tiles=tiles))
  return product(x_MI, blocks_ZUV, pattern)


def refuses(x_MI, blocks_ZUV, pattern: Pattern) -> str:
  """Why these kernels cannot take such arguments, '' if they can."""
  (M, I), (_, U, V), O = x_MI.shape, blocks_ZUV.shape, pattern.shape[1] * blocks_ZUV.shape[2]
  if x_MI.dtype not in (jnp.bfloat16, jnp.float32): return f'rows are {x_MI.dtype}, neither bfloat16 nor float32'
  if U % LANES or V % LANES: return f'blocks are {U} x {V}, not multiples of {LANES} x {LANES}'
  sizes = I, O, U, V, x_MI.dtype.itemsize
  if max(tpu_tiles_for(M, *sizes).vmem(of, *sizes) for of in PASSES) > VMEM:
    return f'{I} inputs and {O} outputs of a tile of rows do not fit into VMEM'
  return ''


def rows(x_MI, blocks_ZUV, sweep: Sweep, transposed: bool = False, *, tiles: TpuTiles | None = None):
  """y_o = the sum of x_i w_z over the sweep's blocks of each output block o, or of x_i w_z^T if `transposed`."""
  (M, I), (Z, U, V), num_outputs = x_MI.shape, blocks_ZUV.shape, sweep.starts.shape[0] - 1
  read, write = (V, U) if transposed else (U, V)
  tiles = tiles or tpu_tiles_for(M, *((num_outputs * U, I) if transposed else (I, num_outputs * V)), U, V,
                                 x_MI.dtype.itemsize)
  tile = min(tiles.dgrad if transposed else tiles.forward, -(-M // 16) * 16)
  num_tiles = pl.cdiv(M, tile)
  # The kernel copies whole tiles of rows itself, so that the array must have whole tiles.
  if M % tile: x_MI = jnp.pad(x_MI, ((0, num_tiles * tile - M), (0, 0)))
  cores = 1 + (num_tiles % 2 == 0)   # On chips of two cores each has half of the rows.
  kernel = functools.partial(_rows_kernel, read=read, transposed=transposed)
  result = pl.pallas_call(
    kernel, out_shape=jax.ShapeDtypeStruct((num_tiles * tile, num_outputs * write), x_MI.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3, grid=(cores, num_tiles // cores, num_outputs),
      in_specs=[pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)],
      out_specs=pl.BlockSpec((tile, write), lambda core, m, o, *_: (core * (num_tiles // cores) + m, o)),
      scratch_shapes=[pltpu.VMEM((2, tile, I), x_MI.dtype), pltpu.VMEM((tiles.stages, U, V), blocks_ZUV.dtype),
                      pltpu.VMEM((tile, write), jnp.float32),
                      pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA((tiles.stages,))]),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary', 'arbitrary'), vmem_limit_bytes=VMEM),
    cost_estimate=pl.CostEstimate(flops=2 * M * Z * U * V, transcendentals=0,
                                  bytes_accessed=x_MI.nbytes + num_tiles * blocks_ZUV.nbytes),
    name='block_sparse_matmul_' + ('dgrad' if transposed else 'forward'),
  )(*(jnp.asarray(numbers, jnp.int32) for numbers in sweep), x_MI, blocks_ZUV)
  return result[:M]


def _rows_kernel(starts, inputs_Z, blocks_Z, x_hbm, w_hbm, y_ref, x_ref, w_ref, sum_ref, x_arrived, w_arrived, *,
                 read: int, transposed: bool):
  """Computes one output block of one tile of rows."""
  core, m, o = (pl.program_id(i) for i in range(3))
  num_tiles = pl.num_programs(1)
  num_blocks, tile, stages = blocks_Z.shape[0], x_ref.shape[1], w_ref.shape[0]

  def x_copy(m):
    first = pl.multiple_of((core * num_tiles + m) * tile, tile)
    return pltpu.make_async_copy(x_hbm.at[pl.ds(first, tile)], x_ref.at[lax.rem(m, 2)], x_arrived.at[lax.rem(m, 2)])

  def w_copy(step):
    """step: the number of blocks multiplied before, over all tiles of rows of this core."""
    slot = lax.rem(step, stages)
    return pltpu.make_async_copy(w_hbm.at[blocks_Z[lax.rem(step, num_blocks)]], w_ref.at[slot], w_arrived.at[slot])

  num_steps = num_tiles * num_blocks

  @pl.when((m == 0) & (o == 0))
  def _():
    x_copy(0).start()

    @pl.loop(0, jnp.minimum(stages - 1, num_steps))
    def _(step): w_copy(step).start()

  @pl.when(o == 0)
  def _():
    @pl.when(m + 1 < num_tiles)
    def _(): x_copy(m + 1).start()
    x_copy(m).wait()

  sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.loop(starts[o], starts[o + 1])
  def _(z):
    step = m * num_blocks + z
    @pl.when(step + stages - 1 < num_steps)
    def _(): w_copy(step + stages - 1).start()   # into the slot of the block that was multiplied last
    w_copy(step).wait()
    x = x_ref[lax.rem(m, 2), :, pl.ds(pl.multiple_of(inputs_Z[z] * read, read), read)]
    sum_ref[...] += _dot(x, w_ref[lax.rem(step, stages)], 1, int(transposed))

  y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def weights(x_MI, g_MO, blocks_ZUV, pattern: Pattern, *, tiles: TpuTiles | None = None):
  """dw_z = x_r^T g_c for the row r and the column c of each kept block."""
  (M, I), O, (Z, U, V) = x_MI.shape, g_MO.shape[1], blocks_ZUV.shape
  tiles = tiles or tpu_tiles_for(M, I, O, U, V, x_MI.dtype.itemsize)
  tile, group = min(tiles.wgrad, -(-M // 16) * 16), min(tiles.group, Z)
  return pl.pallas_call(
    functools.partial(_weights_kernel, num_rows=M),
    out_shape=jax.ShapeDtypeStruct((Z, U, V), blocks_ZUV.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2, grid=(pl.cdiv(Z, group), pl.cdiv(M, tile)),
      in_specs=[pl.BlockSpec((tile, I), lambda i, m, *_: (m, 0)), pl.BlockSpec((tile, O), lambda i, m, *_: (m, 0))],
      out_specs=pl.BlockSpec((group, U, V), lambda i, m, *_: (i, 0, 0)),
      scratch_shapes=[pltpu.VMEM((group, U, V), jnp.float32)]),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=VMEM),
    cost_estimate=pl.CostEstimate(flops=2 * M * Z * U * V, transcendentals=0,
                                  bytes_accessed=pl.cdiv(Z, group) * (x_MI.nbytes + g_MO.nbytes) + blocks_ZUV.nbytes),
    name='block_sparse_matmul_wgrad',
  )(jnp.asarray(pattern.rows_Z), jnp.asarray(pattern.columns_Z), x_MI, g_MO)


def _weights_kernel(rows_Z, columns_Z, x_ref, g_ref, dw_ref, sum_ref, *, num_rows: int):
  """Adds the products of one tile of rows to one group of blocks."""
  i, m = pl.program_id(0), pl.program_id(1)
  (tile, _), (group, U, V) = x_ref.shape, dw_ref.shape

  @pl.when(m == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  if num_rows % tile:   # Past the last row the buffers hold arbitrary numbers.
    for ref in (x_ref, g_ref):
      there = m * tile + lax.broadcasted_iota(jnp.int32, ref.shape, 0) < num_rows
      ref[...] = jnp.where(there, ref[...], jnp.zeros_like(ref))

  @pl.loop(0, jnp.minimum(group, rows_Z.shape[0] - i * group))
  def _(j):
    row, column = rows_Z[i * group + j], columns_Z[i * group + j]
    x = x_ref[:, pl.ds(pl.multiple_of(row * U, U), U)]
    g = g_ref[:, pl.ds(pl.multiple_of(column * V, V), V)]
    sum_ref[j] += _dot(x, g, 0, 0)

  @pl.when(m == pl.num_programs(1) - 1)
  def _():
    dw_ref[...] = sum_ref[...].astype(dw_ref.dtype)


def _dot(a, b, over_a: int, over_b: int):
  # The default precision of float32 would be one pass of bfloat16.
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, (((over_a,), (over_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
