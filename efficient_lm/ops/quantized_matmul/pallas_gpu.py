"""Quantized products on Hopper: Mosaic GPU kernels that read the weight at its stored size.

Three kernels, chosen by the number of rows and by what is multiplied.

Few rows (up to 64): bound by reading the weight. Its outputs are the 64 rows of the tensor core's instruction and the rows
of x its 8 to 64 columns, so that nothing of the instruction is wasted on rows that are not there. A block owns 64 outputs
and a part of the inputs; blocks are small, so that several share a multiprocessor and one waits for memory while another
works, and there are at least as many as multiprocessors. Without parts that is all that is launched, if x is not rounded:
missing rows are zeros that the copies put in; parts are summed by XLA, in float32 or int32, which is one launch more. Packed
numbers are widened in registers.

Many rows, rounded: bound by the tensor cores. Persistent blocks of two warpgroups that multiply and one that copies, over
tiles in an order that keeps operands in the L2 cache; copying runs ahead across tiles, so that it goes on while results are
scaled and stored. The blocks of a cluster share the tile of the weight. Packed numbers are unpacked by XLA beforehand, which
is little work beside such a product.

Many rows of a float x: the same frame. The weight goes from shared memory to registers, is widened to bfloat16 and scaled
there, and is the instruction's left operand; results leave transposed. The blocks of a cluster share the tile of x.

Nothing here has run on a device: compiled for an H200 without spills, and interpreted.

After the Hopper kernels of jax.experimental.pallas.ops.gpu, from which the frame is known.
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
from efficient_lm.ops.quantized_matmul.storage import QuantizedMatrix, integers, quantize_rows
from efficient_lm.ops.quantized_matmul.tiles import FewTiles, GpuTiles, gpu_tiles
from efficient_lm.ops.quantized_matmul.xla import split

WGMMA = plgpu.Layout.WGMMA
OUTPUTS = 64   # rows of the tensor core's instruction
WIDENED = 64   # inputs of the weight that are in registers at a time
CHUNK = 64     # columns of the result that pass through shared memory at a time,
TURNED = 32    # and rows, where results are transposed on the way


def quantized_matmul(x_MK, w: QuantizedMatrix, activations: str | None = None, *, tiles: FewTiles | GpuTiles | None = None):
  """See the API."""
  tiles = tiles or gpu_tiles(x_MK.shape[0], w, activations)
  if isinstance(tiles, FewTiles): return _few_rows(x_MK, w, activations, tiles)
  if activations is None: return _dequantized(x_MK, w, tiles)
  return _rounded(x_MK, w, activations, tiles)


def refuses(x_MK, w: QuantizedMatrix, activations: str | None = None, *, tiles: FewTiles | GpuTiles | None = None) -> str:
  """Why these kernels cannot take such arguments, '' if they can."""
  if jax.__version_info__ < (0, 11): return 'it needs jax 0.11'
  N, K = w.shape
  if x_MK.dtype != jnp.bfloat16: return f'x is {x_MK.dtype}, not bfloat16'
  if x_MK.shape[0] == 0: return 'there is nothing to multiply'
  if w.zero_QN is not None: return 'there are zero points'
  if N % OUTPUTS or K % 128: return f'{N} outputs and {K} inputs are no multiples of {OUTPUTS} and 128'
  if activations is None:
    if w.values.dtype == jnp.float8_e4m3fn: return 'a float8 weight needs float8 activations'
    if w.bits == 2: return 'weights of 2 bits need rounded activations'
    if w.group != K and (w.group % 64 or 128 % min(w.group, 128) or (w.group > 128 and w.group % 128)):
      return f'groups of {w.group} inputs are neither 64 nor a multiple of 128'
  elif w.scale_QN.shape[0] > 1: return 'rounded activations need one scale an output, not groups'
  if gpu_tiles(x_MK.shape[0], w, activations) is None: return f'no tiles fit {N} outputs and {K} inputs'
  return ''


def _stored(w: QuantizedMatrix):
  """The weight as the kernels read it: (N, K) of int4, a view of the packed bytes, or of 8 bits."""
  return lax.bitcast_convert_type(w.values, jnp.int4).reshape(w.shape) if w.bits == 4 else w.values


def _swizzled(width: int, dtype) -> tuple:
  """Transforms of shared memory for tiles of `width` numbers a row, as the tensor cores want them."""
  bits = 4 if dtype == jnp.int4 else jnp.dtype(dtype).itemsize * 8
  swizzle = plgpu.find_swizzle(width * bits)
  return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def _widened(w_smem, scale_N=None):
  """A tile of outputs and inputs in registers, as bfloat16, laid out as the left operand; times scales, if given."""
  layout = plgpu.Layout.WGMMA_UPCAST_4X if w_smem.dtype == jnp.int4 else plgpu.Layout.WGMMA_UPCAST_2X
  w = plgpu.layout_cast(plgpu.load(w_smem, layout=layout), WGMMA).astype(jnp.bfloat16)
  return w if scale_N is None else w * lax.broadcast_in_dim(scale_N, w.shape, [0])


def _row(scale_ref):
  """One number for each row of the tensor core's result."""
  return plgpu.load(scale_ref, layout=WGMMA.reduce(1), optimized=False)


