"""Attention of one token a sequence on Hopper: keys and values stream through shared memory once, split over S.

A block of threads (one warpgroup) has one key head of one sequence and a split of its slots. All key blocks of the split
come first and all value blocks after them, through one ring of copies (TMA), so that there is no running maximum to correct
by: scores of the split stay in shared memory until its maximum is known. `cache.combine` joins the results of splits.

Both products have the tokens, or the head dim, as the 64 rows of a tensor core instruction and the query heads of the key
head as its columns, padded to 8: scores_SG = k_SH q_HG and o_HG = v_HS p_SG. So keys go from the cache to the tensor cores
through registers, where integers become bfloat16. Values are needed transposed, which only shared memory can do: they
are converted into it. An 8-bit key so costs 2 bytes of traffic to shared memory and a value 6, for 1 byte from the cache.
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
from efficient_lm.ops.decode_attention.cache import combine, first_slots, num_slots, per_token
from efficient_lm.ops.decode_attention.tiles import SHARED_MEMORY, GpuTiles, gpu_tiles_for, shared_memory

LOWEST = -1e30
WGMMA = plgpu.Layout.WGMMA
BITS = {'bfloat16': 16, 'int8': 8, 'uint8': 4}


def refuses(q_BNH, k_BKSH, v_BKSH, lengths_B, *, k_scale_BKS=None, page_table_BS=None, tiles=None, **_) -> str:
  """Why this kernel cannot take these arguments, or ''."""
  G, H, Q = q_BNH.shape[1] // k_BKSH.shape[1], q_BNH.shape[2], k_BKSH.shape[2]
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
  """What the kernel is specialised to."""
  tiles: GpuTiles
  bits: int
  H: int
  columns: int     # query heads of a key head, padded to a multiple of 8
  page: int | None
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
  call = _Call(tiles, bits, H, columns, None if page_table_BS is None else Q, scale * math.log2(math.e))
  if shared_memory(tiles, H, bits, columns) > SHARED_MEMORY: raise ValueError(f'{tiles} do not fit shared memory')
  q_BKGH = jnp.pad(q_BNH.reshape(B, K, G, H), ((0, 0), (0, 0), (0, columns - G), (0, 0)))
  operands = [k_BKSH, v_BKSH]
  if bits == 4:   # consecutive numbers of int4 are h and h + H / 2: so are the queries' then, and the result's
    operands = [_as_int4(x) for x in operands]
    q_BKGH = q_BKGH[..., _halves_interleaved(H)]
  if bits <= 8: operands += [per_token(x, Q).astype(jnp.float32) for x in (k_scale_BKS, v_scale_BKS)]
  if page_table_BS is not None: operands.append(page_table_BS)
  o_BKCHG, stats_BKC2G = _run(call, -(-S // tiles.split), q_BKGH, first_slots(lengths_B, window), lengths_B, *operands)
  o_BKGCH = o_BKCHG[..., :G].transpose(0, 1, 4, 2, 3)
  max_BKGC, sum_BKGC = (stats_BKC2G[..., i, :G].swapaxes(2, 3) for i in (0, 1))
  o_BKGH = combine(o_BKGCH, max_BKGC * math.log(2), sum_BKGC)
  if bits == 4: o_BKGH = o_BKGH[..., np.argsort(_halves_interleaved(H))]
  return o_BKGH.reshape(B, N, H).astype(q_BNH.dtype)


def _halves_interleaved(H: int) -> np.ndarray:
  return np.arange(H).reshape(2, H // 2).T.reshape(H)


def _as_int4(packed):
  """uint8 (..., H / 2) -> int4 (..., H): the same bytes."""
  return lax.bitcast_convert_type(packed, jnp.int4).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def _tiled(shape, dtype, minor: int, bits: int):
  """Shared memory as TMA writes it and the tensor cores read it."""
  swizzle = plgpu.find_swizzle(minor * bits)
  tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))
  return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def _run(call: _Call, splits: int, q_BKGH, first_B, lengths_B, *operands):
  (B, K, columns, H), tiles = q_BKGH.shape, call.tiles
  scratch = dict(
    q=_tiled((columns, H), jnp.bfloat16, H, 16),
    ring=_tiled((tiles.stages, tiles.slots, H), call.dtype, H, call.bits),
    scores=plgpu.SMEM((tiles.split, columns), jnp.float32),
    p=_tiled((columns, tiles.slots), jnp.bfloat16, tiles.slots, 16),
    out=plgpu.SMEM((H, columns), jnp.float32), stats=plgpu.SMEM((2, columns), jnp.float32),
    q_barrier=plgpu.Barrier(), barriers=plgpu.Barrier(num_barriers=tiles.stages, num_arrivals=1 if call.bits == 16 else 2))
  if call.bits <= 8:
    scratch |= dict(converted=_tiled((tiles.slots, H), jnp.bfloat16, H, 16),
                    scales=plgpu.SMEM((tiles.stages, tiles.slots), jnp.float32))
  return plgpu.kernel(
    functools.partial(_kernel, call),
    out_type=(jax.ShapeDtypeStruct((B, K, splits, H, columns), jnp.float32),
              jax.ShapeDtypeStruct((B, K, splits, 2, columns), jnp.float32)),
    grid=(splits, K, B), grid_names=('split', 'head', 'sequence'), scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(q_BKGH, first_B, lengths_B, *operands)


def _kernel(call: _Call, q_ref, first_ref, length_ref, *refs, **scratch):
  inputs = 2 + 2 * (call.bits <= 8) + (call.page is not None)
  cache, (o_ref, stats_ref) = refs[:inputs], refs[inputs:inputs + 2]
  slots, split = call.tiles.slots, call.tiles.split
  c, h, b = (lax.axis_index(name) for name in ('split', 'head', 'sequence'))
  first, length = first_ref[b], length_ref[b]
  # Blocks of the split that are seen: low … high - 1, counted from the split's first.
  low = jnp.clip(lax.div(first, slots) - c * (split // slots), 0, split // slots)
  high = jnp.clip(lax.div(length + (slots - 1), slots) - c * (split // slots), low, split // slots)
  count = high - low
  start = c * split + low * slots

  def fetch(j):
    """Starts the copy of item j of the ring: key block j, or value block j - count."""
    values = j >= count
    token = start + (j - jnp.where(values, count, 0)) * slots
    pl.when(jnp.logical_not(values))(lambda: _copy(call, cache, 0, (b, h, token), j, scratch))
    pl.when(values & (j < 2 * count))(lambda: _copy(call, cache, 1, (b, h, token), j, scratch))

  plgpu.copy_gmem_to_smem(q_ref.at[b, h], scratch['q'], scratch['q_barrier'])
  for j in range(call.tiles.stages): fetch(jnp.int32(j))
  plgpu.barrier_wait(scratch['q_barrier'])

  max_G = _keys(call, count, start, first, length, fetch, scratch)
  _values(call, count, start, first, length, fetch, max_G, scratch)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(scratch['out'], o_ref.at[b, h, c])
  plgpu.copy_smem_to_gmem(scratch['stats'], stats_ref.at[b, h, c])
  plgpu.wait_smem_to_gmem(0)


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


def _seen(call: _Call, token, first, length, width: int):
  """Which of the slots from `token` on are seen, (slots, width)."""
  slot = token + plgpu.broadcasted_iota(jnp.int32, (call.tiles.slots, width), 0, layout=WGMMA)
  return (slot >= first) & (slot < length)


def _scale(call: _Call, slot, scratch):
  """The scales of a block, (slots, columns)."""
  scale_S = plgpu.layout_cast(scratch['scales'][slot], WGMMA.reduce(1))
  return lax.broadcast_in_dim(scale_S, (call.tiles.slots, call.columns), [0])


def _keys(call: _Call, count, start, first, length, fetch, scratch):
  """Scores of all key blocks into shared memory; returns the maximum of each column."""
  slots, columns = call.tiles.slots, call.columns

  def block(i, max_SG):
    slot = lax.rem(i, call.tiles.stages)
    plgpu.barrier_wait(scratch['barriers'].at[slot])
    keys = scratch['ring'].at[slot]
    if call.bits <= 8: keys = keys[...].astype(jnp.bfloat16)
    if call.bits <= 8 and not call.tiles.registers:
      scratch['converted'][...] = keys
      plgpu.commit_smem()
      keys = scratch['converted']
    def product(acc_ref):
      plgpu.wgmma(acc_ref, keys, scratch['q'].transpose((1, 0)))
      return acc_ref[...]
    s_SG = pl.run_scoped(product, plgpu.ACC((slots, columns), jnp.float32)) * call.scale
    if call.bits <= 8: s_SG *= _scale(call, slot, scratch)
    s_SG = jnp.where(_seen(call, start + i * slots, first, length, columns), s_SG, LOWEST)
    scratch['scores'][pl.ds(i * slots, slots)] = s_SG
    plgpu.commit_smem()   # all have read this copy before the next one overwrites it
    fetch(i + call.tiles.stages)
    return jnp.maximum(max_SG, s_SG)

  lowest_SG = plgpu.layout_cast(jnp.full((slots, columns), LOWEST, jnp.float32), WGMMA)
  return jnp.max(lax.fori_loop(0, count, block, lowest_SG), axis=0)


def _values(call: _Call, count, start, first, length, fetch, max_G, scratch):
  """Probabilities times all value blocks; results, maxima and sums into shared memory."""
  slots, columns = call.tiles.slots, call.columns

  def blocks(acc_ref):
    def block(i, sum_SG):
      j = i + count
      slot = lax.rem(j, call.tiles.stages)
      seen_SG = _seen(call, start + i * slots, first, length, columns)
      s_SG = plgpu.layout_cast(scratch['scores'][pl.ds(i * slots, slots)], WGMMA)
      p_SG = jnp.where(seen_SG, jnp.exp2(s_SG - lax.broadcast_in_dim(max_G, s_SG.shape, [1])), 0.)
      plgpu.barrier_wait(scratch['barriers'].at[slot])
      weighted_SG = p_SG
      if call.bits <= 8:
        weighted_SG = jnp.where(seen_SG, p_SG * _scale(call, slot, scratch), 0.)
        scratch['converted'][...] = scratch['ring'][slot].astype(jnp.bfloat16)
        values = scratch['converted']
      else:
        values = scratch['ring'].at[slot]
        # A slot that is not seen may hold NaN, and 0 * NaN is NaN. Integers are finite.
        @pl.when((start + i * slots < first) | (start + (i + 1) * slots > length))
        def _():
          v_SH = plgpu.layout_cast(values[...], WGMMA)
          values[...] = jnp.where(_seen(call, start + i * slots, first, length, call.H), v_SH, jnp.zeros_like(v_SH))
      transposed = plgpu.layout_cast(weighted_SG.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
      scratch['p'].transpose((1, 0))[...] = transposed
      plgpu.commit_smem()
      plgpu.wgmma(acc_ref, values.transpose((1, 0)), scratch['p'].transpose((1, 0)))
      plgpu.wgmma_wait(0)
      plgpu.commit_smem()
      fetch(j + call.tiles.stages)
      return sum_SG + p_SG

    zero_SG = plgpu.layout_cast(jnp.zeros((slots, columns), jnp.float32), WGMMA)
    sum_SG = lax.fori_loop(0, count, block, zero_SG)
    scratch['out'][...] = acc_ref[...]
    scratch['stats'][0] = max_G
    scratch['stats'][1] = jnp.sum(sum_SG, axis=0)

  pl.run_scoped(blocks, plgpu.ACC((call.H, columns), jnp.float32))
