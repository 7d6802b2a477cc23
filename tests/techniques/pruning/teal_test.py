"""Thresholds zero the share of inputs that was asked for, of every matrix and layer, and change nothing else."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.compression import calibration
from efficient_lm.compression.rules import Rule
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Int
from efficient_lm.models import decode
from efficient_lm.runs import invariants, structure
from efficient_lm.techniques import Quantize, Rotate, Teal
from efficient_lm.tree import rewrite, select
from efficient_lm.weights import observed
from efficient_lm.weights.thresholded import Thresholded
from efficient_lm.weights.weight import Weight
from tests.compressing import Context, abstractly, assert_structure, batch_of, family, logits_of, model_of

pytestmark = pytest.mark.usefixtures('quick_compilation')

TEAL = Teal(sparsity=0.4, sequences=8)


@pytest.mark.parametrize('share', [0., 0.1, 0.5, 0.9, 1.])
def test_the_quantile_of_a_histogram_is_that_of_the_numbers(share):
  """At least the share is at most it, and no number above it is within a bin of the exact one."""
  x = np.abs(np.random.default_rng(0).normal(size=(50, 8))).astype(np.float32) * (np.arange(8) > 1)
  histogram = observed._histogram(jnp.asarray(x))
  found = float(observed.quantile(histogram, jnp.float32(100), share))
  exact = np.quantile(x, share, method='inverted_cdf')
  assert np.mean(x <= found) >= share and exact <= found <= exact * (1 + 1 / 16)


def test_each_matrix_of_each_layer_loses_its_share_of_inputs():
  model, stage = model_of(), TEAL
  after, (note,) = stage(model, Context())
  weights = dict(select(after, Thresholded))
  assert len(weights) == 7 and note.startswith('Teal (40% of inputs) reaches') and note.endswith('tokens of calibration')
  # What a weight saw, from the model as it was.
  found = calibration.statistics(model, [batch_of(0)], {path: ('histogram', 'count') for path in weights})
  for path, weight in weights.items():
    assert weight.threshold.get_value().shape == (2,)
    edges, inputs = np.asarray(observed.bin_edges()), np.asarray(found[path]['histogram'])
    below = np.where(edges[None] < np.asarray(weight.threshold.get_value())[:, None], inputs, 0).sum(-1) / inputs.sum(-1)
    np.testing.assert_allclose(below, 0.4, atol=0.03)   # a bin holds up to 3 % of a normal's numbers
  assert_structure(abstractly(stage, model), after)
  assert_structure(structure.rebuilt(structure.described(after)), after)
  assert invariants.check(invariants.read(model), after, stage) == []


def test_little_is_lost_where_little_is_zeroed_and_more_where_more_is():
  model = family('pattern')   # with biases
  apart = [float(jnp.linalg.norm(logits_of(Teal(sparsity=s, sequences=8)(model, Context())[0]) - logits_of(model)))
           for s in (0.01, 0.5, 0.95)]
  assert 0 < apart[0] < 0.2 * apart[1] < 0.2 * apart[2]


def test_weights_in_few_bits_take_thresholds_and_keep_their_bits():
  stored, _ = Quantize(rules=(Rule(weights=Int()),))(model_of(), Context())
  after, _ = TEAL(stored, Context())
  assert invariants.check(invariants.read(stored), after, TEAL) == []
  assert all(one.kind == 'int8 per channel, 40% of inputs zeroed' for _, one in select(after, Thresholded))


def test_decoding_skips_and_draws_the_same_tokens():
  """From so many zeros on, that is; prompts of one token, too."""
  after, _ = Teal(sparsity=0.9, sequences=8)(model_of(), Context())
  prompt = np.array([[3, 1, 4]], np.int32)
  ready = decode.ready(after)
  assert {one.product for _, one in select(ready, Thresholded)} == {'float, of one row without its zeros'}
  ids = np.concatenate([*decode.stream(after, prompt, 8, sampling=decode.Sampling(0.0), vocab_size=48)], 1)
  whole = np.concatenate([prompt, ids], 1)
  logits = np.asarray(jax.jit(lambda model, tokens: model(tokens).logits_BTV)(after, whole))
  np.testing.assert_array_equal(ids[0], logits[0, 2:-1].argmax(-1))


@pytest.mark.parametrize('model, stage, message', [
  (lambda: TEAL(model_of(), Context())[0], TEAL, 'attention/key has thresholds already'),
  (lambda: TEAL(model_of(), Context())[0], Quantize(rules=(Rule(weights=Int()),)), 'has thresholds of its inputs: let Teal'),
  (lambda: Rotate()(model_of(), Context())[0], TEAL, 'mlp/down has rotated inputs'),
  (lambda: model_of(mlp='experts'), TEAL, 'mlp/experts/down is stacked by expert'),
  (model_of, Teal(sparsity=0.4, where='own_head'), 'own_head: calibration sees the weights of layers alone'),
  (model_of, Teal(sparsity=0.4, where='blcoks'), "matches 'blcoks'; the paths are"),
  (model_of, Teal(sparsity=0.4, sequences=100), 'calibration asks for 100 sequences')])
def test_what_cannot_have_thresholds_is_refused_in_one_line(model, stage, message):
  with pytest.raises(IncompatibleError, match=message) as caught: stage(model(), Context())
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('stage, names', [
  (Teal(sparsity=0.), ['sparsity']), (Teal(sparsity=0.4, sequences=0), ['sequences']),
  (Teal(sparsity=0.4, where='('), ['where']), (TEAL, [])], ids=repr)
def test_a_wrong_field_is_named(stage, names):
  assert [name for name, _, _ in stage.check()] == names


def test_thresholds_come_off_with_their_wrapper():
  after, _ = TEAL(model_of(), Context())
  plain = rewrite(after, Thresholded, lambda _, one: one.inner)
  jax.tree.map(np.testing.assert_array_equal, plain, model_of())
  assert len(dict(select(plain, Weight))) == len(dict(select(after, Weight)))
