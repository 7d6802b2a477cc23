"""Decoding draws from the model's own distribution, whatever the bursts, and never what may not be drawn."""
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.errors import IncompatibleError
from efficient_lm.models import decode, spec
from efficient_lm.models.decode import Sampling, ready, stream, until_stop
from efficient_lm.models.moe import routing

pytestmark = pytest.mark.usefixtures('quick_unless_long')

V, TOKENIZER = 32, 27
PROMPT = np.random.default_rng(1).integers(0, TOKENIZER, (2, 4)).astype(np.int32)


@functools.cache
def drawn(kind='dense'):
  """A model with numbers drawn by numpy, in which the padding of the vocabulary is likely."""
  mlp = {'experts': spec.MoE(num_experts=4, hidden=8, router=routing.SoftmaxTopK(top_k=2))}.get(kind, spec.SwiGLU(hidden=24))
  attention = spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8, window=3 if kind == 'windowed' else None)
  if kind == 'latent': attention = spec.Latent(num_heads=2, query_rank=None, kv_rank=8, nope_dim=8, rope_dim=4, value_dim=8)
  stack = spec.Stack(num_layers=2, attention=attention, mlp=mlp)
  described = spec.Transformer(vocab_size=V, dim=16, stacks=(stack,))
  rng = np.random.default_rng(0)
  abstract = jax.eval_shape(lambda: described.build(rngs=nnx.Rngs(0)))
  model = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype), abstract)
  padded = model.own_head.materialize().at[:, TOKENIZER:].multiply(5)
  model.own_head.array.set_value(padded)
  return model


def text(num_tokens=9, sampling=Sampling(), seed=0, kind='dense', prompt=PROMPT, **options):
  pieces = stream(drawn(kind), prompt, num_tokens, sampling=sampling, seed=seed, vocab_size=TOKENIZER,
                  **{'burst_size': 5, **options})
  return np.concatenate(list(pieces), 1)


kept = jax.jit(lambda sampling, logits: sampling.keep(logits))
draw_of = jax.jit(lambda logits, sampling: sampling(logits, jax.random.key(0)))


@functools.cache
def greedy():
  return text(sampling=Sampling(0.0))


@pytest.mark.parametrize('kind', ['dense', 'experts'])
def test_greedy_takes_the_argmax_of_the_full_forward_pass(kind):
  ids = text(sampling=Sampling(0.0), kind=kind)
  whole = np.concatenate([PROMPT, ids], 1)
  logits = np.asarray(jax.jit(lambda model, tokens: model(tokens).logits_BTV)(drawn(kind), whole))
  expected = logits[:, PROMPT.shape[1] - 1:-1, :TOKENIZER].argmax(-1)
  np.testing.assert_array_equal(ids, expected)


def test_padding_of_the_vocabulary_is_never_drawn_though_likely():
  whole = np.concatenate([PROMPT, greedy()], 1)
  logits = np.asarray(jax.jit(lambda model, tokens: model(tokens).logits_BTV)(drawn(), whole))
  assert np.mean(logits.argmax(-1) >= TOKENIZER) > 0.2, 'the model would often draw it'
  assert text(40, Sampling(3.0)).max() < TOKENIZER


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
  np.testing.assert_array_equal(text(seed=3), text(seed=3))
  assert np.any(text(seed=3) != text(seed=4))


def test_two_sequences_of_a_batch_draw_independently():
  same = np.repeat(PROMPT[:1], 2, 0)
  ids = text(prompt=same)
  assert np.any(ids[0] != ids[1])


@pytest.mark.parametrize('burst_size', [1, 4, 16])
def test_a_text_does_not_depend_on_how_it_was_cut_into_bursts(burst_size):
  np.testing.assert_array_equal(text(burst_size=burst_size), text())


