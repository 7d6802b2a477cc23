"""Quantized products on Hopper: Mosaic GPU kernels that read the weight at its stored size.

There are three kernels, chosen by the number of rows and by the dtype of what is multiplied.

Few rows (up to 64): the time is that of reading the weight. Its outputs are the 64 rows of the tensor core's instruction,
and the rows of x are the 8 to 64 columns, so that no part of the instruction computes rows that do not exist. A block of
threads has 64 outputs and a part of the inputs. Blocks are small, so that several share a multiprocessor and one waits for
memory while another computes, and there are at least as many as multiprocessors. With a single part and a float x, this
kernel is the only launch: the copies fill missing rows with zeros. Several parts are summed by XLA, in float32 or int32,
which is one launch more. Packed numbers are converted in registers.

Many rows, rounded: the time is that of the tensor cores. In each persistent block two warpgroups multiply and one copies,
over tiles in an order that keeps operands in the L2 cache. The copies run ahead across tiles, so that they continue while
results are scaled and stored. The blocks of a cluster share the tile of the weight. Packed numbers are unpacked by XLA
beforehand, which is little work beside such a product.

Many rows of a float x: the same frame. The weight goes from shared memory to registers, is converted to bfloat16 and scaled
there, and is the instruction's left operand; results leave transposed. The blocks of a cluster share the tile of x.

None of these kernels has run on a device. They are interpreted in tests and compile for an H200 without spills.

The frame follows the Hopper kernels of jax.experimental.pallas.ops.gpu. Beside the letters of matrices, P counts planes of
packed numbers and S parts of the inputs.
"""
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from efficient_lm.ops import dispatch
from efficient_lm.ops.packing import as_int4
from efficient_lm.ops.quantized_matmul.storage import QuantizedMatrix, integers, quantize_rows
from efficient_lm.ops.quantized_matmul.tiles import FewTiles, GpuTiles, gpu_tiles
from efficient_lm.ops.quantized_matmul.xla import split

WGMMA = plgpu.Layout.WGMMA
OUTPUTS = 64   # rows of the tensor core's instruction
WIDENED = 64   # inputs of the weight that are in registers at a time
CHUNK = 64     # columns of the result that pass through shared memory at a time
ROWS = 32      # rows of the result that pass through shared memory at a time, where results are transposed on the way


def quantized_matmul(x_MI, w: QuantizedMatrix, activations: str | None = None, *, tiles: FewTiles | GpuTiles | None = None):
  """See the API."""
  tiles = tiles or gpu_tiles(x_MI.shape[0], w, activations)
  if isinstance(tiles, FewTiles): return _few_rows(x_MI, w, activations, tiles)
  if activations is None: return _dequantized(x_MI, w, tiles)
  return _rounded(x_MI, w, activations, tiles)


def refuses(x_MI, w: QuantizedMatrix, activations: str | None = None, *, tiles: FewTiles | GpuTiles | None = None) -> str:
  """Why these kernels cannot take such arguments, '' if they can."""
  if jax.__version_info__ < (0, 11): return 'it needs jax 0.11'
  O, I = w.shape
  if x_MI.dtype != jnp.bfloat16: return f'x is {x_MI.dtype}, not bfloat16'
  if x_MI.shape[0] == 0: return 'there is nothing to multiply'
  if w.zero_QO is not None: return 'there are zero points'
  if O % OUTPUTS or I % 128: return f'{O} outputs and {I} inputs are no multiples of {OUTPUTS} and 128'
  if activations is None:
    if w.values.dtype == jnp.float8_e4m3fn: return 'a float8 weight needs float8 activations'
    if w.bits == 2: return 'weights of 2 bits need rounded activations'
    if w.group != I and (w.group % 64 or 128 % min(w.group, 128) or (w.group > 128 and w.group % 128)):
      return f'groups of {w.group} inputs are neither 64 nor a multiple of 128'
  elif w.scale_QO.shape[0] > 1: return 'rounded activations need one scale an output, not groups'
  if gpu_tiles(x_MI.shape[0], w, activations) is None: return f'no tiles fit {O} outputs and {I} inputs'
  return ''


