"""Attention of one token of each sequence on Hopper: keys and values stream through shared memory once, split over S.

A block of threads (one warpgroup) has one key head of one sequence, and a split of the slots that its query sees, which it
processes in parts. All key blocks of a part come before its value blocks, through one ring of copies (TMA). The scores of a
part stay in shared memory until their maximum is known, so that the sums so far are corrected once for each part, not once
for each block. If a head is split, `_join` adds the splits. No other kernel is launched: the copies fill padding query heads
with zeros and leave their results out.

Both products have the tokens, or the head dim, as the 64 rows of a tensor core instruction, and the query heads of the key
head, padded to 8, as its columns: scores_SG = k_SH q_HG and o_HG = v_HS p_SG. Keys go from the cache to the tensor cores
through registers, where integers become bfloat16. Values must be transposed, which only shared memory can do, so that they
are converted into shared memory. For 1 byte from the cache, an 8-bit key takes 2 bytes of traffic to shared memory, and an
8-bit value 6.
"""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from efficient_lm.ops import dispatch
from efficient_lm.ops.decode_attention.cache import num_slots, per_token
from efficient_lm.ops.decode_attention.tiles import SHARED_MEMORY, GpuTiles, gpu_tiles_for, shared_memory
from efficient_lm.ops.packing import as_int4

LOWEST = -1e30
JOINED = 64   # numbers of the head dim whose splits one block of threads adds
WGMMA = plgpu.Layout.WGMMA
BITS = {'bfloat16': 16, 'int8': 8, 'uint8': 4}


def refuses(q_BNH, k_BKSH, v_BKSH, lengths_B, *, k_scale_BKS=None, page_table_BS=None, softcap=None, tiles=None,
            k_shift=None, **_) -> str:
  """Why this kernel cannot take these arguments, or ''."""
  G, H, Q = q_BNH.shape[1] // k_BKSH.shape[1], q_BNH.shape[2], k_BKSH.shape[2]
  if softcap is not None: return 'it has no soft cap'
  if k_shift is not None: return 'it reads no scales and shifts of tiles'
  if not hasattr(plgpu, 'InterpretGPUParams'): return 'needs jax 0.11'
  if q_BNH.dtype != jnp.bfloat16: return f'queries are {q_BNH.dtype}: must be bfloat16'
  if k_BKSH.dtype.name not in BITS: return f'the cache is {k_BKSH.dtype}: must be bfloat16, int8 or uint8'
  if v_BKSH.shape != k_BKSH.shape: return 'keys and values need the same shape'
  if H not in (64, 128, 256): return f'a head dim of {H}: must be 64, 128 or 256'
  if G > 32: return f'{G} query heads a key head: at most 32'
  slots = tiles.slots if tiles else 64
  if page_table_BS is not None and Q % slots: return f'pages of {Q} tokens: must be a multiple of {slots}'
  if page_table_BS is None and Q % 4 and k_scale_BKS is not None: return f'{Q} slots: must be a multiple of 4 if quantized'
  return ''


@dataclasses.dataclass(frozen=True)
class _Call:
  """The static parameters of a kernel."""
  tiles: GpuTiles
  bits: int
  H: int
  columns: int     # query heads of a key head, padded to a multiple of 8
  page: int | None
  window: int | None
  scale: float     # of the scores, times log2(e): the softmax is in powers of two

  @property
  def dtype(self):
    return {16: jnp.bfloat16, 8: jnp.int8, 4: jnp.int4}[self.bits]