def _few_packed_rows(x_MK, w: QuantizedMatrix, tiles: FewTiles):
  """int8 times packed integers: planes are cut out of the bytes where they lie. Without a shift, plane p holds
  2 ** (bits * p) times its number plus, in all but the topmost, an offset that makes it positive; sums of both are
  multiples, so that shifting the sums and taking the offset times the sum of x away is exact."""
  (M, K), N = x_MK.shape, w.shape[0]
  rows, per_byte, offset = max(8, 1 << (M - 1).bit_length()), 8 // w.bits, 2 ** (w.bits - 1)
  q_MK, scale_M1 = quantize_rows(x_MK)
  x_PMK = jnp.pad(jnp.stack(split(q_MK, w.bits)), ((0, 0), (0, rows - M), (0, 0)))
  width = tiles.K // per_byte
  steps = K // tiles.K // tiles.parts

  def kernel(x_gmem, w_gmem, y_gmem):
    n, part = lax.axis_index('outputs'), lax.axis_index('part')
    first = part * steps

    def accumulate(*sums):
      def step(_, *blocks):
        *x_smem, w_smem = blocks
        packed = plgpu.load(w_smem, layout=plgpu.Layout.WGMMA_8BIT)
        for p, acc in enumerate(sums): plgpu.wgmma(acc, _plane(packed, p, w.bits), x_smem[p].T)
        plgpu.wgmma_wait(0)
        plgpu.commit_smem()   # what was read may be overwritten by the next copy
      specs = [plgpu.BlockSpec((rows, width), lambda k: (0, first + k), transforms=_swizzled(width, jnp.int8))] * per_byte
      specs.append(plgpu.BlockSpec((OUTPUTS, width), lambda k: (n, first + k), transforms=_swizzled(width, jnp.int8)))
      plgpu.emit_pipeline(step, grid=(steps,), in_specs=specs, max_concurrent_steps=min(tiles.stages, steps))(
        *[x_gmem.at[p] for p in range(per_byte)], w_gmem)
      total = sums[0][...]
      for p, acc in enumerate(sums[1:], 1): total += lax.shift_right_arithmetic(acc[...], w.bits * p)
      return total

    y_gmem[part, pl.ds(n * OUTPUTS, OUTPUTS)] = pl.run_scoped(
      accumulate, *[plgpu.ACC((OUTPUTS, rows), jnp.int32)] * per_byte)

  parts_SNM = plgpu.kernel(
    kernel, out_type=jax.ShapeDtypeStruct((tiles.parts, N, rows), jnp.int32), grid=(N // OUTPUTS, tiles.parts),
    grid_names=('outputs', 'part'), kernel_name=f'quantized_matmul_few_w{w.bits}',
  )(x_PMK, lax.bitcast_convert_type(w.values, jnp.int8))
  offsets_M = offset * jnp.sum(x_PMK[:-1, :M], axis=(0, 2), dtype=jnp.int32)
  y_NM = (jnp.sum(parts_SNM, axis=0)[:, :M] - offsets_M).astype(jnp.float32)
  return (y_NM.T * scale_M1 * w.scale_QN).astype(x_MK.dtype)


def _plane(packed, p: int, bits: int):
  """int8 numbers of plane p where they lie: v * 2 ** (bits * p), and that of v + 2 ** (bits - 1) in all but the topmost."""
  mask = ((2 ** bits - 1) << (bits * p)) - (256 if bits * (p + 1) == 8 else 0)
  if bits * (p + 1) < 8: packed = packed ^ jnp.int8(1 << (bits * p + bits - 1))
  return packed & jnp.int8(mask)


def _few_rows(x_MK, w: QuantizedMatrix, activations: str | None, tiles: FewTiles):
  """One kernel, or one that leaves partial sums of each part of the inputs, which XLA adds up, scales and transposes."""
  if activations and w.bits < 8: return _few_packed_rows(x_MK, w, tiles)
  (M, K), N = x_MK.shape, w.shape[0]
  rows = max(8, 1 << (M - 1).bit_length())
  if activations is None:
    operands, sums = [x_MK, _stored(w)], jnp.float32
    # The copies put in the rows that are missing, but not in the middle of eight.
    if M > 8 and M % 8: operands[0] = jnp.pad(x_MK, ((0, -M % 8), (0, 0)))
  else:
    q_MK, scale_M1 = quantize_rows(jnp.pad(x_MK, ((0, rows - M), (0, 0))), jnp.dtype(activations))
    operands, sums = [q_MK, w.values], jnp.int32 if activations == 'int8' else jnp.float32
  grouped, finish = activations is None and w.group != K, tiles.parts == 1
  if grouped: operands.append(w.scale_QN.astype(jnp.float32))
  elif finish: operands.append(w.scale_QN[0].astype(jnp.float32))
  if finish and activations: operands.append(scale_M1[:, 0])
  body = functools.partial(_few_rows_kernel, rows=rows, inputs=K, tiles=tiles, group=w.group if grouped else None, sums=sums)
  shape = (M if M <= 8 else -(-M // 8) * 8, N) if finish else (tiles.parts, N, rows)
  found = plgpu.kernel(
    body, out_type=jax.ShapeDtypeStruct(shape, x_MK.dtype if finish else sums), grid=(N // OUTPUTS, tiles.parts),
    grid_names=('outputs', 'part'), kernel_name=f'quantized_matmul_few_w{w.bits}',
    scratch_types=[plgpu.SMEM((rows, OUTPUTS), x_MK.dtype, transforms=_swizzled(OUTPUTS, x_MK.dtype))] if finish else [],
  )(*operands)
  if finish: return found[:M]
  y_NM = jnp.sum(found, axis=0)[:, :M].astype(jnp.float32)
  if not grouped: y_NM *= w.scale_QN[0, :, None]
  return (y_NM.T if activations is None else y_NM.T * scale_M1[:M]).astype(x_MK.dtype)


def _few_rows_kernel(x_gmem, w_gmem, *refs, rows: int, inputs: int, tiles: FewTiles, group: int | None, sums):
  """64 outputs of one part of the inputs.

  refs: scales (Q, N), if they are by group; of a single part, those of outputs otherwise, and of rows if they have some, the
  result (M, N) and shared memory for a piece of it; of several, their sums (parts, N, rows).
  """
  scale_gmem, others = ([refs[0]], refs[1:]) if group else ([], refs)
  n, part = lax.axis_index('outputs'), lax.axis_index('part')
  steps = inputs // tiles.K // tiles.parts
  chunk = min(group or tiles.K, tiles.K)
  first = part * steps
  top = 0 * n   # not known beforehand: a fixed slice may not reach past the last row, where copies find zeros
  specs = [
    plgpu.BlockSpec((rows, tiles.K), lambda k: (top, first + k), transforms=_swizzled(chunk, x_gmem.dtype)),
    plgpu.BlockSpec((OUTPUTS, tiles.K), lambda k: (n, first + k), transforms=_swizzled(chunk, w_gmem.dtype))]
  if group:
    specs.append(plgpu.BlockSpec((tiles.K // chunk, OUTPUTS), lambda k: ((first + k) * tiles.K // max(group, tiles.K), n)))
  pipeline = functools.partial(plgpu.emit_pipeline, grid=(steps,), in_specs=specs,
                               max_concurrent_steps=min(tiles.stages, steps))
  step = functools.partial(_few_rows_step, chunk=chunk, rows=rows)
  if group:
    zeros = plgpu.layout_cast(jnp.zeros((OUTPUTS, rows), jnp.float32), WGMMA)
    y_NM = pipeline(step, init_carry=zeros)(x_gmem, w_gmem, *scale_gmem)
  else:
    def accumulate(acc):
      pipeline(functools.partial(step, acc=acc))(x_gmem, w_gmem)
      return acc[...]
    y_NM = pl.run_scoped(accumulate, plgpu.ACC((OUTPUTS, rows), sums))
  outputs = pl.ds(n * OUTPUTS, OUTPUTS)
  if tiles.parts > 1: others[0][part, outputs] = y_NM
  else: _finish_few(y_NM.astype(jnp.float32), *others, outputs, top)


def _finish_few(y_NM, *refs):
  """Scales and stores the rows that there are. refs: scales of outputs and of rows, if left to do, then the result, shared
  memory, the slice of the outputs and the first row."""
  *scales, y_gmem, y_smem, outputs, top = refs
  if scales: y_NM *= lax.broadcast_in_dim(_row(scales[0].at[outputs]), y_NM.shape, [0])
  if len(scales) > 1:
    scale_M = plgpu.load(scales[1], layout=WGMMA.reduce(0), optimized=False)
    y_NM *= lax.broadcast_in_dim(scale_M, y_NM.shape, [1])
  y_smem.T[...] = plgpu.layout_cast(y_NM.astype(y_smem.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[pl.ds(top, y_smem.shape[0]), outputs])
  plgpu.wait_smem_to_gmem(0)


def _few_rows_step(_, x_smem, w_smem, *refs, chunk: int, rows: int, acc=None):
  """A step over the inputs. refs: scales and the float32 sums so far, where each chunk has its own scales; its product is
  exact but for float32 sums, and the scale meets it there."""
  def operand(chunk_K):
    tile = w_smem.at[:, chunk_K]
    return tile if x_smem.dtype == w_smem.dtype else _widened(tile)

  chunks = [pl.ds(start, chunk) for start in range(0, w_smem.shape[1], chunk)]
  if acc is not None:
    for chunk_K in chunks: plgpu.wgmma(acc, operand(chunk_K), x_smem.at[:, chunk_K].T)
    plgpu.wgmma_wait(0)
    if x_smem.dtype != w_smem.dtype: plgpu.commit_smem()   # what was read may be overwritten by the next copy
    return None
  scale_smem, sums = refs

  def multiply(*products):
    for chunk_K, product in zip(chunks, products): plgpu.wgmma(product, operand(chunk_K), x_smem.at[:, chunk_K].T)
    plgpu.wgmma_wait(0)
    total = sums
    for i, product in enumerate(products):
      scale_N = _row(scale_smem.at[i])
      total += product[...] * lax.broadcast_in_dim(scale_N, (OUTPUTS, rows), [0])
    plgpu.commit_smem()   # what was read may be overwritten by the next copy
    return total

  return pl.run_scoped(multiply, *[plgpu.ACC((OUTPUTS, rows), jnp.float32)] * len(chunks))


def _rounded(x_MK, w: QuantizedMatrix, activations: str, tiles: GpuTiles):
  """int8 times int8 or float8 times float8; scales meet the sums in registers."""
  (M, K), N = x_MK.shape, w.shape[0]
  q_MK, scale_M1 = quantize_rows(x_MK, jnp.dtype(activations))
  missing = -M % (tiles.M * tiles.cluster)
  q_MK, scale_M = jnp.pad(q_MK, ((0, missing), (0, 0))), jnp.pad(scale_M1[:, 0], (0, missing))
  q_NK, half = integers(w), tiles.M // 2   # rows of a warpgroup

  def multiply(acc, x_smem, w_smem, warpgroup):
    plgpu.wgmma(acc, x_smem.at[pl.ds(warpgroup * half, half)], w_smem.T)

  def finish(acc, scale_M_gmem, scale_N_gmem, y_gmem, y_smem, m, n, warpgroup):
    rows_M = pl.ds(m * tiles.M + warpgroup * half, half)
    scale_M = _row(scale_M_gmem.at[rows_M])
    for i in range(tiles.N // CHUNK):
      columns_N = pl.ds(n * tiles.N + i * CHUNK, CHUNK)
      scale_N = plgpu.load(scale_N_gmem.at[columns_N], layout=WGMMA.reduce(0), optimized=False)
      y = acc[:, i * CHUNK:(i + 1) * CHUNK].astype(jnp.float32)
      y *= lax.broadcast_in_dim(scale_M, y.shape, [0]) * lax.broadcast_in_dim(scale_N, y.shape, [1])
      _store(y_smem.at[warpgroup], y.astype(y_smem.dtype), y_gmem.at[rows_M, columns_N], i, tiles.N // CHUNK)

  product = Product(
    [Staged(q_MK, (tiles.M, tiles.K), lambda m, n, k: (m, k), _swizzled(tiles.K, q_MK.dtype)),
     Staged(q_NK, (tiles.N, tiles.K), lambda m, n, k: (n, k), _swizzled(tiles.K, q_NK.dtype), tiles.cluster > 1)],
    multiply, finish, tiles, plgpu.ACC((half, tiles.N), jnp.int32 if activations == 'int8' else jnp.float32),
    steps=K // tiles.K, along=0)
  y_MN = product([scale_M, w.scale_QN[0].astype(jnp.float32)], jax.ShapeDtypeStruct((q_MK.shape[0], N), x_MK.dtype),
                 (half, CHUNK))
  return y_MN[:M]


def _dequantized(x_MK, w: QuantizedMatrix, tiles: GpuTiles):
  """bfloat16 times a weight that is widened in registers. Scales of groups are rounded to bfloat16 and meet it there, those
  of outputs meet the sums."""
  (M, K), N = x_MK.shape, w.shape[0]
  x_MK = jnp.pad(x_MK, ((0, -M % tiles.M), (0, 0)))
  half = tiles.N // 2   # outputs of a warpgroup
  grouped, scale_QN = w.group != K, w.scale_QN.astype(jnp.bfloat16 if w.group != K else jnp.float32)
  chunk = min(w.group, WIDENED)

  def multiply(acc, x_smem, w_smem, *refs):
    *scale_smem, warpgroup = refs
    outputs = pl.ds(warpgroup * half, half)
    for start in range(0, tiles.K, chunk):
      inputs = pl.ds(start, chunk)
      scale_N = None
      if grouped: scale_N = _row(scale_smem[0].at[start // min(w.group, tiles.K), outputs])
      # Widening this chunk goes on beside the product of the last.
      plgpu.wgmma(acc, _widened(w_smem.at[outputs, inputs], scale_N), x_smem.at[:, inputs].T)
    plgpu.commit_smem()   # what was read may be overwritten by the next copy

  def finish(acc, *refs):
    *scale_gmem, y_gmem, y_smem, m, n, warpgroup = refs
    outputs = pl.ds(n * tiles.N + warpgroup * half, half)
    if not grouped: scale_N = _row(scale_gmem[0].at[outputs])
    for i in range(tiles.M // TURNED):
      y = acc[:, i * TURNED:(i + 1) * TURNED]
      if not grouped: y *= lax.broadcast_in_dim(scale_N, y.shape, [0])
      y = plgpu.layout_cast(y.astype(y_smem.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
      rows_M = pl.ds(m * tiles.M + i * TURNED, TURNED)
      _store(y_smem.at[warpgroup], y, y_gmem.at[rows_M, outputs], i, tiles.M // TURNED, transposed=True)

  stored = _stored(w)
  staged = [Staged(x_MK, (tiles.M, tiles.K), lambda m, n, k: (m, k), _swizzled(chunk, x_MK.dtype), tiles.cluster > 1),
            Staged(stored, (tiles.N, tiles.K), lambda m, n, k: (n, k), _swizzled(chunk, stored.dtype))]
  if grouped:
    per_step = max(tiles.K // w.group, 1)
    staged.append(Staged(scale_QN, (per_step, tiles.N), lambda m, n, k: (k * tiles.K // w.group // per_step, n), ()))
  product = Product(staged, multiply, finish, tiles, plgpu.ACC((half, tiles.M), jnp.float32), steps=K // tiles.K, along=1,
                    in_flight=0)
  y_MN = product([] if grouped else [scale_QN[0]], jax.ShapeDtypeStruct((x_MK.shape[0], N), x_MK.dtype), (TURNED, half))
  return y_MN[:M]


def _store(y_smem, y, y_gmem, piece: int, pieces: int, transposed: bool = False):
  """Sends a piece of the result off through one of two buffers in turn, once what was sent from it has left."""
  # An odd number of pieces ends with the buffer that the next tile of the result begins with.
  plgpu.wait_smem_to_gmem(0 if piece == 0 and pieces % 2 else 1, wait_read_only=True)
  tile_smem = y_smem.at[piece % 2]
  if transposed: tile_smem.T[...] = y
  else: tile_smem[...] = y
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(tile_smem, y_gmem)


@dataclasses.dataclass(frozen=True)
class Staged:
  """An operand of which each step has a block in shared memory.

  index: (m, n, k) -> which, in blocks. multicast: the blocks of a cluster read the same, so each copies a part to all.
  """
  array: jax.Array
  block: tuple[int, int]
  index: Callable
  transforms: tuple
  multicast: bool = False

  def copy(self, gmem, smem, barrier, place: tuple):
    """Sends for the block of (m, n, k); it arrives at the barrier."""
    here = tuple(pl.ds(i * size, size) for i, size in zip(self.index(*place), self.block))
    plgpu.copy_gmem_to_smem(gmem.at[here], smem, barrier, collective_axes='cluster' if self.multicast else None)


@dataclasses.dataclass(frozen=True)
class Product:
  """A product over tiles (m, n) of the result. Two warpgroups multiply and finish; a third copies what they read, and goes
  on to the next tile of the result while these finish the last.

  staged: operands that each step reads. steps: their number. acc: the sums of one warpgroup.
  multiply: (acc, *blocks of a step, warpgroup). finish: (sums of a tile, *other operands, y_gmem, y_smem, m, n, warpgroup).
  along: the dim of the result along which the blocks of a cluster are neighbours.
  in_flight: products that may still run when a step's successor begins; its blocks are given back that much later.
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
    """The result, of the shape and dtype of y, stored in pieces of y_tile."""
    tiles, cluster = self.tiles, [1, 1]
    cluster[self.along] = self.tiles.cluster
    grid = y.shape[0] // tiles.M // cluster[0], y.shape[1] // tiles.N // cluster[1]   # of clusters
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
      """Calls visit(m, n, steps before) for each tile of this block; returns the steps of all."""
      @plgpu.nd_loop((grid[0] * grid[1],), collective_axes='block', init_carry=jnp.int32(0))
      def total(loop, carry):
        m, n = plgpu.planar_snake(loop.index[0], grid, 0, self.tiles.band)
        visit(*((m * cluster[0] + peer, n) if self.along == 0 else (m, n * cluster[1] + peer)), carry)
        return carry + self.steps
      return total

    @pl.when(warpgroup == 2)
    def _():
      plgpu.set_max_registers(40, action='decrease')
      total = walk(lambda m, n, before: self._copy(staged_gmem, staged_smem, full, empty, m, n, before))
      # A block must not end while its neighbour may still arrive at its barriers.
      for last in range(1, self.tiles.stages + 1):
        pl.when(total >= last)(lambda: plgpu.barrier_wait(empty.at[lax.rem(total - last, self.tiles.stages)]))

    @pl.when(warpgroup < 2)
    def _():
      plgpu.set_max_registers(232, action='increase')
      def visit(m, n, before):
        sums = self._sums(staged_smem, full, empty, before, warpgroup)
        self.finish(sums, *others_gmem, y_gmem, y_smem, m, n, warpgroup)
      walk(visit)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  def _copy(self, staged_gmem, staged_smem, full, empty, m, n, before):
    """Sends for the blocks of each step of a tile, as buffers become free."""
    @pl.loop(0, self.steps)
    def _(k):
      slot = lax.rem(before + k, self.tiles.stages)
      pl.when(before + k >= self.tiles.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
      for operand, gmem, smem in zip(self.staged, staged_gmem, staged_smem):
        operand.copy(gmem, smem.at[slot], full.at[slot], (m, n, k))

  def _sums(self, staged_smem, full, empty, before, warpgroup):
    """A warpgroup's sums over the steps of a tile."""
    def accumulate(acc_ref):
      @pl.loop(0, self.steps)
      def _(k):
        slot = lax.rem(before + k, self.tiles.stages)
        plgpu.barrier_wait(full.at[slot])
        self.multiply(acc_ref, *[smem.at[slot] for smem in staged_smem], warpgroup)
        plgpu.wgmma_wait(self.in_flight)
        done = k - self.in_flight
        pl.when(done >= 0)(lambda: plgpu.barrier_arrive(empty.at[lax.rem(before + done, self.tiles.stages)]))
      plgpu.wgmma_wait(0)
      if self.in_flight: plgpu.barrier_arrive(empty.at[lax.rem(before + self.steps - 1, self.tiles.stages)])
      return acc_ref[...]
    return pl.run_scoped(accumulate, self.acc)


def _cut(refs, *counts: int) -> tuple:
  """The first of them, the next of them, …, and what is left."""
  refs, parts = list(refs), []
  for count in counts: parts.append([refs.pop(0) for _ in range(count)])
  return *parts, refs
