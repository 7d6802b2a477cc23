"""Log-likelihoods are those of the whole text alone, and continuations those of decoding, whatever they are batched with."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.data import SymbolTokenizer
from efficient_lm.models import decode, requests, spec
from efficient_lm.models.requests import continued, rounded, score

pytestmark = pytest.mark.usefixtures('quick_compilation')
MLPS = {'dense': spec.SwiGLU(hidden=24), 'experts': spec.MoE(num_experts=4, hidden=8)}
RNG = np.random.default_rng(3)
PAIRS = [(RNG.integers(0, 257, context).tolist(), RNG.integers(0, 257, continuation).tolist())
         for context, continuation in [(1, 1), (5, 3), (20, 1), (3, 0), (2, 17), (11, 2), (1, 30)]]


@functools.cache
def drawn(kind='dense', positions=None):
  """A model with numbers drawn by numpy."""
  stack = spec.Stack(num_layers=1, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8), mlp=MLPS[kind])
  ends = spec.Ends() if positions is None else spec.Ends(positions=spec.Learned(length=positions))
  described = spec.Transformer(vocab_size=257, dim=16, stacks=(stack,), ends=ends)
  rng = np.random.default_rng(0)
  abstract = jax.eval_shape(lambda: described.build(rngs=nnx.Rngs(0)))
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype), abstract)


whole = jax.jit(lambda model, ids_BT: model(ids_BT).logits_BTV)


def logits_of(model, ids):
  """float64, of one text at a time; what stands behind it is not seen."""
  return np.asarray(whole(model, np.pad(ids, (0, 48 - len(ids)))[None])[0, :len(ids)], np.float64)


def alone(model, context, continuation, longest=1000):
  """By the softmax of numpy."""
  ids = np.array([*context, *continuation], np.int32)[-longest - 1:]
  logits = logits_of(model, ids[:-1])[len(ids) - 1 - len(continuation):] if continuation else np.zeros((0, 257))
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return log_p[np.arange(len(continuation)), continuation].sum(), bool((log_p.argmax(-1) == continuation).all())


@pytest.mark.parametrize('kind, at_once', [('dense', None), ('dense', 2), ('experts', 3)])
def test_each_continuation_is_scored_as_if_it_were_alone(kind, at_once):
  model = drawn(kind)
  found = sorted(score(model, PAIRS, longest=48, at_once=at_once))
  assert [number for number, _, _ in found] == list(range(len(PAIRS)))
  for (_, likelihood, greedy), pair in zip(found, PAIRS):
    expected, is_greedy = alone(model, *pair)
    assert likelihood == pytest.approx(expected, rel=1e-5, abs=1e-6) and greedy == is_greedy   # sums in float32


def test_what_greedy_decoding_gives_is_greedy_and_nothing_else_is():
  model = drawn()
  ids, = decode.stream(model, [[5, 6, 7]], 9, sampling=decode.Sampling(0), vocab_size=257)
  given = ids[0].tolist()
  pairs = [([5, 6, 7], given), ([5, 6, 7], [*given[:-1], (given[-1] + 1) % 257]), ([5, 6, 7], given[:1])]
  assert [greedy for _, _, greedy in sorted(score(model, pairs, longest=48))] == [True, False, True]


def test_of_a_text_that_is_too_long_the_last_tokens_are_read():
  model = drawn(positions=13)   # which no rounded length is
  (_, found, _), = score(model, [PAIRS[2]], longest=13)
  (_, same, _), = score(model, [(PAIRS[2][0][-13:], PAIRS[2][1])], longest=13)
  assert found == same
  for context, continuation in (([1], [2] * 14), ([], [1])):
    with pytest.raises(ValueError): next(score(model, [(context, continuation)], longest=13))


def test_logits_of_many_tokens_are_there_piece_by_piece():
  """A sum over pieces of any width, filled up with zeros, is the sum over all."""
  array = RNG.integers(-9, 9, (3, 10, 2))
  for rows in (1, 6, 12, 100):
    seen = []
    def piece(a_BtD, b_Bt): seen.append(a_BtD.shape); return jnp.sum(a_BtD, (1, 2)), jnp.sum(b_Bt)
    by_row, total = requests.over_pieces(piece, (jnp.asarray(array), jnp.asarray(array[..., 0])), rows)
    assert by_row.tolist() == array.sum((1, 2)).tolist() and total == array[..., 0].sum()
    assert seen[0][0] * seen[0][1] <= max(rows, 3)


def test_lengths_are_rounded_up_to_few():
  found = [rounded(n) for n in range(1, 3000)]
  assert all(n <= m <= max(8, 1.5 * n) for n, m in enumerate(found, 1)) and len(set(found)) < 20 and sorted(found) == found


class Ascii(SymbolTokenizer):
  """Of characters, one of which ends a document."""
  eod = 9


@pytest.mark.parametrize('positions, num_tokens', [(None, 24), (33, 20)])
def test_texts_go_on_as_they_do_alone_until_a_stop(positions, num_tokens):
  """Of 33 positions 20 are kept free: prompts are filled up to 13 tokens, no rounded length."""
  model, tokenizer = drawn(positions=positions), Ascii(''.join(map(chr, range(128))))
  prompts = [tokenizer.prompt(text).tolist() for text in ('a', 'some words', 'zzz')]
  free = continued(model, tokenizer, prompts, until=[], num_tokens=num_tokens)
  for prompt, text in zip(prompts, free):
    ids = np.concatenate([*decode.stream(model, [prompt], num_tokens, sampling=decode.Sampling(0), vocab_size=128)], 1)[0]
    assert text == tokenizer.decode(decode.until_stop(ids, tokenizer.stops)) and len(text) > 2
  ends = [text[1:3] for text in free]
  assert continued(model, tokenizer, prompts, until=ends, num_tokens=num_tokens) == [
    text[:min(text.find(end) for end in ends if end in text)] for text in free]
