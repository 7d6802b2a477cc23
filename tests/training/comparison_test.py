"""Two models beside each other: nothing between a model and itself, and what numpy finds between two."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.data import ByteTokenizer
from efficient_lm.data.packing import Rows, pack
from efficient_lm.data.pipeline import in_sequence
from efficient_lm.models import requests, spec
from efficient_lm.parallel.sharding import single_device_mesh
from efficient_lm.training import comparison
from efficient_lm.training.evaluation import evaluate

pytestmark = pytest.mark.usefixtures('quick_compilation')
MLPS = {'dense': spec.SwiGLU(hidden=16), 'experts': spec.MoE(num_experts=4, hidden=8)}
TEXT = 'Words, and more words: déjà vu.\n'.encode() * 4


@functools.cache
def model_of(kind='dense', dim=16, seed=0, vocab_size=257):
  """A model with numbers drawn by numpy, sharp enough that its distributions differ from token to token."""
  stack = spec.Stack(num_layers=1, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8), mlp=MLPS[kind])
  made = spec.Transformer(vocab_size=vocab_size, dim=dim, stacks=(stack,))
  abstract = jax.eval_shape(lambda: made.build(rngs=nnx.Rngs(0)))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype), abstract)


def near(model):
  """The same model with a little noise on its numbers, as rounding makes."""
  rng = np.random.default_rng(7)
  return jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(size=leaf.shape) * 0.05, leaf.dtype), model)


def batches(rows=4, length=16, stride=None):
  return in_sequence(Rows(pack(ByteTokenizer(), [TEXT]), length, stride), batch_size=rows)


def compare(model, reference, given):
  return comparison.compare(model, reference, given, single_device_mesh())


def by_hand(model, reference, length, stride):
  """Of each token of the text in its turn, float64: nats of both, KL, whether both find the same one the likeliest. A loop
  over windows, that begin a stride apart and count what none before has counted."""
  tokens = np.concatenate([[256], np.frombuffer(TEXT, np.uint8), [256]]).astype(np.int32)
  ask = jax.jit(lambda model, ids: model(ids[None]).logits_BTV[0])
  found, counted = [], 1
  for begin in range(0, len(tokens), stride):
    ids = tokens[begin:begin + length]
    both = [np.asarray(ask(one, np.pad(ids, (0, length - len(ids)))), np.float64) for one in (model, reference)]
    log_q, log_p = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
                    for x in both)
    for at in range(counted, min(begin + length + 1, len(tokens))):
      q, p = log_q[at - 1 - begin], log_p[at - 1 - begin]
      found.append((-q[tokens[at]], -p[tokens[at]], (np.exp(p) * (p - q)).sum(), p.argmax() == q.argmax()))
    counted = max(counted, min(begin + length + 1, len(tokens)))
  assert len(found) == len(tokens) - 1
  return np.mean(found, 0)


@pytest.mark.parametrize('kind', MLPS)
def test_a_model_does_not_diverge_from_itself(kind):
  model = model_of(kind)
  found = compare(model, model, batches())
  assert found['kl'] == 0 and found['same_top'] == 1 and found['reference_perplexity'] == found['perplexity']


@pytest.mark.parametrize('length, stride, reference', [
  (16, 16, lambda: model_of('experts', dim=24, seed=1)), (16, 5, lambda: near(model_of())),
  (15, 15, lambda: near(model_of()))])
def test_it_is_what_numpy_finds_window_by_window(length, stride, reference):
  """Sums of 257 terms in float32 beside float64."""
  model, reference = model_of(), reference()
  found = compare(model, reference, batches(3, length, stride))
  nats, other, kl, same = by_hand(model, reference, length, stride)
  assert found['tokens'] == len(TEXT) + 1 and found['bytes'] == len(TEXT)
  assert found['nats_per_token'] == pytest.approx(nats, rel=1e-5)
  assert found['perplexity'] == pytest.approx(np.exp(nats), rel=1e-4)
  assert found['reference_perplexity'] == pytest.approx(np.exp(other), rel=1e-4)
  assert found['kl'] == pytest.approx(kl, rel=1e-5) and kl > 1e-3
  assert found['same_top'] == pytest.approx(same, abs=1e-12)
  assert 0.2 < same < 1 or reference.embed.shape != model.embed.shape


def test_the_figures_do_not_depend_on_how_many_rows_or_logits_are_there_at_once(monkeypatch):
  """Sums in another order, to a few times 2**-24."""
  model, reference = model_of(), model_of(seed=1)
  found = [compare(model, reference, batches(rows)) for rows in (3, 16)]
  monkeypatch.setattr(comparison, 'over_pieces', functools.partial(requests.over_pieces, rows=12))
  jax.clear_caches()
  found.append(compare(model, reference, batches(2)))   # pieces of 6 tokens, which do not divide 16
  for other in found[1:]:
    for name, value in found[0].items(): assert other[name] == pytest.approx(value, rel=2e-6), name


def test_the_quality_is_that_of_an_evaluation_alone():
  found, alone = compare(model_of(), model_of(seed=1), batches()), evaluate(model_of(), batches(), single_device_mesh())
  for name, value in alone.items(): assert found[name] == pytest.approx(value, rel=1e-6)


def test_a_head_that_is_padded_is_compared_over_the_ids_that_both_have():
  """The wider one has no more weight on its padding than the others have on anything."""
  wide, narrow = model_of(vocab_size=320), model_of()
  found = compare(wide, narrow, batches())
  assert np.isfinite(list(found.values())).all() and found['kl'] > 0
  padded = jax.tree.map(lambda leaf: leaf, narrow)
  widen = lambda leaf: jnp.pad(leaf, [(0, 320 - n if n == 257 else 0) for n in leaf.shape])
  padded = jax.tree.map(widen, padded)
  assert compare(padded, narrow, batches())['kl'] == pytest.approx(0, abs=1e-6)   # differences of float32
