"""What every model keeps: causality, documents, caches, and that no way of running it changes what it computes."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from efficient_lm.errors import IncompatibleError
from efficient_lm.models import spec
from efficient_lm.models.decode import ready
from efficient_lm.models.moe import routing
from efficient_lm.models.transformer import unrolled
from efficient_lm.parallel.sharding import place, shardings
from efficient_lm.tree import size
from efficient_lm.weights.weight import Transposed

pytestmark = pytest.mark.usefixtures('quick_unless_long')

B, T, V, D, H, F, E = 2, 8, 24, 16, 4, 20, 4
PROMPT = 3
# Logits of order one, two layers: some hundred float32 operations of 2**-24 each, in another order.
ROUNDING = dict(rtol=1e-4, atol=2e-5)


def grouped(**changes):
  return spec.GroupedQuery(**{**dict(num_heads=4, num_kv_heads=2, head_dim=H), **changes})


def latent(query_rank):
  return spec.Latent(num_heads=2, query_rank=query_rank, kv_rank=6, nope_dim=4, rope_dim=4, value_dim=5)


def experts(**changes):
  return spec.MoE(**{**dict(num_experts=E, hidden=8), **changes})


def model_of(attention=None, mlp=None, num_layers=2, unroll=1, remat='none', **changes):
  stack = spec.Stack(num_layers=num_layers, attention=attention or grouped(), mlp=mlp or spec.SwiGLU(hidden=F),
                     unroll=unroll, remat=remat)
  return spec.Transformer(**{**dict(vocab_size=V, dim=D, stacks=(stack,)), **changes})


def pattern(block=spec.PreNorm(), num_repeats=2, **changes):
  """Unequal layers: a window and a softcap here, interpolated positions there."""
  layers = (spec.Layer(attention=grouped(window=2, softcap=2., scale=.4), mlp=spec.Gated(hidden=F, activation='gelu_tanh')),
            spec.Layer(attention=grouped(rope=spec.Rope(scaling=spec.LinearScaling(factor=4.))), mlp=spec.SwiGLU(hidden=F)))
  return model_of(stacks=(spec.Repeated(num_repeats=num_repeats, layers=layers, block=block),), **changes)


ALL_BIASED = ('query', 'key', 'value', 'output')
YARN = spec.Yarn(factor=4., original_length=16, mscale=1., mscale_all_dim=.7)
SPECS = {
  'grouped': model_of(),
  'as many kv heads': model_of(grouped(num_kv_heads=4)),
  'norm of a head': model_of(grouped(qk_norm='H')),
  'norm of all heads': model_of(grouped(qk_norm='NH')),
  'window': model_of(grouped(window=2)),
  'interleaved': model_of(grouped(rope=spec.Rope(layout='interleaved'))),
  'latent': model_of(latent(None)),
  'latent queries': model_of(latent(7)),
  'experts': model_of(mlp=experts()),
  'sigmoid experts': model_of(mlp=experts(router=routing.SigmoidTopK(top_k=2), num_shared=1,
                                          balance=(routing.LossFreeBias(),))),
  'experts with a capacity': model_of(mlp=experts(capacity=.5)),
  'two stacks, tied': model_of(tied=True, stacks=(model_of(num_layers=1).stacks[0],
                                                  model_of(latent(None), experts(), num_layers=1).stacks[0])),
  'as GPT-2': model_of(grouped(rope=None, biases=ALL_BIASED), spec.Plain(hidden=F, activation='gelu_tanh'),
                       norm=spec.LayerNorm(), ends=spec.Ends(positions=spec.Learned(length=T + 1))),
  'as Gemma 2': pattern(spec.SandwichNorm(), tied=True, ends=spec.Ends(embed_scale=4., softcap=3.)),
  'as OLMo 2': model_of(grouped(qk_norm='NH'), stacks=(dataclasses.replace(model_of().stacks[0], block=spec.PostNorm()),)),
  'experts as Qwen2-MoE': model_of(grouped(biases=ALL_BIASED[:3]), experts(
    shared=spec.SigmoidGated(inner=spec.Gated(hidden=12, biases=('gate', 'up', 'down'))))),
  'latent, YaRN': model_of(dataclasses.replace(latent(None), rope=spec.Rope(layout='interleaved', scaling=YARN))),
}
every_spec = pytest.mark.parametrize('name', SPECS)
dropless = pytest.mark.parametrize('name', [name for name in SPECS if name != 'experts with a capacity'])


def abstract(described):
  return jax.eval_shape(lambda: described.build(rngs=nnx.Rngs(0)))


@functools.cache
def drawn(name):
  """The model with numbers drawn by numpy, norm scales too."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype), abstract(SPECS[name]))