@pytest.mark.parametrize('num_tokens, pieces', [(0, []), (3, [3]), (5, [5]), (12, [5, 5, 2])])
def test_exactly_the_tokens_asked_for_arrive_burst_by_burst(num_tokens, pieces):
  arrived = stream(drawn(), PROMPT, num_tokens, vocab_size=TOKENIZER, burst_size=5)
  assert [piece.shape for piece in arrived] == [(2, count) for count in pieces]


def test_the_most_likely_token_is_the_first_of_the_largest_or_of_nan():
  rng = np.random.default_rng(0)
  logits_BV = rng.integers(-2, 3, (64, 12)).astype(np.float32)   # many ties
  logits_BV[::4, 5:7] = np.nan
  logits_BV[1::4] = -np.inf
  logits_BV[2::4, [3, 9]] = np.inf
  np.testing.assert_array_equal(jax.jit(decode.most_likely)(logits_BV), np.argmax(logits_BV, -1))


def test_top_k_of_1_is_greedy():
  np.testing.assert_array_equal(text(sampling=Sampling(top_k=1)), greedy())


def test_a_tiny_top_p_is_greedy():
  np.testing.assert_array_equal(text(sampling=Sampling(top_p=1e-6)), greedy())


def test_a_model_made_ready_before_draws_the_same_and_is_not_copied_again():
  decoder = ready(drawn())
  assert ready(decoder) is decoder
  ids = np.concatenate(list(stream(decoder, PROMPT, 9, vocab_size=TOKENIZER, burst_size=5)), 1)
  np.testing.assert_array_equal(ids, text())


def test_a_cache_in_eight_bits_draws_nearly_the_same_text():
  """Greedily, from logits that two heads of eight numbers have moved by a per cent: a near tie may fall the other way."""
  pieces = stream(drawn(), PROMPT, 9, sampling=Sampling(0.0), vocab_size=TOKENIZER, burst_size=5, cache=spec.CACHES['int8'])
  assert np.mean(np.concatenate(list(pieces), 1) == greedy()) > 0.5


@functools.cache
def with_positions():
  """As `drawn`, of unequal layers, with eleven positions."""
  attention = spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8, rope=None, biases=('query', 'output'))
  layers = tuple(spec.Layer(attention=attention, mlp=spec.Plain(hidden=24, activation=name)) for name in ('relu', 'gelu'))
  described = spec.Transformer(vocab_size=V, dim=16, stacks=(spec.Repeated(num_repeats=2, layers=layers),),
                               ends=spec.Ends(positions=spec.Learned(length=11), softcap=4.))
  rng = np.random.default_rng(0)
  abstract = jax.eval_shape(lambda: described.build(rngs=nnx.Rngs(0)))
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype), abstract)


def test_a_text_may_be_as_long_as_the_positions_and_no_longer():
  """The last burst, which would go on past them, ends with them."""
  def draw(count):
    pieces = stream(with_positions(), PROMPT, count, sampling=Sampling(0.0), vocab_size=TOKENIZER, burst_size=5)
    return np.concatenate(list(pieces), 1)
  ids = draw(7)   # 4 + 7 = 11
  whole = np.concatenate([PROMPT, ids], 1)
  logits = np.asarray(jax.jit(lambda model, tokens: model(tokens).logits_BTV)(with_positions(), whole))
  np.testing.assert_array_equal(ids, logits[:, PROMPT.shape[1] - 1:-1, :TOKENIZER].argmax(-1))
  with pytest.raises(IncompatibleError, match='a text of 12 tokens, where the model has 11 positions'): draw(8)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 5), st.lists(st.integers(0, TOKENIZER - 1), max_size=8).map(tuple))