def decode_attention(q_BNH, k_BKSH, v_BKSH, lengths_B, *, k_scale_BKS=None, v_scale_BKS=None, page_table_BS=None,
                     window=None, scale: float, tiles: GpuTiles | None = None):
  """See the API."""
  (B, N, H), (_, K, Q, _) = q_BNH.shape, k_BKSH.shape
  S, G, bits = num_slots(k_BKSH, page_table_BS), N // K, BITS[k_BKSH.dtype.name]
  tiles = tiles or gpu_tiles_for(B * K, S, H, bits, dispatch.device().num_cores or 132)
  columns = -(-G // 8) * 8
  page = None if page_table_BS is None else Q
  call = _Call(tiles, bits, H, columns, page, window, scale * math.log2(math.e))
  if shared_memory(tiles, H, bits, columns) > SHARED_MEMORY: raise ValueError(f'{tiles} do not fit shared memory')
  q_BKGH, operands = q_BNH.reshape(B, K, G, H), [k_BKSH, v_BKSH]
  # The copies pad up to 8 heads.
  if G > 8: q_BKGH = jnp.pad(q_BKGH, ((0, 0), (0, 0), (0, columns - G), (0, 0)))
  if bits == 4:   # Successive numbers of int4 are h and h + H / 2; queries and result are permuted in the same way.
    operands = [as_int4(x) for x in operands]
    q_BKGH = q_BKGH[..., _halves_interleaved(H)]
  if bits <= 8: operands += [per_token(x, Q).astype(jnp.float32) for x in (k_scale_BKS, v_scale_BKS)]
  if page_table_BS is not None: operands.append(page_table_BS)
  o_BKGH = _run(call, q_BKGH, lengths_B, *operands)[:, :, :G]
  if bits == 4: o_BKGH = o_BKGH[..., np.argsort(_halves_interleaved(H))]
  return o_BKGH.reshape(B, N, H)


def _halves_interleaved(H: int) -> np.ndarray:
  return np.arange(H).reshape(2, H // 2).T.reshape(H)


def _tiled(shape, dtype, minor: int, bits: int):
  """A buffer in shared memory in the layout that TMA writes and the tensor cores read."""
  swizzle = plgpu.find_swizzle(minor * bits)
  tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))
  return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def _run(call: _Call, q_BKGH, lengths_B, *operands):
  """The result (B, K, G, H) for the queries."""
  (B, K, _, H), tiles, columns = q_BKGH.shape, call.tiles, call.columns
  scratch = dict(
    q=_tiled((columns, H), jnp.bfloat16, H, 16),
    ring=_tiled((tiles.stages, tiles.slots, H), call.dtype, H, call.bits),
    scores=plgpu.SMEM((tiles.part, columns), jnp.float32),
    p=_tiled((columns, tiles.slots), jnp.bfloat16, tiles.slots, 16),
    q_barrier=plgpu.Barrier(), barriers=plgpu.Barrier(num_barriers=tiles.stages, num_arrivals=1 if call.bits == 16 else 2))
  if call.bits <= 8:
    scratch |= dict(converted=_tiled((tiles.slots, H), jnp.bfloat16, H, 16),
                    scales=plgpu.SMEM((tiles.stages, tiles.slots), jnp.float32))
  result = jax.ShapeDtypeStruct(q_BKGH.shape, q_BKGH.dtype)
  if tiles.splits == 1: out_type = (result,)
  else:
    scratch |= dict(out=plgpu.SMEM((H, columns), jnp.float32), stats=plgpu.SMEM((2, columns), jnp.float32))
    out_type = (jax.ShapeDtypeStruct((B, K, tiles.splits, H, columns), jnp.float32),
                jax.ShapeDtypeStruct((B, K, tiles.splits, 2, columns), jnp.float32))
  found = plgpu.kernel(
    functools.partial(_kernel, call), out_type=out_type, grid=(tiles.splits, K, B), grid_names=('split', 'head', 'sequence'),
    scratch_types=scratch, compiler_params=plgpu.CompilerParams(approx_math=True), kernel_name='decode_attention',
  )(q_BKGH, lengths_B, *operands)
  return found[0] if tiles.splits == 1 else _join(*found, result)


