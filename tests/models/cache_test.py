"""A cache gives back what was put in, as its format rounds it, however it was put in; attention over it is attention."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from efficient_lm.models import spec
from efficient_lm.models.cache import KeyValues
from efficient_lm.ops.attention import attention
from efficient_lm.ops.decode_attention.cache import Stored
from efficient_lm.ops.quantize import quantize_cache, quantize_tiles
from efficient_lm.parallel.sharding import wait_on_cpu
from efficient_lm.tree import num_bytes

B, K, S, H = 2, 2, 24, 8
INTEGERS = {'int8': spec.IntegerCache(), 'groups of 3, 8 bits': spec.IntegerCache(8, 3),
            'groups of 8, 4 bits': spec.IntegerCache(4, 8)}
TILES = {'tiles of 8, 4 bits': spec.TiledCache(group=8, part=2)}
FORMATS = {**spec.CACHES, **INTEGERS, **TILES, 'int4 by token': spec.IntegerCache(4)}
every_format = pytest.mark.parametrize('name', ['float', *INTEGERS, *TILES])
# Logits of order one, two layers: some hundred float32 operations of 2**-24 each, in another order.
ROUNDING = dict(rtol=1e-4, atol=2e-5)


def drawn(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


append = jax.jit(lambda rows, new, start: rows.append(new, start))


def filled(name, x_BTKH, pieces):
  """Rows that got x in pieces of these sizes."""
  rows, start = FORMATS[name].keys(B, K, S, H, jnp.float32), 0
  for size in pieces:
    rows = append(rows, x_BTKH[:, start:start + size], start)
    start += size
  return rows


def rounded(form, x_BTKH):
  """Keys as quantizing all of them at once rounds them, the last token standing for what is missing of the last group."""
  T = x_BTKH.shape[1]
  padded = jnp.pad(x_BTKH.swapaxes(1, 2), ((0, 0), (0, 0), (0, -T % form.group), (0, 0)), mode='edge')
  if isinstance(form, spec.TiledCache): stored = quantize_tiles(padded, bits=form.bits, group=form.group, part=1)
  else: stored = quantize_cache(padded, bits=form.bits, group=form.group)
  return Stored(*stored).numbers().swapaxes(1, 2)[:, :T]


@pytest.mark.thinned
@every_format
@settings(deadline=None, max_examples=10)
@given(pieces=st.lists(st.sampled_from([1, 7]), min_size=1, max_size=9).filter(lambda sizes: sum(sizes) <= S))
def test_rows_are_those_rounded_all_at_once_whatever_the_pieces_they_came_in(name, pieces):
  x, form = drawn(0, B, sum(pieces), K, H), FORMATS[name]
  got = filled(name, x, pieces).read(jnp.float32)[:, :sum(pieces)]
  # Compiled or not, a step may differ in its last bit.
  np.testing.assert_allclose(got, x if name == 'float' else rounded(form, x), rtol=1e-6)


@pytest.mark.parametrize('name', ['float', *INTEGERS])
def test_a_row_is_at_most_half_a_step_away(name):
  x, form = drawn(1, B, S, K, H), FORMATS[name]
  error = np.abs(filled(name, x, [S]).read(jnp.float32, S) - x)
  if name == 'float': assert error.max() == 0
  else:
    largest = np.abs(x).max(-1).reshape(B, S // form.group, form.group, K).max(2)
    half_step = np.repeat(largest, form.group, 1) / (2 ** (form.bits - 1) - 1) / 2
    assert np.all(error <= half_step[..., None] * (1 + 1e-5)) and error.max() > 0.9 * half_step.min()


@pytest.mark.parametrize('name', TILES)
def test_a_key_is_at_most_half_a_step_of_its_channel_away(name):
  """However large another channel is."""
  form, x = FORMATS[name], drawn(1, B, S, K, H).at[..., 3].multiply(1000).at[..., 5].add(50)
  error = np.abs(filled(name, x, [S]).read(jnp.float32, S) - x)
  padded = jnp.pad(x, ((0, 0), (0, -S % form.group), (0, 0), (0, 0)), mode='edge')
  groups = np.asarray(padded).reshape(B, -1, form.group, K, H)
  half_step = np.repeat((groups.max(2) - groups.min(2)) / (2 ** form.bits - 1) / 2, form.group, 1)[:, :S]
  # Scale and shift are in float16, as the numbers themselves might be.
  assert np.all(error <= half_step * 1.01 + np.abs(x).max((1, 2), keepdims=True) * 2. ** -11) and error[..., 3].max() > 1


@every_format
@pytest.mark.parametrize('window', [None, 5])
def test_one_token_sees_what_attention_of_the_rows_gives(name, window):
  length, N = 17, 2 * K
  cache = KeyValues(*(filled(name, drawn(seed, B, length, K, H), [length]) for seed in (2, 3)))
  q = drawn(4, B, 1, N, H)
  wanted = attention(q, cache.keys.read(q.dtype), cache.values.read(q.dtype), start=length - 1, window=window,
                     implementation='reference')
  got = jax.jit(lambda cache, q: cache.attend(q, length - 1, None, window))(cache, q)
  np.testing.assert_allclose(got, wanted, **ROUNDING)


def test_several_tokens_over_a_float_cache_are_attention_bit_for_bit():
  x, q = drawn(5, B, S, K, H), drawn(6, B, 3, 2 * K, H)
  cache = KeyValues(*(filled('float', x, [20]),) * 2)
  one = jax.jit(lambda cache, q, start: cache.attend(q, start))(cache, q, 17)
  other = jax.jit(lambda x, q, start: attention(q, x, x, start=start))(x, q, 17)
  np.testing.assert_array_equal(one, other)


def model_of(attention):
  """A model of two layers with numbers drawn by numpy."""
  stack = spec.Stack(num_layers=2, attention=attention, mlp=spec.SwiGLU(hidden=20))
  described = spec.Transformer(vocab_size=24, dim=16, stacks=(stack,))
  rng = np.random.default_rng(0)
  abstract = jax.eval_shape(lambda: described.build(rngs=nnx.Rngs(0)))
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype), abstract)


MODELS = {
  'grouped': spec.GroupedQuery(num_heads=4, num_kv_heads=2, head_dim=4),
  'window': spec.GroupedQuery(num_heads=4, num_kv_heads=2, head_dim=4, window=3),
  'latent': spec.Latent(num_heads=2, query_rank=None, kv_rank=6, nope_dim=4, rope_dim=4, value_dim=5),
}


@functools.partial(jax.jit, static_argnames=('form', 'prompt'))
def logits_through(model, tokens, form, prompt):
  """A prompt at once, then a token at a time."""
  size, T = tokens.shape
  cache, parts = model.init_cache(size, T, form), []
  if prompt:
    outputs = model(tokens[:, :prompt], cache=cache)
    cache, parts = outputs.cache, [outputs.logits_BTV]
  def one(cache, index):
    outputs = model(lax.dynamic_slice_in_dim(tokens, index, 1, axis=1), cache=cache, start=index)
    return outputs.cache, outputs.logits_BTV[:, 0]
  _, rest = lax.scan(one, cache, jnp.arange(prompt, T))
  return jnp.concatenate([*parts, rest.swapaxes(0, 1)], 1)


def tokens_of(size=2):
  return np.random.default_rng(1).integers(0, 24, (size, 8)).astype(np.int32)


@pytest.mark.thinned
@pytest.mark.parametrize('form', ['float', 'int8', 'int4 by token'])
@pytest.mark.parametrize('name', MODELS)
def test_a_prompt_read_at_once_is_that_read_token_by_token(name, form):
  model, form = model_of(MODELS[name]), FORMATS[form]
  one_by_one = logits_through(model, tokens_of(), form, 0)
  np.testing.assert_allclose(logits_through(model, tokens_of(), form, 5), one_by_one, **ROUNDING)


@pytest.mark.parametrize('name', MODELS)
def test_fewer_bits_are_further_from_reading_without_a_cache(name):
  model = model_of(MODELS[name])
  exact = jax.jit(lambda model, tokens: model(tokens).logits_BTV)(model, tokens_of())
  error = {form: float(jnp.abs(logits_through(model, tokens_of(), FORMATS[form], 0) - exact).max())
           for form in ('float', 'int8', 'int4 by token', 'int4')}
  # Logits are about 2. Half a step is 1/254 or 1/14 of a row's largest number; two layers add a few of them up.
  assert error['float'] < 1e-4 and 1e-3 < error['int8'] < 0.04 and 3 * error['int8'] < error['int4 by token'] < 1
  assert error['int8'] < error['int4'] < error['int4 by token']


@pytest.mark.thinned
@pytest.mark.parametrize('form', ['float', 'int8', 'tiles of 8, 4 bits'])
@pytest.mark.parametrize('name', ['grouped', 'latent'])
def test_eight_devices_decode_as_one(mesh, name, form):
  model, tokens = model_of(MODELS[name]), tokens_of(4)
  alone = logits_through(model, tokens, FORMATS[form], 3)
  with mesh(2, 1, 2, 2): together = wait_on_cpu(logits_through(model, tokens, FORMATS[form], 3))
  np.testing.assert_allclose(together, alone, **ROUNDING)


def test_heads_and_sequences_of_a_cache_lie_on_the_devices_that_use_them(mesh):
  model = model_of(MODELS['grouped'])
  read = jax.jit(lambda model, tokens: model(tokens, cache=model.init_cache(*tokens.shape, spec.IntegerCache())).cache)
  with mesh(2, 1, 2, 2): cache = wait_on_cpu(read(model, tokens_of(4)))
  keys = jax.tree.leaves(cache)[0]
  assert keys.shape == (2, 4, 2, 8, 4) and keys.addressable_shards[0].data.shape == (2, 1, 1, 8, 4)


def test_a_cache_takes_the_bytes_that_its_format_promises():
  layers = model_of(MODELS['grouped']).stacks[0]
  dims = 2 * 2 * 2 * 3 * 16   # layers, keys and values, heads, sequences, slots
  size = lambda form: num_bytes(layers.init_cache(3, 16, jnp.dtype('bfloat16'), form))
  assert size(FORMATS['float']) == dims * 4 * 2
  padding = 2 * 2 * 3 * 4   # layers, keys and values, sequences: an int32 each
  assert size(FORMATS['int8']) == dims * (4 + 4) + padding
  assert size(FORMATS['int4 by token']) == dims * (2 + 4) + padding
  # One group more than fills the slots, and seven tokens of a group in bfloat16.
  assert size(FORMATS['groups of 8, 4 bits']) == dims // 16 * (24 * 2 + 3 * 4 + 7 * 4 * 2) + padding
  keys = 24 * 2 + 3 * 4 * (2 + 2) + 7 * 4 * 2   # scale and shift of each channel
  values = 24 * (2 + 2 * (2 + 2))               # of each token and half of its channels
  assert size(FORMATS['tiles of 8, 4 bits']) == dims // 32 * (keys + values) + padding


def test_an_odd_row_in_four_bits_is_refused():
  with pytest.raises(ValueError, match='rows of 7: must be even'): spec.CACHES['int4'].keys(1, 1, 4, 7, jnp.float32)