def test_after_its_first_stop_a_row_has_nothing_but_that_and_before_it_what_it_would_have_had(seed, stops):
  free, ended = text(17, seed=seed), text(17, seed=seed, stops=stops)
  lengths = []
  for whole, row in zip(free, ended, strict=True):
    drawn_before = until_stop(whole, stops)
    np.testing.assert_array_equal(until_stop(row, stops), drawn_before)
    if len(drawn_before) < len(whole): np.testing.assert_array_equal(row[len(drawn_before):], whole[len(drawn_before)])
    lengths.append(min(len(drawn_before) + 1, len(whole)))
  assert ended.shape == (2, max(lengths)), 'the text ends with the row that stops last, or with the tokens asked for'


@pytest.mark.parametrize('prompt', [np.zeros((1, 0), np.int32), [[]], []], ids=str)
def test_an_empty_prompt_is_an_error(prompt):
  with pytest.raises(ValueError, match='at least one token'): text(prompt=prompt)


@pytest.mark.thinned
@pytest.mark.parametrize('kind, cache', [('windowed', 'int8'), ('latent', 'int4'), ('experts', 'float'),
                                         ('windowed', 'int4')])
def test_prompts_of_several_lengths_are_continued_as_each_alone(kind, cache):
  """Greedily, past the longest prompt, and in bursts that are shorter than the gap between the two."""
  prompts = [[5, 3], [*PROMPT[1], 7, 3, 9, 11, 2]]
  draw = functools.partial(text, 10, Sampling(0.0), kind=kind, cache=spec.CACHES[cache])
  together = draw(prompt=prompts)
  for prompt, row in zip(prompts, together, strict=True): np.testing.assert_array_equal(row, draw(prompt=[prompt])[0])


def test_a_prompt_alone_draws_what_one_of_several_lengths_draws_from_the_same_distribution():
  """Rows of a batch draw independently, and the padding of the vocabulary is never drawn."""
  ids = text(40, Sampling(3.0), prompt=[[1], [1], [1, 2, 3]])
  assert ids.max() < TOKENIZER and np.any(ids[0] != ids[1])


def live_bytes():
  """Of all arrays there are, each buffer counted once."""
  buffers = {leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in jax.live_arrays()
             if not leaf.is_deleted() and isinstance(leaf.sharding, jax.sharding.SingleDeviceSharding)}
  return sum(buffers.values())


@pytest.mark.parametrize('kind', ['dense', 'experts'])
def test_a_model_that_may_be_given_up_is_made_ready_without_a_second_copy_of_it(kind, monkeypatch):
  """At no time is there more than the model and the largest of its arrays once more; and it is the same in the end."""
  model, kept = jax.tree.map(jnp.copy, drawn(kind)), drawn(kind)
  wanted = jax.device_get(jax.tree.leaves(ready(kept)))
  seen, at = [], decode._at
  def counted(function):
    def run(*arguments):
      made = function(*arguments)
      seen.append(live_bytes())
      return made
    return run
  monkeypatch.setattr(decode, '_at', counted(at))
  monkeypatch.setattr(decode, '_for_decoding', counted(decode._for_decoding))
  largest = max(leaf.nbytes for leaf in jax.tree.leaves(model))
  gc.collect()
  before = live_bytes()
  given_up = ready(model, donate=True)
  # An index of a layer is an array of four bytes.
  assert len(seen) > 10 and max(seen) <= before + largest + 64
  assert live_bytes() <= before + 64 and all(leaf.is_deleted() for leaf in jax.tree.leaves(model.stacks))
  for a, b in zip(jax.tree.leaves(given_up), wanted, strict=True): np.testing.assert_array_equal(a, b)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept)), 'one that is not given up is left alone'


@pytest.mark.parametrize('temperature', [0, 1e-300, 1e-45, 1e-38, 1e-7, 1e-5, 1e4, 1e38, 1e300])
def test_any_temperature_draws_the_likeliest_or_from_what_may_be_drawn(temperature):
  """Far below the differences of logits it is greedy, far above them all tokens are alike; never anything else."""
  logits = np.random.default_rng(0).normal(size=(512, 8)).astype(np.float32) * 10
  ids = np.asarray(draw_of(logits, Sampling(temperature)))
  if temperature < 1: np.testing.assert_array_equal(ids, logits.argmax(-1))
  else: assert np.bincount(ids, minlength=8).min() > 512 / 8 / 2
  # Two of eight tokens that are all alike hold a fourth of the probability.
  for two in (dict(top_k=2), dict(top_p=.2)):
    ids = np.asarray(draw_of(logits, Sampling(temperature, **two)))
    assert np.all(np.take_along_axis(logits, ids[:, None], -1)[:, 0] >= np.sort(logits, -1)[:, -2]), two


