"""Attention layers: projections around the one `ops.attention`, and what each of them keeps in a cache.

Both layers are called as `layer(x_BTD, positions_BT, segments_BT, cache, start)`. Without a cache the T tokens attend to
each other (within their document, where `segments_BT` is given). With one, T new tokens are written at `start` and attend
to all that the cache holds up to themselves; the updated cache is returned. `models/cache.py` says what it holds. One new
token of each sequence (T = 1) may have a `start` of its own, start_B: then sequences are of several lengths.
"""
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.models.cache import KeyValues, attend
from efficient_lm.models.layers import RMSNorm, apply_rope
from efficient_lm.models.mlp import add_biases
from efficient_lm.ops.attention import attention
from efficient_lm.parallel.sharding import constrain
from efficient_lm.weights.weight import initial


class GroupedQueryAttention(nnx.Module):
  """N query heads share K key-value heads (Ainslie et al. 2023); the cache holds the K rotated keys and the values."""
  # Of models that were stored before there were any: what is None is no attribute of its own.
  scaling = softcap = scale = None

  def __init__(self, spec, site, *, rngs: nnx.Rngs):
    N, K, H, D = spec.num_heads, spec.num_kv_heads, spec.head_dim, site.dim
    sizes = dict(D=D, N=N, K=K, H=H)
    self.query = initial(rngs.params(), sizes, 'DNH', 'D')
    self.key = initial(rngs.params(), sizes, 'DKH', 'D')
    self.value = initial(rngs.params(), sizes, 'DKH', 'D')
    self.output = initial(rngs.params(), sizes, 'NHD', 'NH', scale=(2 * site.depth) ** -.5)
    norms = {'': None, 'H': ((H,), (H,), 'H', 'H'), 'NH': ((N, H), (K, H), 'NH', 'KH')}[spec.qk_norm]
    self.query_norm = RMSNorm(norms[0], norms[2], site.norm_eps) if norms else None
    self.key_norm = RMSNorm(norms[1], norms[3], site.norm_eps) if norms else None
    self.theta, self.layout = (spec.rope.theta, spec.rope.layout) if spec.rope else (None, None)
    self.window, self.cache_shape = spec.window, (K, H)
    if spec.rope and spec.rope.scaling: self.scaling = dataclasses.replace(spec.rope.scaling)
    if spec.softcap is not None: self.softcap = spec.softcap
    if spec.scale is not None: self.scale = spec.scale
    add_biases(self, spec.biases)

  def init_cache(self, batch: int, length: int, dtype, form):
    K, H = self.cache_shape
    return KeyValues(form.keys(batch, K, length, H, dtype), form.values(batch, K, length, H, dtype))

  def __call__(self, x_BTD, positions_BT, segments_BT=None, cache=None, start=0):
    q_BTNH = self.query.contract('BTD,DNH->BTNH', x_BTD)
    k_BTKH = self.key.contract('BTD,DKH->BTKH', x_BTD)
    v_BTKH = self.value.contract('BTD,DKH->BTKH', x_BTD)
    if self.query_norm is not None: q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
    if self.theta is not None:
      q_BTNH, k_BTKH = (apply_rope(x, positions_BT, self.theta, self.layout, self.scaling) for x in (q_BTNH, k_BTKH))
    q_BTNH, options = constrain(q_BTNH, 'BTNH'), dict(window=self.window, scale=self.scale, softcap=self.softcap)
    if cache is None: o_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, **options)
    else:
      cache = cache.append(k_BTKH, v_BTKH, start)
      o_BTNH = cache.attend(q_BTNH, start, segments_BT, **options)
    return self.output.contract('BTNH,NHD->BTD', o_BTNH), cache