def tokens_of(seed=0):
  return np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32)


@jax.jit
def logits_of(model, tokens, positions=None, segments=None):
  return model(tokens, positions, segments).logits_BTV


@jax.jit
def cached_logits(model, tokens):
  """A prompt in one go, then a token at a time, in a cache with a slot to spare."""
  first = model(tokens[:, :PROMPT], cache=model.init_cache(B, T + 1, spec.FloatCache()))
  def one(cache, index):
    outputs = model(lax.dynamic_slice_in_dim(tokens, index, 1, axis=1), cache=cache, start=index)
    return outputs.cache, outputs.logits_BTV[:, 0]
  _, rest = lax.scan(one, first.cache, jnp.arange(PROMPT, T))
  return jnp.concatenate([first.logits_BTV, rest.swapaxes(0, 1)], 1)


@pytest.mark.thinned
@every_spec
def test_a_token_changes_no_logits_before_it(name):
  before, tokens = logits_of(drawn(name), tokens_of()), tokens_of()
  tokens[:, 5] = (tokens[:, 5] + 1) % V
  after = logits_of(drawn(name), tokens)
  assert jnp.all(jnp.any(before[:, 5:6] != after[:, 5:6], -1))
  # Bit for bit, but for experts: there a token's row moves within a product of several rows when others come or go.
  bound = 1e-5 if 'experts' in name or 'stacks' in name else 0
  np.testing.assert_allclose(before[:, :5], after[:, :5], rtol=0, atol=bound)


@pytest.mark.thinned
@dropless
def test_reading_with_a_cache_equals_reading_at_once(name):
  np.testing.assert_allclose(cached_logits(drawn(name), tokens_of()), logits_of(drawn(name), tokens_of()), **ROUNDING)


def test_what_is_read_through_a_cache_is_never_dropped_however_it_is_cut():
  """A model with a capacity then computes what the same model without one does."""
  limited, free = drawn('experts with a capacity'), drawn('experts')
  @jax.jit
  def run(model, tokens): return model(tokens, cache=model.init_cache(B, T, spec.FloatCache())).logits_BTV
  at_once = run(limited, tokens_of())
  np.testing.assert_allclose(cached_logits(limited, tokens_of()), at_once, **ROUNDING)
  np.testing.assert_allclose(at_once, logits_of(free, tokens_of()), **ROUNDING)
  assert np.abs(logits_of(limited, tokens_of()) - at_once).max() > 1e-2, 'without a cache it drops tokens'


@pytest.mark.parametrize('apart', [False, True])
def test_experts_that_choose_refuse_a_cache_in_a_line(apart):
  model = abstract(model_of(mlp=experts(router=routing.ExpertChoice(capacity=1.0))))
  if apart: model = jax.eval_shape(unrolled, model)
  with pytest.raises(IncompatibleError) as refusal: model.init_cache(B, T, spec.FloatCache())
  assert str(refusal.value) == 'expert choice looks at whole sequences: it cannot decode token by token'