def _stored(w: QuantizedMatrix):
  """The weight as the kernels read it, (O, I): int4, which is a view of the packed bytes, or numbers of 8 bits."""
  return as_int4(w.values) if w.bits == 4 else w.values


def _swizzled(width: int, dtype) -> tuple:
  """The layout of tiles of `width` numbers a row in shared memory, as the tensor cores read them."""
  bits = 4 if dtype == jnp.int4 else jnp.dtype(dtype).itemsize * 8
  swizzle = plgpu.find_swizzle(width * bits)
  return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def _widened(w_smem, scale_O=None):
  """A tile of the weight in registers, as bfloat16 in the layout of the left operand; times scales, if given."""
  layout = plgpu.Layout.WGMMA_UPCAST_4X if w_smem.dtype == jnp.int4 else plgpu.Layout.WGMMA_UPCAST_2X
  w = plgpu.layout_cast(plgpu.load(w_smem, layout=layout), WGMMA).astype(jnp.bfloat16)
  return w if scale_O is None else w * lax.broadcast_in_dim(scale_O, w.shape, [0])


def _row(scale_ref):
  """One number for each row of the tensor core's result."""
  return plgpu.load(scale_ref, layout=WGMMA.reduce(1), optimized=False)


def _few_packed_rows(x_MI, w: QuantizedMatrix, tiles: FewTiles):
  """int8 times packed integers. Planes are masked out of the bytes without a shift: plane p then holds 2 ** (bits * p) times
  its number plus, in all planes but the topmost, an offset that makes the number positive. The sums are multiples of that
  factor, so that shifting them, and subtracting the offset times the sum of x, is exact."""
  (M, I), O = x_MI.shape, w.shape[0]
  rows, per_byte, offset = max(8, 1 << (M - 1).bit_length()), 8 // w.bits, 2 ** (w.bits - 1)
  q_MI, scale_M1 = quantize_rows(x_MI)
  x_PMI = jnp.pad(jnp.stack(split(q_MI, w.bits)), ((0, 0), (0, rows - M), (0, 0)))
  width = tiles.I // per_byte
  steps = I // tiles.I // tiles.parts

  def kernel(x_gmem, w_gmem, y_gmem):
    o, part = lax.axis_index('outputs'), lax.axis_index('part')
    first = part * steps

    def accumulate(*sums):
      def step(_, *blocks):
        *x_smem, w_smem = blocks
        packed = plgpu.load(w_smem, layout=plgpu.Layout.WGMMA_8BIT)
        for p, acc in enumerate(sums): plgpu.wgmma(acc, _plane(packed, p, w.bits), x_smem[p].T)
        plgpu.wgmma_wait(0)
        plgpu.commit_smem()   # All reads are done before the next copy overwrites the buffer.
      specs = [plgpu.BlockSpec((rows, width), lambda i: (0, first + i), transforms=_swizzled(width, jnp.int8))] * per_byte
      specs.append(plgpu.BlockSpec((OUTPUTS, width), lambda i: (o, first + i), transforms=_swizzled(width, jnp.int8)))
      plgpu.emit_pipeline(step, grid=(steps,), in_specs=specs, max_concurrent_steps=min(tiles.stages, steps))(
        *[x_gmem.at[p] for p in range(per_byte)], w_gmem)
      total = sums[0][...]
      for p, acc in enumerate(sums[1:], 1): total += lax.shift_right_arithmetic(acc[...], w.bits * p)
      return total

    y_gmem[part, pl.ds(o * OUTPUTS, OUTPUTS)] = pl.run_scoped(
      accumulate, *[plgpu.ACC((OUTPUTS, rows), jnp.int32)] * per_byte)

  parts_SOM = plgpu.kernel(
    kernel, out_type=jax.ShapeDtypeStruct((tiles.parts, O, rows), jnp.int32), grid=(O // OUTPUTS, tiles.parts),
    grid_names=('outputs', 'part'), kernel_name=f'quantized_matmul_few_w{w.bits}',
  )(x_PMI, lax.bitcast_convert_type(w.values, jnp.int8))
  offsets_M = offset * jnp.sum(x_PMI[:-1, :M], axis=(0, 2), dtype=jnp.int32)
  y_OM = (jnp.sum(parts_SOM, axis=0)[:, :M] - offsets_M).astype(jnp.float32)
  return (y_OM.T * scale_M1 * w.scale_QO).astype(x_MI.dtype)


def _plane(packed, p: int, bits: int):
  """The numbers v of plane p in their places in int8: v * 2 ** (bits * p) in the topmost plane, and (v + 2 ** (bits - 1)) *
  2 ** (bits * p) in the others."""
  mask = ((2 ** bits - 1) << (bits * p)) - (256 if bits * (p + 1) == 8 else 0)
  if bits * (p + 1) < 8: packed = packed ^ jnp.int8(1 << (bits * p + bits - 1))
  return packed & jnp.int8(mask)


def _few_rows(x_MI, w: QuantizedMatrix, activations: str | None, tiles: FewTiles):
  """Few rows: one kernel computes the result, or the sums of each part of the inputs, which XLA adds, scales and
  transposes."""
  if activations and w.bits < 8: return _few_packed_rows(x_MI, w, tiles)
  (M, I), O = x_MI.shape, w.shape[0]
  rows = max(8, 1 << (M - 1).bit_length())
  if activations is None:
    operands, sums = [x_MI, _stored(w)], jnp.float32
    # The copies fill missing rows with zeros, but only whole groups of eight.
    if M > 8 and M % 8: operands[0] = jnp.pad(x_MI, ((0, -M % 8), (0, 0)))
  else:
    q_MI, scale_M1 = quantize_rows(jnp.pad(x_MI, ((0, rows - M), (0, 0))), jnp.dtype(activations))
    operands, sums = [q_MI, w.values], jnp.int32 if activations == 'int8' else jnp.float32
  grouped, finish = activations is None and w.group != I, tiles.parts == 1
  if grouped: operands.append(w.scale_QO.astype(jnp.float32))
  elif finish: operands.append(w.scale_QO[0].astype(jnp.float32))
  if finish and activations: operands.append(scale_M1[:, 0])
  body = functools.partial(_few_rows_kernel, rows=rows, inputs=I, tiles=tiles, group=w.group if grouped else None, sums=sums)
  shape = (M if M <= 8 else -(-M // 8) * 8, O) if finish else (tiles.parts, O, rows)
  found = plgpu.kernel(
    body, out_type=jax.ShapeDtypeStruct(shape, x_MI.dtype if finish else sums), grid=(O // OUTPUTS, tiles.parts),
    grid_names=('outputs', 'part'), kernel_name=f'quantized_matmul_few_w{w.bits}',
    scratch_types=[plgpu.SMEM((rows, OUTPUTS), x_MI.dtype, transforms=_swizzled(OUTPUTS, x_MI.dtype))] if finish else [],
  )(*operands)
  if finish: return found[:M]
  y_OM = jnp.sum(found, axis=0)[:, :M].astype(jnp.float32)
  if not grouped: y_OM *= w.scale_QO[0, :, None]
  return (y_OM.T if activations is None else y_OM.T * scale_M1[:M]).astype(x_MI.dtype)


def _few_rows_kernel(x_gmem, w_gmem, *refs, rows: int, inputs: int, tiles: FewTiles, group: int | None, sums):
  """64 outputs of one part of the inputs.

  refs: the scales (Q, O) if they are by group. Then, if there is a single part: the scales of outputs if they are not by
  group, the scales of rows if x is rounded, the result (M, O), and shared memory for a piece of it. If there are several
  parts: their sums (parts, O, rows).
  """
  scale_gmem, others = ([refs[0]], refs[1:]) if group else ([], refs)
  o, part = lax.axis_index('outputs'), lax.axis_index('part')
  steps = inputs // tiles.I // tiles.parts
  chunk = min(group or tiles.I, tiles.I)
  first = part * steps
  # A constant slice must not exceed the array; a computed one may, and copies fill its missing rows with zeros.
  top = 0 * o
  specs = [
    plgpu.BlockSpec((rows, tiles.I), lambda i: (top, first + i), transforms=_swizzled(chunk, x_gmem.dtype)),
    plgpu.BlockSpec((OUTPUTS, tiles.I), lambda i: (o, first + i), transforms=_swizzled(chunk, w_gmem.dtype))]
  if group:
    specs.append(plgpu.BlockSpec((tiles.I // chunk, OUTPUTS), lambda i: ((first + i) * tiles.I // max(group, tiles.I), o)))
  pipeline = functools.partial(plgpu.emit_pipeline, grid=(steps,), in_specs=specs,
                               max_concurrent_steps=min(tiles.stages, steps))
  step = functools.partial(_few_rows_step, chunk=chunk, rows=rows)
  if group:
    zeros = plgpu.layout_cast(jnp.zeros((OUTPUTS, rows), jnp.float32), WGMMA)
    y_OM = pipeline(step, init_carry=zeros)(x_gmem, w_gmem, *scale_gmem)
  else:
    def accumulate(acc):
      pipeline(functools.partial(step, acc=acc))(x_gmem, w_gmem)
      return acc[...]
    y_OM = pl.run_scoped(accumulate, plgpu.ACC((OUTPUTS, rows), sums))
  outputs = pl.ds(o * OUTPUTS, OUTPUTS)
  if tiles.parts > 1: others[0][part, outputs] = y_OM
  else: _finish_few(y_OM.astype(jnp.float32), *others, outputs, top)


def _finish_few(y_OM, *refs):
  """Scales the sums and stores the rows. refs: the scales of outputs and of rows that are still to be applied, the result,
  shared memory, the slice of the outputs, and the first row."""
  *scales, y_gmem, y_smem, outputs, top = refs
  if scales: y_OM *= lax.broadcast_in_dim(_row(scales[0].at[outputs]), y_OM.shape, [0])
  if len(scales) > 1:
    scale_M = plgpu.load(scales[1], layout=WGMMA.reduce(0), optimized=False)
    y_OM *= lax.broadcast_in_dim(scale_M, y_OM.shape, [1])
  y_smem.T[...] = plgpu.layout_cast(y_OM.astype(y_smem.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[pl.ds(top, y_smem.shape[0]), outputs])
  plgpu.wait_smem_to_gmem(0)


def _few_rows_step(_, x_smem, w_smem, *refs, chunk: int, rows: int, acc=None):
  """A step over the inputs. refs: if each chunk has its own scales, these and the float32 sums so far. The scale multiplies
  the float32 sums of a chunk, so that only these sums are rounded."""
  def operand(chunk_I):
    tile = w_smem.at[:, chunk_I]
    return tile if x_smem.dtype == w_smem.dtype else _widened(tile)

  chunks = [pl.ds(start, chunk) for start in range(0, w_smem.shape[1], chunk)]
  if acc is not None:
    for chunk_I in chunks: plgpu.wgmma(acc, operand(chunk_I), x_smem.at[:, chunk_I].T)
    plgpu.wgmma_wait(0)
    if x_smem.dtype != w_smem.dtype: plgpu.commit_smem()   # All reads are done before the next copy overwrites the buffer.
    return None
  scale_smem, sums = refs

  def multiply(*products):
    for chunk_I, product in zip(chunks, products): plgpu.wgmma(product, operand(chunk_I), x_smem.at[:, chunk_I].T)
    plgpu.wgmma_wait(0)
    total = sums
    for i, product in enumerate(products):
      scale_O = _row(scale_smem.at[i])
      total += product[...] * lax.broadcast_in_dim(scale_O, (OUTPUTS, rows), [0])
    plgpu.commit_smem()   # All reads are done before the next copy overwrites the buffer.
    return total

  return pl.run_scoped(multiply, *[plgpu.ACC((OUTPUTS, rows), jnp.float32)] * len(chunks))


def _rounded(x_MI, w: QuantizedMatrix, activations: str, tiles: GpuTiles):
  """Many rows, rounded: int8 times int8 or float8 times float8. The sums are scaled in registers."""
  (M, I), O = x_MI.shape, w.shape[0]
  q_MI, scale_M1 = quantize_rows(x_MI, jnp.dtype(activations))
  missing = -M % (tiles.M * tiles.cluster)
  q_MI, scale_M = jnp.pad(q_MI, ((0, missing), (0, 0))), jnp.pad(scale_M1[:, 0], (0, missing))
  q_OI, half = integers(w), tiles.M // 2   # rows of a warpgroup

  def multiply(acc, x_smem, w_smem, warpgroup):
    plgpu.wgmma(acc, x_smem.at[pl.ds(warpgroup * half, half)], w_smem.T)

  def finish(acc, scale_M_gmem, scale_O_gmem, y_gmem, y_smem, m, o, warpgroup):
    rows_M = pl.ds(m * tiles.M + warpgroup * half, half)
    scale_M = _row(scale_M_gmem.at[rows_M])
    for i in range(tiles.O // CHUNK):
      columns_O = pl.ds(o * tiles.O + i * CHUNK, CHUNK)
      scale_O = plgpu.load(scale_O_gmem.at[columns_O], layout=WGMMA.reduce(0), optimized=False)
      y = acc[:, i * CHUNK:(i + 1) * CHUNK].astype(jnp.float32)
      y *= lax.broadcast_in_dim(scale_M, y.shape, [0]) * lax.broadcast_in_dim(scale_O, y.shape, [1])
      _store(y_smem.at[warpgroup], y.astype(y_smem.dtype), y_gmem.at[rows_M, columns_O], i, tiles.O // CHUNK)

  product = Product(
    [Staged(q_MI, (tiles.M, tiles.I), lambda m, o, i: (m, i), _swizzled(tiles.I, q_MI.dtype)),
     Staged(q_OI, (tiles.O, tiles.I), lambda m, o, i: (o, i), _swizzled(tiles.I, q_OI.dtype), tiles.cluster > 1)],
    multiply, finish, tiles, plgpu.ACC((half, tiles.O), jnp.int32 if activations == 'int8' else jnp.float32),
    steps=I // tiles.I, along=0)
  y_MO = product([scale_M, w.scale_QO[0].astype(jnp.float32)], jax.ShapeDtypeStruct((q_MI.shape[0], O), x_MI.dtype),
                 (half, CHUNK))
  return y_MO[:M]


def _dequantized(x_MI, w: QuantizedMatrix, tiles: GpuTiles):
  """Many rows of floats: bfloat16 times a weight that is converted in registers. Scales of groups are rounded to bfloat16
  and multiply the weight there; scales of outputs multiply the sums."""
  (M, I), O = x_MI.shape, w.shape[0]
  x_MI = jnp.pad(x_MI, ((0, -M % tiles.M), (0, 0)))
  half = tiles.O // 2   # outputs of a warpgroup
  grouped, scale_QO = w.group != I, w.scale_QO.astype(jnp.bfloat16 if w.group != I else jnp.float32)
  chunk = min(w.group, WIDENED)

  def multiply(acc, x_smem, w_smem, *refs):
    *scale_smem, warpgroup = refs
    outputs = pl.ds(warpgroup * half, half)
    for start in range(0, tiles.I, chunk):
      inputs = pl.ds(start, chunk)
      scale_O = None
      if grouped: scale_O = _row(scale_smem[0].at[start // min(w.group, tiles.I), outputs])
      # This chunk is converted while the product of the previous one runs.
      plgpu.wgmma(acc, _widened(w_smem.at[outputs, inputs], scale_O), x_smem.at[:, inputs].T)
    plgpu.commit_smem()   # All reads are done before the next copy overwrites the buffer.

  def finish(acc, *refs):
    *scale_gmem, y_gmem, y_smem, m, o, warpgroup = refs
    outputs = pl.ds(o * tiles.O + warpgroup * half, half)
    if not grouped: scale_O = _row(scale_gmem[0].at[outputs])
    for i in range(tiles.M // ROWS):
      y = acc[:, i * ROWS:(i + 1) * ROWS]
      if not grouped: y *= lax.broadcast_in_dim(scale_O, y.shape, [0])
      y = plgpu.layout_cast(y.astype(y_smem.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
      rows_M = pl.ds(m * tiles.M + i * ROWS, ROWS)
      _store(y_smem.at[warpgroup], y, y_gmem.at[rows_M, outputs], i, tiles.M // ROWS, transposed=True)

  stored = _stored(w)
  staged = [Staged(x_MI, (tiles.M, tiles.I), lambda m, o, i: (m, i), _swizzled(chunk, x_MI.dtype), tiles.cluster > 1),
            Staged(stored, (tiles.O, tiles.I), lambda m, o, i: (o, i), _swizzled(chunk, stored.dtype))]
  if grouped:
    per_step = max(tiles.I // w.group, 1)
    staged.append(Staged(scale_QO, (per_step, tiles.O), lambda m, o, i: (i * tiles.I // w.group // per_step, o), ()))
  product = Product(staged, multiply, finish, tiles, plgpu.ACC((half, tiles.M), jnp.float32), steps=I // tiles.I, along=1,
                    in_flight=0)
  y_MO = product([] if grouped else [scale_QO[0]], jax.ShapeDtypeStruct((x_MI.shape[0], O), x_MI.dtype), (ROWS, half))
  return y_MO[:M]


def _store(y_smem, y, y_gmem, piece: int, pieces: int, transposed: bool = False):
  """Stores a piece of the result through one of two buffers in turn, after the previous store from that buffer has read
  it."""
  # After an odd number of pieces, the next tile of the result begins with the buffer that was used last.
  plgpu.wait_smem_to_gmem(0 if piece == 0 and pieces % 2 else 1, wait_read_only=True)
  tile_smem = y_smem.at[piece % 2]
  if transposed: tile_smem.T[...] = y
  else: tile_smem[...] = y
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(tile_smem, y_gmem)


@dataclasses.dataclass(frozen=True)
class Staged:
  """An operand of which each step has a block in shared memory.

  index: (m, o, i) -> the block's index in each dimension. multicast: whether the blocks of threads of a cluster read the
    same block of the operand, so that each copies a part of it to all.
  """
  array: jax.Array
  block: tuple[int, int]
  index: Callable
  transforms: tuple
  multicast: bool = False

  def copy(self, gmem, smem, barrier, place: tuple):
    """Starts the copy of the block at (m, o, i), whose arrival the barrier signals."""
    here = tuple(pl.ds(i * size, size) for i, size in zip(self.index(*place), self.block))
    plgpu.copy_gmem_to_smem(gmem.at[here], smem, barrier, collective_axes='cluster' if self.multicast else None)


@dataclasses.dataclass(frozen=True)
class Product:
  """A product over tiles (m, o) of the result. Two warpgroups multiply and finish tiles; a third copies what they read, and
  continues with the next tile of the result while the others finish the last one.

  staged: the operands of which each step reads a block. steps: the number of steps. acc: the sums of one warpgroup.
  multiply: (acc, *blocks of a step, warpgroup). finish: (sums of a tile, *other operands, y_gmem, y_smem, m, o, warpgroup).
  along: the dim of the result along which the blocks of a cluster are neighbours.
  in_flight: products that may still run when the next step begins. The blocks of a step are freed so many steps later.
  """
  staged: list[Staged]
  multiply: Callable
  finish: Callable
  tiles: GpuTiles
  acc: plgpu.ACC
  steps: int
  along: int
  in_flight: int = 1

  def __call__(self, others: list, y, y_tile: tuple[int, int]):
    """The result, of the shape and dtype of y, which is stored in pieces of y_tile."""
    tiles, cluster = self.tiles, [1, 1]
    cluster[self.along] = self.tiles.cluster
    grid = y.shape[0] // tiles.M // cluster[0], y.shape[1] // tiles.O // cluster[1]   # of clusters
    buffers = [plgpu.SMEM((tiles.stages, *operand.block), operand.array.dtype, transforms=operand.transforms)
               for operand in self.staged]
    empty = functools.partial(plgpu.ClusterBarrier, collective_axes=('cluster',)) if tiles.cluster > 1 else plgpu.Barrier
    return plgpu.kernel(
      functools.partial(self._kernel, grid=grid, cluster=cluster, num_others=len(others)), out_type=y,
      grid=(min((dispatch.device().num_cores or 132) // tiles.cluster, grid[0] * grid[1]),), grid_names=('block',),
      cluster=(tiles.cluster,), cluster_names=('cluster',), num_threads=3, thread_name='warpgroup',
      kernel_name='quantized_matmul', scratch_types=[
        *buffers, plgpu.SMEM((2, 2, *y_tile), y.dtype, transforms=_swizzled(y_tile[1], y.dtype)),
        plgpu.Barrier(num_arrivals=len(self.staged), num_barriers=tiles.stages),
        empty(num_arrivals=2, num_barriers=tiles.stages)],
    )(*(operand.array for operand in self.staged), *others)

  def _kernel(self, *refs, grid, cluster, num_others: int):
    staged_gmem, others_gmem, (y_gmem, *scratch) = _cut(refs, len(self.staged), num_others)
    staged_smem, (y_smem, full, empty) = _cut(scratch, len(self.staged))
    warpgroup, peer = lax.axis_index('warpgroup'), lax.axis_index('cluster')

    def walk(visit):
      """Calls visit(m, o, number of steps before) for each tile of this block; returns the number of all steps."""
      @plgpu.nd_loop((grid[0] * grid[1],), collective_axes='block', init_carry=jnp.int32(0))
      def total(loop, carry):
        m, o = plgpu.planar_snake(loop.index[0], grid, 0, self.tiles.band)
        visit(*((m * cluster[0] + peer, o) if self.along == 0 else (m, o * cluster[1] + peer)), carry)
        return carry + self.steps
      return total

    @pl.when(warpgroup == 2)
    def _():
      plgpu.set_max_registers(40, action='decrease')
      total = walk(lambda m, o, before: self._copy(staged_gmem, staged_smem, full, empty, m, o, before))
      # A block must not end before its neighbour in the cluster has arrived at the block's barriers.
      for last in range(1, self.tiles.stages + 1):
        pl.when(total >= last)(lambda: plgpu.barrier_wait(empty.at[lax.rem(total - last, self.tiles.stages)]))

    @pl.when(warpgroup < 2)
    def _():
      plgpu.set_max_registers(232, action='increase')
      def visit(m, o, before):
        sums = self._sums(staged_smem, full, empty, before, warpgroup)
        self.finish(sums, *others_gmem, y_gmem, y_smem, m, o, warpgroup)
      walk(visit)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  def _copy(self, staged_gmem, staged_smem, full, empty, m, o, before):
    """Starts the copies of each step of a tile as soon as their buffers are free."""
    @pl.loop(0, self.steps)
    def _(i):
      slot = lax.rem(before + i, self.tiles.stages)
      pl.when(before + i >= self.tiles.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
      for operand, gmem, smem in zip(self.staged, staged_gmem, staged_smem):
        operand.copy(gmem, smem.at[slot], full.at[slot], (m, o, i))

  def _sums(self, staged_smem, full, empty, before, warpgroup):
    """The sums of a warpgroup over the steps of a tile."""
    def accumulate(acc_ref):
      @pl.loop(0, self.steps)
      def _(i):
        slot = lax.rem(before + i, self.tiles.stages)
        plgpu.barrier_wait(full.at[slot])
        self.multiply(acc_ref, *[smem.at[slot] for smem in staged_smem], warpgroup)
        plgpu.wgmma_wait(self.in_flight)
        done = i - self.in_flight
        pl.when(done >= 0)(lambda: plgpu.barrier_arrive(empty.at[lax.rem(before + done, self.tiles.stages)]))
      plgpu.wgmma_wait(0)
      if self.in_flight: plgpu.barrier_arrive(empty.at[lax.rem(before + self.steps - 1, self.tiles.stages)])
      return acc_ref[...]
    return pl.run_scoped(accumulate, self.acc)


def _cut(refs, *counts: int) -> tuple:
  """Lists of the first counts[0] of the refs, the next counts[1], …, and the rest."""
  refs, parts = list(refs), []
  for count in counts: parts.append([refs.pop(0) for _ in range(count)])
  return *parts, refs
