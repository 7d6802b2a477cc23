"""Decoding draws from the model's own distribution, whatever the bursts, and never what may not be drawn."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.models import spec
from efficient_lm.models.decode import Sampling, ready, stream
from efficient_lm.models.moe import routing

V, TOKENIZER = 32, 27
PROMPT = np.random.default_rng(1).integers(0, TOKENIZER, (2, 4)).astype(np.int32)


@functools.cache
def drawn(kind='dense'):
  """A model with numbers drawn by numpy, in which the padding of the vocabulary is likely."""
  mlp = {'dense': spec.SwiGLU(hidden=24),
         'experts': spec.MoE(num_experts=4, hidden=8, router=routing.SoftmaxTopK(top_k=2))}[kind]
  stack = spec.Stack(num_layers=2, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8), mlp=mlp)
  described = spec.Transformer(vocab_size=V, dim=16, stacks=(stack,))
  rng = np.random.default_rng(0)
  abstract = jax.eval_shape(lambda: described.build(rngs=nnx.Rngs(0)))
  model = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype), abstract)
  padded = model.own_head.materialize().at[:, TOKENIZER:].multiply(5)
  model.own_head.array.set_value(padded)
  return model


def text(num_tokens=9, sampling=Sampling(), seed=0, burst_size=5, kind='dense', prompt=PROMPT):
  pieces = stream(drawn(kind), prompt, num_tokens, sampling=sampling, seed=seed, vocab_size=TOKENIZER,
                  burst_size=burst_size)
  return np.concatenate(list(pieces), 1)


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


def test_an_empty_prompt_is_an_error():
  with pytest.raises(ValueError, match='at least one token'):
    text(prompt=np.zeros((1, 0), np.int32))


@pytest.mark.parametrize('field, value', [('temperature', -1.0), ('top_k', 0), ('top_p', 0.0), ('top_p', 1.5)])
def test_a_setting_that_makes_no_sense_is_named(field, value):
  with pytest.raises(ValueError, match=f'{field} = {value}: must'):
    Sampling(**{field: value})


kept = jax.jit(lambda sampling, logits: sampling.keep(logits))
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
  ids = jax.jit(lambda sampling, rows: sampling(rows, jax.random.key(0)))(Sampling(temperature), rows)
  expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
  # Five deviations of a share counted in 4096 draws: at most 5 * 0.5 / 64.
  np.testing.assert_allclose(np.bincount(ids, minlength=4) / draws, expected, atol=0.04)