class LatentAttention(nnx.Module):
  """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

  Keys and values are linear in a latent of R numbers a token, except one rotated key that all heads share. Training
  expands the latent into heads. Decoding does the reverse (the paper's absorption): queries are mapped into the latent
  space, where attention is that of N queries and a single key-value head, so the cache is R + H numbers a token.
  """
  scaling = None   # of models that were stored before there were any

  def __init__(self, spec, site, *, rngs: nnx.Rngs):
    D, N, R, Q = site.dim, spec.num_heads, spec.kv_rank, spec.query_rank
    nope, rope, value = spec.nope_dim, spec.rope_dim, spec.value_dim
    key = rngs.params
    if Q is None:
      self.query_down, self.query_norm = None, None
      self.query_nope = initial(key(), dict(D=D, N=N, H=nope), 'DNH', 'D')
      self.query_rope = initial(key(), dict(D=D, N=N, H=rope), 'DNH', 'D')
    else:
      self.query_down = initial(key(), dict(D=D, R=Q), 'DR', 'D')
      self.query_norm = RMSNorm((Q,), 'R', site.norm_eps)
      self.query_nope = initial(key(), dict(R=Q, N=N, H=nope), 'RNH', 'R')
      self.query_rope = initial(key(), dict(R=Q, N=N, H=rope), 'RNH', 'R')
    self.latent_down = initial(key(), dict(D=D, R=R), 'DR', 'D')
    self.latent_norm = RMSNorm((R,), 'R', site.norm_eps)
    self.key_rope = initial(key(), dict(D=D, H=rope), 'DH', 'D')
    self.key_up = initial(key(), dict(R=R, N=N, H=nope), 'RNH', 'R')
    self.value_up = initial(key(), dict(R=R, N=N, H=value), 'RNH', 'R')
    self.output = initial(key(), dict(N=N, H=value, D=D), 'NHD', 'NH', scale=(2 * site.depth) ** -.5)
    self.theta, self.layout = spec.rope.theta, spec.rope.layout
    self.scale, self.cache_sizes = (nope + rope) ** -.5, (R, rope)
    if spec.rope.scaling:
      self.scaling = dataclasses.replace(spec.rope.scaling)
      self.scale *= self.scaling.softmax

  def init_cache(self, batch: int, length: int, dtype, form):
    latent, key = (form.keys(batch, 1, length, size, dtype) for size in self.cache_sizes)
    return {'latent': latent, 'key': key}

  def _queries(self, x_BTD, positions_BT):
    """Unrotated and rotated parts of the queries, (B, T, N, H) each."""
    if self.query_down is None: c, letter = x_BTD, 'D'
    else: c, letter = self.query_norm(self.query_down.contract('BTD,DR->BTR', x_BTD)), 'R'
    nope_BTNH = self.query_nope.contract(f'BT{letter},{letter}NH->BTNH', c)
    rope_BTNH = self.query_rope.contract(f'BT{letter},{letter}NH->BTNH', c)
    return nope_BTNH, apply_rope(rope_BTNH, positions_BT, self.theta, self.layout, self.scaling)

  def __call__(self, x_BTD, positions_BT, segments_BT=None, cache=None, start=0):
    nope_BTNH, rope_BTNH = self._queries(x_BTD, positions_BT)
    c_BTR = self.latent_norm(self.latent_down.contract('BTD,DR->BTR', x_BTD))
    k_BT1H = self.key_rope.contract('BTD,DH->BTH', x_BTD)[:, :, None]
    k_BT1H = apply_rope(k_BT1H, positions_BT, self.theta, self.layout, self.scaling)
    if cache is None:
      o_BTNH = self._expanded(nope_BTNH, rope_BTNH, c_BTR, k_BT1H, segments_BT)
    else:
      cache = {'latent': cache['latent'].append(c_BTR[:, :, None], start), 'key': cache['key'].append(k_BT1H, start)}
      o_BTNH = self._absorbed(nope_BTNH, rope_BTNH, cache, start)
    return self.output.contract('BTNH,NHD->BTD', o_BTNH), cache

  def _expanded(self, nope_BTNH, rope_BTNH, c_BTR, k_BT1H, segments_BT):
    q = jnp.concatenate([nope_BTNH, rope_BTNH], -1)
    k_nope = self.key_up.contract('BTR,RNH->BTNH', c_BTR)
    k = jnp.concatenate([k_nope, jnp.broadcast_to(k_BT1H, (*k_nope.shape[:-1], k_BT1H.shape[-1]))], -1)
    v = self.value_up.contract('BTR,RNH->BTNH', c_BTR)
    return attend(constrain(q, 'BTNH'), k, v, segments_BT, scale=self.scale)

  def _absorbed(self, nope_BTNH, rope_BTNH, cache, start):
    dtype = nope_BTNH.dtype
    q = jnp.concatenate([self.key_up.contract('BTNH,RNH->BTNR', nope_BTNH), rope_BTNH], -1)
    c_BS1R, k_BS1H = cache['latent'].read(dtype), cache['key'].read(dtype)
    attend = lambda q, k, v, start: attention(q, k, v, start=start, scale=self.scale)
    alone = lambda q, k, v, start: attend(q[None], k[None], v[None], start)[0]   # one sequence of the batch
    o_BTNR = (jax.vmap(alone) if jnp.ndim(start) else attend)(q, jnp.concatenate([c_BS1R, k_BS1H], -1), c_BS1R, start)
    return self.value_up.contract('BTNR,RNH->BTNH', o_BTNR)