@pytest.mark.parametrize('name', ['grouped', 'window', 'latent', 'experts', 'experts with a capacity', 'as GPT-2'])
def test_a_packed_document_is_read_as_if_alone(name):
  tokens, cut = tokens_of(), 3
  positions = np.broadcast_to(np.r_[np.arange(cut), np.arange(T - cut)], (B, T)).astype(np.int32)
  segments = np.broadcast_to(np.r_[np.ones(cut), np.full(T - cut, 2)], (B, T)).astype(np.int32)
  packed = logits_of(drawn(name), tokens, positions, segments)
  # Alone: first in a sequence whose other tokens are padding.
  def alone(begin, length):
    segments = np.broadcast_to(np.arange(T) < length, (B, T)).astype(np.int32)
    row = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return logits_of(drawn(name), np.roll(tokens, -begin, 1), row, segments)[:, :length]
  first, second = alone(0, cut), alone(cut, T - cut)
  np.testing.assert_allclose(packed, jnp.concatenate([first, second], 1), **ROUNDING)
  assert np.abs(packed - logits_of(drawn(name), tokens)).max() > 1e-2, 'unpacked, the second document sees the first'


@pytest.mark.thinned
@pytest.mark.parametrize('arrange', [unrolled, ready], ids=['apart', 'outputs first'])
@pytest.mark.parametrize('name', ['grouped', 'latent', 'experts'])
def test_a_model_taken_apart_for_decoding_computes_the_same(name, arrange):
  apart = arrange(drawn(name))
  assert size(apart) == size(drawn(name))
  np.testing.assert_allclose(logits_of(apart, tokens_of()), logits_of(drawn(name), tokens_of()), **ROUNDING)
  np.testing.assert_allclose(cached_logits(apart, tokens_of()), logits_of(drawn(name), tokens_of()), **ROUNDING)


@jax.jit
def slope(model, tokens):
  """Logits' spread and its gradient: any scalar that depends on all of the model will do."""
  return jax.value_and_grad(lambda model: jnp.std(jax.nn.log_softmax(model(tokens).logits_BTV)))(model)


def equally_drawn(described):
  """The numbers of 'grouped' in a model of the same shapes."""
  structure = jax.tree.structure(abstract(described))
  return jax.tree.unflatten(structure, jax.tree.leaves(drawn('grouped')))


WAYS = [dict(unroll=5), dict(remat='dots'), dict(remat='transport'), dict(remat='full')]


@pytest.mark.thinned
@pytest.mark.parametrize('way, apart', [*((way, False) for way in WAYS), ({}, True), (dict(remat='full'), True)], ids=str)
def test_unrolling_and_rematerialising_change_neither_value_nor_gradient(way, apart):
  value, gradient = slope(drawn('grouped'), tokens_of())
  model = equally_drawn(model_of(**way))
  other_value, other_gradient = slope(unrolled(model) if apart else model, tokens_of())
  if apart: gradient = unrolled(gradient)
  assert float(other_value) == pytest.approx(float(value), rel=1e-5)
  for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_two_stacks_of_one_layer_are_one_stack_of_two():
  one = model_of(num_layers=1)
  model = drawn('grouped')
  parts = jax.eval_shape(lambda: dataclasses.replace(one, stacks=one.stacks * 2).build(rngs=nnx.Rngs(0)))
  for i in range(2):
    halves = jax.tree.map(lambda a: a[i:i + 1], model.stacks[0].blocks)
    parts.stacks[i].blocks = halves
  parts.embed, parts.norm, parts.own_head = model.embed, model.norm, model.own_head
  np.testing.assert_allclose(logits_of(parts, tokens_of()), logits_of(model, tokens_of()), **ROUNDING)


def separate(model):
  """A repeated pattern as stacks of one layer, each of its own, and the same numbers in them."""
  described = pattern(num_repeats=2)
  layers = [layer for _ in range(2) for layer in described.stacks[0].layers]
  stacks = tuple(spec.Stack(num_layers=1, attention=layer.attention, mlp=layer.mlp) for layer in layers)
  parts = abstract(dataclasses.replace(described, stacks=stacks))
  for i, stack in enumerate(parts.stacks):
    stack.blocks = jax.tree.map(lambda a: a[None], model.stacks[0].layer(i))
  parts.embed, parts.norm, parts.own_head = model.embed, model.norm, model.own_head
  return parts