@pytest.mark.parametrize('neutral', [dict(top_k=8), dict(top_k=10 ** 9), dict(top_p=1.0), dict(top_p=1)], ids=str)
def test_keeping_all_tokens_changes_nothing_bit_for_bit(neutral):
  logits = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32) * 20
  np.testing.assert_array_equal(kept(Sampling(**neutral), logits), logits)


@pytest.mark.parametrize('top_p', [1e-46, 1e-38, 1e-9])
def test_the_smallest_top_p_keeps_the_likeliest_token(top_p):
  logits = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
  np.testing.assert_array_equal(np.isfinite(kept(Sampling(top_p=top_p), logits)), logits == logits.max(-1, keepdims=True))


@pytest.mark.parametrize('field, value', [
  ('temperature', -1.0), ('temperature', float('nan')), ('temperature', float('inf')),
  ('top_k', 0), ('top_p', 0.0), ('top_p', 1.5)])
def test_a_setting_that_makes_no_sense_is_named(field, value):
  with pytest.raises(ValueError, match=f'{field} = {value}: must'):
    Sampling(**{field: value})


logits_of_8 = st.integers(0, 2 ** 16).map(
  lambda seed: np.random.default_rng(seed).normal(size=(3, 8)).astype(np.float32) * 2)


@settings(deadline=None, max_examples=30)
@given(logits_of_8, st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.99, 1.0]))
def test_top_p_keeps_the_smallest_set_of_the_likeliest_that_reaches_p(logits, p):
  result = np.asarray(kept(Sampling(top_p=p), logits))
  probs = np.exp(logits.astype(np.float64))
  probs /= probs.sum(-1, keepdims=True)
  for row, values, prob in zip(result, logits, probs, strict=True):
    inside = np.isfinite(row)
    np.testing.assert_array_equal(row[inside], values[inside])
    assert inside.any() and (inside.all() or prob[inside].min() > prob[~inside].max())
    # The sums are float32: eight roundings of 2**-24.
    assert prob[inside].sum() >= p - 1e-6, 'it reaches p'
    assert prob[inside].sum() - prob[inside].min() < p + 1e-6, 'and without its least likely token it does not'


@settings(deadline=None, max_examples=20)
@given(logits_of_8, st.sampled_from([1, 3, 8, 20]))
def test_top_k_keeps_the_k_likeliest(logits, k):
  result = np.asarray(kept(Sampling(top_k=k), logits))
  for row, values in zip(result, logits, strict=True):
    np.testing.assert_array_equal(np.isfinite(row), np.argsort(np.argsort(-values)) < k)


def test_top_p_counts_what_top_k_has_left():
  logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
  # Of the two likeliest the first holds 4 / 7 = 0.571 of the probability.
  for p, count in ((0.56, 1), (0.58, 2)):
    assert np.isfinite(kept(Sampling(top_k=2, top_p=p), logits)).sum() == count


@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_the_probabilities_of_the_tempered_logits(temperature):
  logits, draws = np.array([0.0, 1.0, -1.0, 0.5], np.float32), 4096
  rows = np.broadcast_to(logits, (draws, 4))
  ids = draw_of(rows, Sampling(temperature))
  expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
  # Five deviations of a share counted in 4096 draws: at most 5 * 0.5 / 64.
  np.testing.assert_allclose(np.bincount(ids, minlength=4) / draws, expected, atol=0.04)
