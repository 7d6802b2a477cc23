"""Training attention on TPU: the splash attention kernels that come with JAX, forward and backward.

They take one sequence of (heads, T, H), document ids, and masks as functions of positions, whose empty blocks they skip. The
batch is mapped over. The kernels do not scale scores, so that queries are scaled. T is padded to whole blocks with tokens
after all others, which no query sees. Products have the TPU's default precision.

The tests interpret the kernels, and they compile for v5e, v5p, v6e and tpu7x. They have not run on a TPU here. The sizes of
their blocks are what fits, and have not been tuned.
"""
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LANES, MAX_BLOCK = 128, 512


def attention(q_BTNH, k_BTKH, v_BTKH, *, start=0, segments_BS=None, window=None, scale: float, block: int | None = None,
              interpret: bool = False):
  """See the API. block: tokens of the kernels' blocks, a multiple of 128. interpret: run them on any device, slowly."""
  T, N = q_BTNH.shape[1:3]
  block = block or next(size for size in (MAX_BLOCK, 256, LANES) if size == LANES or not _whole(T, LANES) % size)
  length = _whole(T, block)
  heads = lambda x_BTNH: jnp.pad(x_BTNH.swapaxes(1, 2), ((0, 0), (0, 0), (0, length - T), (0, 0)))
  run = _kernel(N, length, T if window is None else window, block, interpret)
  q_BNTH = heads((scale * q_BTNH.astype(jnp.float32)).astype(q_BTNH.dtype))
  if segments_BS is None: o_BNTH = jax.vmap(run)(q_BNTH, heads(k_BTKH), heads(v_BTKH))
  else:
    segments_BT = jnp.pad(segments_BS.astype(jnp.int32), ((0, 0), (0, length - T)))
    o_BNTH = jax.vmap(run)(q_BNTH, heads(k_BTKH), heads(v_BTKH), kernels.SegmentIds(segments_BT, segments_BT))
  return o_BNTH[:, :, :T].swapaxes(1, 2)


def refuses(q_BTNH, k_BSKH, v_BSKH, *, start, segments_BS, window, scale, softcap=None) -> str:
  """Why the kernels cannot take such arguments, '' if they can."""
  T = q_BTNH.shape[1]
  if softcap is not None: return 'a soft cap is not passed on to it'
  if not (isinstance(start, int) and start == 0) or k_BSKH.shape[1] != T: return 'it is for training, without a cache'
  if T < LANES: return f'{T} tokens are less than one block of {LANES}'
  return ''


def _whole(T: int, block: int) -> int:
  return -(-T // block) * block


def _kernel(num_heads: int, length: int, window: int, block: int, interpret: bool):
  """The kernels for N query heads, whose mask is causal and, below the full length, local."""
  shape = length, length
  mask = masks.CausalMask(shape) if window >= length else masks.LocalMask(shape, (window - 1, 0), 0)
  sizes = kernels.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
                             block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block)
  return kernels.make_splash_mha(masks.MultiHeadMask([mask] * num_heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
                                 interpret=interpret)