def test_a_repeated_pattern_is_its_layers_one_after_the_other_recomputed_too():
  described = pattern()
  described = dataclasses.replace(described, stacks=(dataclasses.replace(described.stacks[0], remat='full'),))
  rng = np.random.default_rng(0)
  model = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * .5, leaf.dtype), abstract(described))
  value, gradient = slope(model, tokens_of())
  expected, of_parts = slope(separate(model), tokens_of())
  assert float(value) == pytest.approx(float(expected), rel=1e-5)
  for a, b in zip(jax.tree.leaves(separate(gradient)), jax.tree.leaves(of_parts), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', ['as GPT-2', 'as Gemma 2'])
def test_a_mesh_of_eight_computes_what_one_device_does(name, mesh):
  """The loss and its gradient: a soft cap, biases and unequal layers are cut by the letters of their arrays."""
  def loss(model, tokens):
    outputs = model(tokens)
    nll, _ = outputs.head.nll(outputs.hidden_BTD, tokens)
    return jnp.mean(nll)
  model, tokens = drawn(name), np.repeat(tokens_of(), 2, 0)
  value, gradient = jax.jit(jax.value_and_grad(loss))(model, tokens)
  with mesh(2, 2, 1, 2):
    cut = jax.device_put(model, shardings(model, jax.sharding.get_mesh()))
    there, of_cut = jax.jit(jax.value_and_grad(loss))(cut, place({'tokens': tokens}, jax.sharding.get_mesh())['tokens'])
  assert float(there) == pytest.approx(float(value), rel=1e-5)
  for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(of_cut), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_the_loss_of_capped_logits_is_that_of_the_logits():
  model, tokens = drawn('as Gemma 2'), tokens_of()
  outputs = jax.jit(lambda model: model(tokens))(model)
  nll, lse = outputs.head.nll(outputs.hidden_BTD, tokens)
  logits = outputs.logits_BTV
  assert np.abs(logits).max() < 3
  np.testing.assert_allclose(lse, jax.nn.logsumexp(logits, -1), rtol=1e-5)
  np.testing.assert_allclose(nll, lse - jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0], rtol=1e-5, atol=1e-6)


def test_no_text_is_longer_than_the_table_of_positions():
  model, longer = drawn('as GPT-2'), np.zeros((1, T + 2), np.int32)
  for refused in (lambda: model(longer), lambda: model.init_cache(1, T + 2, spec.FloatCache())):
    with pytest.raises(IncompatibleError) as refusal: refused()
    assert str(refusal.value) == f'a text of {T + 2} tokens, where the model has {T + 1} positions'


def test_the_embedding_is_scaled_in_the_dtype_of_the_computation():
  """As Gemma does: sqrt(dim) is rounded to bfloat16 before it multiplies."""
  model = drawn('as Gemma 2')
  for dtype in ('float32', 'bfloat16'):
    model = jax.tree.map(lambda leaf: leaf, model)
    model.dtype, model.embed_scale = dtype, 33 ** .5
    expected = model.embed.take(tokens_of()).astype(dtype) * jnp.asarray(33 ** .5, dtype)
    np.testing.assert_array_equal(model.embedded(tokens_of(), None), expected)


def test_a_tied_head_is_the_embedding_read_the_other_way():
  tied, untied = (abstract(model_of(tied=flag)) for flag in (True, False))
  assert size(untied) - size(tied) == V * D
  model = drawn('two stacks, tied')
  assert isinstance(model.head, Transposed) and model.head.inner is model.embed


def test_both_uses_of_a_tied_embedding_receive_gradient():
  model = drawn('two stacks, tied')
  tokens = np.zeros((B, T), np.int32)   # the only id that is looked up
  def loss(model):
    return jnp.mean(model(tokens).logits_BTV[..., 1])   # the only one that is scored
  rows = np.abs(jax.jit(jax.grad(loss))(model).embed.materialize()).sum(-1)
  assert rows[0] > 0 and rows[1] > 0
  np.testing.assert_array_equal(rows[2:], 0)


