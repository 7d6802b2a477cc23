"""Attention of one token of each sequence on TPU: a head's keys and values stream through VMEM once, block by block.

The grid is (sequences, key heads, blocks of slots). A block that no query sees is neither copied nor computed: the index map
returns the nearest visible block, and the pipeline does not copy a block that it already has. With pages, the index map
reads the page table, and a block is several pages, each an operand of its own. The softmax is that of FlashAttention, with
running maximum, sum and result in VMEM.

A cache of four bits takes a 128-lane row for H / 2 bytes, so that it saves memory only from H = 256 on. No view avoids that:
arrays in HBM are padded to tiles of 128 lanes, and a layout with two tokens in a row would be a copy of the cache.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_lm.ops.decode_attention.cache import first_slots, num_slots, per_token
from efficient_lm.ops.decode_attention.tiles import TpuTiles, tpu_tiles_for
from efficient_lm.ops.packing import wide_planes

LOWEST = -1e30
LANES = 128


def refuses(q_BNH, k_BKSH, v_BKSH, lengths_B, *, page_table_BS=None, softcap=None, k_shift=None, **_) -> str:
  """Why this kernel cannot take these arguments, or ''."""
  if softcap is not None: return 'it has no soft cap'
  if k_shift is not None: return 'it reads no scales and shifts of tiles'
  rows = {'float32': 8, 'bfloat16': 16}.get(k_BKSH.dtype.name, 32)
  if page_table_BS is not None and k_BKSH.shape[2] % rows:
    return f'pages of {k_BKSH.shape[2]} tokens: must be a multiple of {rows} in {k_BKSH.dtype}'
  if v_BKSH.shape != k_BKSH.shape: return 'keys and values need the same shape'
  return ''


def decode_attention(q_BNH, k_BKSH, v_BKSH, lengths_B, *, k_scale_BKS=None, v_scale_BKS=None, page_table_BS=None,
                     window=None, scale: float, tiles: TpuTiles | None = None):
  """See the API."""
  (B, N, H), (_, K, Q, width) = q_BNH.shape, k_BKSH.shape
  S, G = num_slots(k_BKSH, page_table_BS), N // K
  tiles = tiles or tpu_tiles_for(B * K, S, H, 8 * width * k_BKSH.dtype.itemsize // H, None if page_table_BS is None else Q)
  pages = 1 if page_table_BS is None else tiles.slots // Q
  rows = tiles.slots // pages
  scalars = (first_slots(lengths_B, window), lengths_B)
  if page_table_BS is not None: scalars += (page_table_BS,)

  def index(page: int, b, h, i, first, length, *table):
    # The nearest visible block; the first block of a sequence without visible ones.
    i = jnp.clip(i, first[b] // tiles.slots, jnp.maximum(length[b] - 1, 0) // tiles.slots)
    if not table: return b, h, i
    last = table[0].shape[1] - 1
    return table[0][b, jnp.minimum(i * pages + page, last)], h, 0

  def spec(page: int, scales: bool):
    at = functools.partial(index, page)
    if scales: return pl.BlockSpec((None, None, 1, rows), lambda *where: (*at(*where)[:2], 0, at(*where)[2]))
    return pl.BlockSpec((None, None, rows, width), lambda *where: (*at(*where), 0))

  operands = [(x, False) for x in (k_BKSH, v_BKSH)]
  if k_scale_BKS is not None: operands += [(per_token(x, Q)[:, :, None], True) for x in (k_scale_BKS, v_scale_BKS)]
  whole = lambda width: pl.BlockSpec((None, None, G, width), lambda b, h, *_: (b, h, 0, 0))
  o_BKGH = pl.pallas_call(
    functools.partial(_kernel, pages=pages, slots=tiles.slots, scale=scale, quantized=k_scale_BKS is not None),
    out_shape=jax.ShapeDtypeStruct((B, K, G, H), q_BNH.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars), grid=(B, K, -(-S // tiles.slots)),
      in_specs=[whole(H), *(spec(page, scales) for _, scales in operands for page in range(pages))],
      out_specs=whole(H),
      scratch_shapes=[pltpu.VMEM((G, size), jnp.float32) for size in (LANES, LANES, H)]),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary')),
    name='decode_attention',
  )(*scalars, q_BNH.reshape(B, K, G, H), *(x for x, _ in operands for _ in range(pages)))
  return o_BKGH.reshape(B, N, H)


def _kernel(*refs, pages: int, slots: int, scale: float, quantized: bool):
  inputs = (4 if quantized else 2) * pages
  *scalars, q_ref = refs[:-4 - inputs]
  streams = [refs[-4 - inputs + i * pages:][:pages] for i in range(inputs // pages)]
  o_ref, m_ref, l_ref, acc_ref = refs[-4:]
  b, i = pl.program_id(0), pl.program_id(2)
  first, length = scalars[0][b], scalars[1][b]

  @pl.when(i == 0)
  def _start():
    m_ref[...] = jnp.full(m_ref.shape, LOWEST, jnp.float32)
    l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

  @pl.when((i * slots < length) & ((i + 1) * slots > first))
  def _block():
    seen = lambda shape, axis: _between(i * slots + lax.broadcasted_iota(jnp.int32, shape, axis), first, length)
    k, v, *scales = (_joined(stream, axis) for stream, axis in zip(streams, (0, 0, 1, 1)))
    seen_1S = seen((1, slots), 1)
    s_GS = scale * _against_keys(q_ref[...], k)
    if quantized: s_GS *= scales[0]
    s_GS = jnp.where(seen_1S, s_GS, LOWEST)
    m_old, l_old = m_ref[:, :1], l_ref[:, :1]
    m_G1 = jnp.maximum(m_old, jnp.max(s_GS, axis=1, keepdims=True))
    p_GS = jnp.where(seen_1S, jnp.exp(s_GS - m_G1), 0)
    shrink_G1 = jnp.exp(m_old - m_G1)
    l_G1 = l_old * shrink_G1 + jnp.sum(p_GS, axis=1, keepdims=True)
    # Invisible slots may hold NaN, and 0 * NaN is NaN: values are selected before the product. Integers are finite.
    if quantized: p_GS = jnp.where(seen_1S, p_GS * scales[1], 0)
    else: v = jnp.where(seen((slots, 1), 0), v, 0)
    acc_ref[...] = acc_ref[...] * shrink_G1 + _times_values(p_GS.astype(q_ref.dtype), v)
    m_ref[...] = jnp.broadcast_to(m_G1, m_ref.shape)
    l_ref[...] = jnp.broadcast_to(l_G1, l_ref.shape)

  @pl.when(i == pl.num_programs(2) - 1)
  def _end():
    l_G1 = l_ref[:, :1]
    o_ref[...] = (acc_ref[...] / jnp.where(l_G1 > 0, l_G1, 1)).astype(o_ref.dtype)


def _between(slot, first, length):
  return (slot >= first) & (slot < length)


def _joined(pages, axis: int):
  return pages[0][...] if len(pages) == 1 else jnp.concatenate([page[...] for page in pages], axis=axis)


def _parts(x, dtype):
  """The numbers of the cache in `dtype`: one array, or for packed numbers two arrays of half the head dim."""
  if x.dtype != jnp.uint8: return (x.astype(dtype),)
  return tuple(plane.astype(jnp.float32).astype(dtype) for plane in wide_planes(x, 4))


def _product(a, b, axis: int):
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _against_keys(q_GH, k_SH):
  parts = _parts(k_SH, q_GH.dtype)
  width = q_GH.shape[1] // len(parts)
  return sum(_product(q_GH[:, j * width:(j + 1) * width], k, 1) for j, k in enumerate(parts))


def _times_values(p_GS, v_SH):
  return jnp.concatenate([_product(p_GS, v, 0) for v in _parts(v_SH, p_GS.dtype)], axis=1)