def _join(o_BKCHG, stats_BKC2G, result):
  """Adds the splits C of each head as `cache.combine` does, with exponents in powers of two. A split without visible keys
  has zeros, and LOWEST as its maximum."""
  B, K, splits, H, columns = o_BKCHG.shape
  stages = min(splits, 16)

  def kernel(o_ref, stats_ref, result_ref, stats, parts, out, stats_barrier, barriers):
    n, h, b = (lax.axis_index(name) for name in ('part', 'head', 'sequence'))
    def fetch(c):
      slot = lax.rem(c, stages)
      rows = o_ref.at[b, h, c, pl.ds(n * JOINED, JOINED)]
      pl.when(c < splits)(lambda: plgpu.copy_gmem_to_smem(rows, parts.at[slot], barriers.at[slot]))
    plgpu.copy_gmem_to_smem(stats_ref.at[b, h], stats, stats_barrier)
    for c in range(stages): fetch(jnp.int32(c))
    plgpu.barrier_wait(stats_barrier)
    of = lambda c, which: plgpu.load(stats.at[c, which], layout=WGMMA.reduce(0), optimized=False)
    max_G = lax.fori_loop(1, splits, lambda c, m_G: jnp.maximum(m_G, of(c, 0)), of(0, 0))

    def add(c, sums):
      slot = lax.rem(c, stages)
      plgpu.barrier_wait(barriers.at[slot])
      weight_G = jnp.exp2(of(c, 0) - max_G)
      o_HG = plgpu.load(parts.at[slot], layout=WGMMA, optimized=False) * _wide(weight_G, JOINED)
      plgpu.commit_smem()   # All threads have read this copy before the next one overwrites it.
      fetch(c + stages)
      return sums[0] + o_HG, sums[1] + weight_G * of(c, 1)

    zeros = lambda shape, layout: plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
    o_HG, sum_G = lax.fori_loop(0, splits, add, (zeros((JOINED, columns), WGMMA), zeros((columns,), WGMMA.reduce(0))))
    _store(o_HG, sum_G, out, result_ref.at[b, h, pl.ds(0 * b, columns), pl.ds(n * JOINED, JOINED)])

  return plgpu.kernel(
    kernel, out_type=result, grid=(H // JOINED, K, B), grid_names=('part', 'head', 'sequence'),
    compiler_params=plgpu.CompilerParams(approx_math=True), kernel_name='decode_attention_join', scratch_types=[
      plgpu.SMEM((splits, 2, columns), jnp.float32), plgpu.SMEM((stages, JOINED, columns), jnp.float32),
      _tiled((columns, JOINED), result.dtype, JOINED, 16), plgpu.Barrier(), plgpu.Barrier(num_barriers=stages)],
  )(o_BKCHG, stats_BKC2G)


def _store(o_HG, sum_G, out, result_ref):
  """Divides by the sum of the probabilities and stores (columns, H) through shared memory."""
  o_HG = o_HG * _wide(1 / jnp.where(sum_G > 0, sum_G, 1.), o_HG.shape[0])
  out.transpose((1, 0))[...] = plgpu.layout_cast(o_HG.astype(out.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(out, result_ref)
  plgpu.wait_smem_to_gmem(0)


def _wide(x_G, rows: int):
  return lax.broadcast_in_dim(x_G, (rows, x_G.shape[0]), [1])


def _kernel(call: _Call, q_ref, length_ref, *refs, **scratch):
  inputs = 2 + 2 * (call.bits <= 8) + (call.page is not None)
  cache, results = refs[:inputs], refs[inputs:]
  slots, splits, part, columns = call.tiles.slots, call.tiles.splits, call.tiles.part // call.tiles.slots, call.columns
  c, h, b = (lax.axis_index(name) for name in ('split', 'head', 'sequence'))
  length = length_ref[b]
  first = jnp.int32(0) if call.window is None else jnp.maximum(length - call.window, 0)
  # The visible blocks are low … high - 1; this split has the equal share start … start + count - 1 of them.
  low, high = lax.div(first, slots), lax.div(length + (slots - 1), slots)
  share = lax.div(high - low + (splits - 1), splits)
  start = low + c * share
  count = jnp.clip(high - start, 0, share)

  def fetch(j):
    """Starts the copy of item j of the ring, which has the key blocks and then the value blocks of each part."""
    done = lax.div(j, 2 * part) * part
    size = jnp.minimum(count - done, part)
    i = j - 2 * done
    values = i >= size
    block = start + done + i - jnp.where(values, size, 0)
    pl.when((j < 2 * count) & jnp.logical_not(values))(lambda: _copy(call, cache, 0, (b, h, block * slots), j, scratch))
    pl.when((j < 2 * count) & values)(lambda: _copy(call, cache, 1, (b, h, block * slots), j, scratch))

  # A constant slice must not exceed the array; a computed one may, and copies fill its missing rows with zeros.
  all_columns = pl.ds(0 * b, columns)
  plgpu.copy_gmem_to_smem(q_ref.at[b, h, all_columns], scratch['q'], scratch['q_barrier'])
  for j in range(call.tiles.stages): fetch(jnp.int32(j))
  plgpu.barrier_wait(scratch['q_barrier'])

  def one_part(i, carry):
    o_HG, sum_SG, old_G = carry
    done = i * part
    where = _Part(done, jnp.minimum(count - done, part), (start + done) * slots, first, length)
    max_G = jnp.maximum(old_G, _keys(call, where, fetch, scratch))
    more_HG, more_SG = _values(call, where, fetch, max_G, scratch)
    shrink_G = jnp.exp2(old_G - max_G)
    return o_HG * _wide(shrink_G, call.H) + more_HG, sum_SG * _wide(shrink_G, slots) + more_SG, max_G

  zeros = lambda rows: plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), WGMMA)
  lowest_G = plgpu.layout_cast(jnp.full((columns,), LOWEST, jnp.float32), WGMMA.reduce(0))
  parts = lax.div(count + (part - 1), part)
  o_HG, sum_SG, max_G = lax.fori_loop(0, parts, one_part, (zeros(call.H), zeros(slots), lowest_G))
  sum_G = jnp.sum(sum_SG, axis=0)
  # The result leaves through the buffer of the queries, which are not read any more.
  if splits == 1: return _store(o_HG, sum_G, scratch['q'], results[0].at[b, h, all_columns])
  scratch['out'][...] = o_HG
  scratch['stats'][0], scratch['stats'][1] = max_G, sum_G
  plgpu.commit_smem()
  for name, result in zip(('out', 'stats'), results): plgpu.copy_smem_to_gmem(scratch[name], result.at[b, h, c])
  plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class _Part:
  """The blocks of a split whose scores are in shared memory together. before: blocks of the split before them. count: their
  number. token: the first token of the part. first, length: the first visible token, and the one after the last."""
  before: jax.Array
  count: jax.Array
  token: jax.Array
  first: jax.Array
  length: jax.Array


def _copy(call: _Call, cache, which: int, where, j, scratch):
  """Starts the copy of a block of keys (`which` 0) or values (1), and of its scales."""
  b, h, token = where
  slot = lax.rem(j, call.tiles.stages)
  if call.page is not None:
    page = cache[-1][b, lax.div(token, call.page)]
    b, token = page, lax.rem(token, call.page)
  at = (b, h, pl.ds(token, call.tiles.slots))
  barrier = scratch['barriers'].at[slot]
  plgpu.copy_gmem_to_smem(cache[which].at[at], scratch['ring'].at[slot], barrier)
  if call.bits <= 8: plgpu.copy_gmem_to_smem(cache[2 + which].at[at], scratch['scales'].at[slot], barrier)


def _seen(call: _Call, part: _Part, i, width: int):
  """Which slots of block i of the part the query sees, (slots, width)."""
  rows = call.tiles.slots
  slot = part.token + i * rows + plgpu.broadcasted_iota(jnp.int32, (rows, width), 0, layout=WGMMA)
  return (slot >= part.first) & (slot < part.length)


def _scale(call: _Call, slot, scratch):
  """The scales of a block, (slots, columns)."""
  scale_S = plgpu.layout_cast(scratch['scales'][slot], WGMMA.reduce(1))
  return lax.broadcast_in_dim(scale_S, (call.tiles.slots, call.columns), [0])


def _keys(call: _Call, part: _Part, fetch, scratch):
  """Computes the scores of a part's key blocks in shared memory, and returns the maximum of each column."""
  slots, columns = call.tiles.slots, call.columns

  def block(i, max_SG):
    j = 2 * part.before + i
    slot = lax.rem(j, call.tiles.stages)
    plgpu.barrier_wait(scratch['barriers'].at[slot])
    keys = scratch['ring'].at[slot]
    if call.bits <= 8: keys = keys[...].astype(jnp.bfloat16)
    def product(acc_ref):
      plgpu.wgmma(acc_ref, keys, scratch['q'].transpose((1, 0)))
      return acc_ref[...]
    s_SG = pl.run_scoped(product, plgpu.ACC((slots, columns), jnp.float32)) * call.scale
    if call.bits <= 8: s_SG *= _scale(call, slot, scratch)
    s_SG = jnp.where(_seen(call, part, i, columns), s_SG, LOWEST)
    scratch['scores'][pl.ds(i * slots, slots)] = s_SG
    plgpu.commit_smem()   # All threads have read this copy before the next one overwrites it.
    fetch(j + call.tiles.stages)
    return jnp.maximum(max_SG, s_SG)

  lowest_SG = plgpu.layout_cast(jnp.full((slots, columns), LOWEST, jnp.float32), WGMMA)
  return jnp.max(lax.fori_loop(0, part.count, block, lowest_SG), axis=0)


def _values(call: _Call, part: _Part, fetch, max_G, scratch):
  """Probabilities times a part's value blocks, (H, columns), and the sums of probabilities, (slots, columns)."""
  slots, columns = call.tiles.slots, call.columns

  def blocks(acc_ref):
    def block(i, sum_SG):
      j = 2 * part.before + part.count + i
      slot = lax.rem(j, call.tiles.stages)
      seen_SG = _seen(call, part, i, columns)
      s_SG = plgpu.layout_cast(scratch['scores'][pl.ds(i * slots, slots)], WGMMA)
      p_SG = jnp.where(seen_SG, jnp.exp2(s_SG - _wide(max_G, slots)), 0.)
      plgpu.barrier_wait(scratch['barriers'].at[slot])
      weighted_SG = p_SG
      if call.bits <= 8:
        weighted_SG = jnp.where(seen_SG, p_SG * _scale(call, slot, scratch), 0.)
        scratch['converted'][...] = scratch['ring'][slot].astype(jnp.bfloat16)
        values = scratch['converted']
      else:
        values = scratch['ring'].at[slot]
        # Invisible slots may hold NaN, and 0 * NaN is NaN. Integers are finite.
        @pl.when((part.token + i * slots < part.first) | (part.token + (i + 1) * slots > part.length))
        def _():
          v_SH = plgpu.layout_cast(values[...], WGMMA)
          values[...] = jnp.where(_seen(call, part, i, call.H), v_SH, jnp.zeros_like(v_SH))
      transposed = plgpu.layout_cast(weighted_SG.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
      scratch['p'].transpose((1, 0))[...] = transposed
      plgpu.commit_smem()
      plgpu.wgmma(acc_ref, values.transpose((1, 0)), scratch['p'].transpose((1, 0)))
      plgpu.wgmma_wait(0)
      plgpu.commit_smem()
      fetch(j + call.tiles.stages)
      return sum_SG + p_SG

    zero_SG = plgpu.layout_cast(jnp.zeros((slots, columns), jnp.float32), WGMMA)
    sum_SG = lax.fori_loop(0, part.count, block, zero_SG)
    return acc_ref[...], sum_SG

  return pl.run_scoped(blocks, plgpu.ACC((call.H, columns), jnp.float32))