def attention_parameters(attention):
  if isinstance(attention, spec.GroupedQuery):
    N, K = attention.num_heads, attention.num_kv_heads
    biases = sum(dict(query=N * H, key=K * H, value=K * H, output=D)[name] for name in attention.biases)
    return 2 * D * N * H + 2 * D * K * H + {'': 0, 'H': 2 * H, 'NH': (N + K) * H}[attention.qk_norm] + biases
  N, R, Q = attention.num_heads, attention.kv_rank, attention.query_rank
  queries = D * N * 8 if Q is None else D * Q + Q + Q * N * 8           # nope and rope, 4 each
  return queries + D * R + R + D * 4 + R * N * 4 + R * N * 5 + N * 5 * D


def mlp_parameters(mlp):
  if isinstance(mlp, spec.SwiGLU): return 3 * D * mlp.hidden
  if isinstance(mlp, spec.SigmoidGated): return D + mlp_parameters(mlp.inner)
  if not isinstance(mlp, spec.MoE):
    biases = sum(dict(gate=mlp.hidden, up=mlp.hidden, down=D)[name] for name in mlp.biases)
    return (3 if isinstance(mlp, spec.Gated) else 2) * D * mlp.hidden + biases
  biased = any(isinstance(term, routing.LossFreeBias) for term in mlp.balance)
  shared = 0 if mlp.shared is None else mlp_parameters(mlp.shared)
  return D * E + (E + mlp.num_shared) * 3 * D * mlp.hidden + E * biased + shared


def layers_of(stack):
  """(count, description) of each layer of a pattern."""
  if isinstance(stack, spec.Stack): return [(stack.num_layers, stack)]
  return [(stack.num_repeats, layer) for layer in stack.layers]


@every_spec
def test_parameters_by_hand(name):
  described = SPECS[name]
  norm = D * (1 + isinstance(described.norm, spec.LayerNorm))
  layers = sum(count * (attention_parameters(layer.attention) + mlp_parameters(layer.mlp) +
                        2 * norm * (stack.block.before + stack.block.after))
               for stack in described.stacks for count, layer in layers_of(stack))
  positions = D * described.ends.positions.length if described.ends.positions else 0
  assert size(abstract(described)) == (1 if described.tied else 2) * V * D + positions + norm + layers


@pytest.mark.parametrize('name', ['grouped', 'experts'])
def test_bfloat16_computes_small_and_keeps_float32_parameters_and_gradients(name):
  model = drawn(name)
  small = jax.tree.unflatten(jax.tree.structure(abstract(dataclasses.replace(SPECS[name], dtype='bfloat16'))),
                             jax.tree.leaves(model))
  hidden, logits = jax.eval_shape(lambda model: ((y := model(tokens_of())).hidden_BTD, y.logits_BTV), small)
  assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(jax.eval_shape(slope, small, tokens_of())))
  exact, rounded = np.asarray(logits_of(model, tokens_of())), np.asarray(logits_of(small, tokens_of()))
  error = np.sqrt(np.mean((rounded - exact) ** 2, -1) / np.mean(exact ** 2, -1))
  # A dozen roundings of 2**-9 one after the other add up to a few per cent; a token whose second and third expert
  # score alike may go to the other one, so it is the typical token that is held to it.
  assert np.median(error) < 0.05


def test_layers_report_by_stack_with_a_leading_layer_or_one_by_one_where_a_stack_is_taken_apart():
  dense, mixture = jax.eval_shape(lambda model: model(tokens_of()), drawn('two stacks, tied')).aux
  assert dense is None and mixture.rows_E.shape == (1, E)
  apart = jax.eval_shape(lambda model: unrolled(model)(tokens_of()), drawn('experts')).aux
  assert [report.rows_E.shape for report in apart] == [(E,)] * 2
