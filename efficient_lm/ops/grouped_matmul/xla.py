"""The grouped product in plain jnp: rows padded to blocks, one batched product."""

import jax.numpy as jnp


def grouped_matmul(x_MK, w_EKN, sizes_E):
  """One product per block of rows, each block within one group; see the API for the arguments."""
  M, K = x_MK.shape
  E = w_EKN.shape[0]
  block = 64
  blocks = -(-M // block) + E
  num_blocks_E = -(-sizes_E // block)
  block_end_E = jnp.cumsum(num_blocks_E)
  expert_of_block = jnp.minimum(jnp.searchsorted(block_end_E, jnp.arange(blocks), side='right'), E - 1)
  end_E = jnp.cumsum(sizes_E)
  row_M = jnp.arange(M)
  group_M = jnp.searchsorted(end_E, row_M, side='right')
  g = jnp.minimum(group_M, E - 1)
  slot_M = jnp.where(group_M < E, (block_end_E - num_blocks_E)[g] * block + row_M - (end_E - sizes_E)[g], blocks * block)
  padded = jnp.zeros((blocks * block, K), x_MK.dtype).at[slot_M].set(x_MK, mode='drop')
  y = jnp.einsum('bmk,bkn->bmn', padded.reshape(blocks, block, K), w_EKN[expert_of_block],
                 preferred_element_type=jnp.float32).astype(x_MK.dtype)
  return jnp.take(y.reshape(blocks * block, -1), slot_M, axis=0, mode='fill', fill_value=0)
