"""SparseGPT: the optimal brain surgeon column by column, against explicit inverses in float64 and against least squares."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.compression import hessian
from efficient_lm.compression.patterns import Blocks, NofM, PerMatrix, PerOutput
from efficient_lm.compression.solver import Choice, gptq, solve
from efficient_lm.formats import Group, Int
from efficient_lm.techniques.pruning.sparse_gpt import SparseGpt

pytestmark = pytest.mark.usefixtures('quick_compilation')
O, I, DAMPING = 6, 16, 0.01


def weight(seed=0, shape=(O, I)):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gram(seed=0, num_inputs=I):
  """Of correlated inputs, some of which are large."""
  rng = np.random.default_rng(seed + 10)
  x_MI = rng.normal(size=(200, num_inputs // 4)) @ rng.normal(size=(num_inputs // 4, num_inputs))
  x_MI = (x_MI + 0.3 * rng.normal(size=(200, num_inputs))) * np.exp(rng.normal(size=num_inputs))
  return jnp.asarray(x_MI.T @ x_MI, jnp.float32)


@functools.partial(jax.jit, static_argnames=('score', 'pattern'))
def pruned(w_OI, gram_II, score, pattern, share=0.5, keep_OI=None):
  return score.pruned(jnp.asarray(w_OI), keep_OI, {'gram': gram_II}, pattern, share)


def by_hand(w_OI, gram_II, together: int, fewest):
  """Algorithm 1 of the paper with an explicit inverse for each column, in float64. fewest(score): which entries of some
  columns go."""
  damped_II = np.array(hessian.scaled(gram_II), np.float64) + DAMPING * np.eye(I)
  w_OI, gone = np.array(w_OI, np.float64), np.zeros(w_OI.shape, bool)
  for j in range(I):
    inverse = np.linalg.inv(damped_II[j:, j:])
    if j % together == 0:
      # The diagonal of the inverse of what is still to come, at each of these columns.
      left = [np.linalg.inv(damped_II[k:, k:])[0, 0] for k in range(j, min(j + together, I))]
      gone[:, j:j + together] = fewest(w_OI[:, j:j + together] ** 2 / np.array(left))
    change = np.where(gone[:, j], w_OI[:, j], 0) / inverse[0, 0]
    w_OI[:, j:] -= np.outer(change, inverse[0])
    w_OI[gone[:, j], j] = 0
  return w_OI, ~gone


def half(score):
  order = np.argsort(score.reshape(-1), kind='stable')
  gone = np.zeros(score.size, bool)
  gone[order[:score.size // 2]] = True
  return gone.reshape(score.shape)


def half_of_each(score): return np.argsort(np.argsort(score, -1, kind='stable'), -1) < score.shape[1] // 2


@pytest.mark.parametrize('pattern, together, fewest', [
  (PerMatrix(), 8, half), (PerMatrix(), I, half), (PerOutput(), 8, half_of_each), (NofM(), 4, half_of_each)],
  ids=['a matrix', 'all columns at once', 'an output', '2:4'])
@pytest.mark.parametrize('seed', range(3))
def test_it_is_the_algorithm_of_the_paper_with_explicit_inverses(pattern, together, fewest, seed):
  block = 8 if isinstance(pattern, NofM) else together
  found, keep_OI = pruned(weight(seed), gram(seed), SparseGpt(block=block, damping=DAMPING), pattern)
  expected, kept = by_hand(weight(seed), gram(seed), together, fewest)
  np.testing.assert_array_equal(keep_OI, kept)
  # The condition number is about 1e3: float32 keeps four digits.
  np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_one_zero_in_the_first_column_is_made_up_for_by_least_squares():
  """Brute force: of all matrices with these zeros, none has less error."""
  keep_OI = np.ones((O, I), bool)
  keep_OI[:, 0] = False
  found, _ = jax.jit(lambda w, g, k: solve(w, g, keep_OI=k, act_order=False, damping=DAMPING))(weight(), gram(), keep_OI)
  damped_II = np.array(hessian.scaled(gram()), np.float64) + DAMPING * np.eye(I)
  w_OI = np.array(weight(), np.float64)
  best = w_OI[:, 1:] + w_OI[:, :1] * np.linalg.solve(damped_II[1:, 1:], damped_II[1:, 0])
  np.testing.assert_allclose(found[:, 1:], best, atol=1e-3 * np.abs(best).max())


def error(made_OI, w_OI, gram_II):
  return float(jnp.sum(hessian.output_error(made_OI - w_OI, gram_II)))


@pytest.mark.thinned
@pytest.mark.parametrize('pattern', [PerMatrix(), PerOutput(), NofM(), Blocks(outputs=2, inputs=2)], ids=str)
def test_it_leaves_less_error_than_magnitude_and_than_its_mask_alone(pattern):
  """In every one of some random problems, with most active inputs first and without."""
  for seed in range(3):
    w_OI, gram_II = jnp.asarray(weight(seed, (24, 32))), gram(seed, 32)
    largest = pattern.keep(jnp.abs(w_OI), 0.5)
    for order in (False, True):
      found, keep_OI = pruned(w_OI, gram_II, SparseGpt(block=8, act_order=order), pattern)
      assert not np.any(np.asarray(found)[~np.asarray(keep_OI)]) and np.mean(keep_OI) == 0.5
      assert error(found, w_OI, gram_II) < min(error(w_OI * keep_OI, w_OI, gram_II), error(w_OI * largest, w_OI, gram_II))


def test_a_mask_that_is_there_stays_and_makes_up_for_nothing():
  keep_OI = jnp.asarray(np.random.default_rng(5).random((O, I)) < 0.7)
  found, both = pruned(weight() * keep_OI, gram(), SparseGpt(block=8), PerMatrix(), 0.5, keep_OI)
  assert not np.any(both & ~keep_OI) and np.sum(~both) == O * I // 2
  assert not np.any(np.asarray(found)[~np.asarray(both)])


def test_pruning_and_rounding_at_once_is_one_after_the_other_on_the_same_inputs():
  """Bit for bit. Two stages would do it from other inputs: the first, of a model that nobody has rounded."""
  format = Int(bits=4, scales=Group(size=8))
  at_once = jax.jit(lambda w, g: format.decode(gptq(w, g, format, choice=Choice(PerMatrix(), 0.5), block=8)))
  after = jax.jit(lambda w, g, k: format.decode(gptq(w, g, format, keep_OI=k, block=8)))
  for seed in range(3):
    w_OI, gram_II = jnp.asarray(weight(seed, (24, 32))), gram(seed, 32)
    first, keep_OI = pruned(w_OI, gram_II, SparseGpt(block=8), PerMatrix())
    found = at_once(w_OI, gram_II)
    assert not np.any(np.asarray(found)[~np.asarray(keep_OI)]) and np.mean(keep_OI) == 0.5
    np.testing.assert_array_equal(found, after(first, gram_II, keep_OI))


def test_a_stack_is_its_matrices_one_by_one():
  w_EOI, grams = jnp.asarray(weight(0, (3, O, I))), jnp.stack([gram(seed) for seed in range(3)])
  together, keep = pruned(w_EOI, grams, SparseGpt(block=8), PerMatrix(), jnp.array([0.25, 0.5, 0.75]))
  for i, share in enumerate((0.25, 0.5, 0.75)):
    one, kept = pruned(w_EOI[i], grams[i], SparseGpt(block=8), PerMatrix(), share)
    np.testing.assert_array_equal(keep[i], kept)
    np.testing.assert_allclose(together[i], one, atol=1e-3)   # batched factorisations add in another order
    assert np.mean(kept) == 1 - share


def test_fewer_tokens_than_inputs_and_none_at_all_are_enough_to_run_on():
  for gram_II in (jnp.zeros((I, I)), gram() * (jnp.arange(I) < 3) * (jnp.arange(I) < 3)[:, None]):
    found, keep_OI = pruned(weight(), gram_II, SparseGpt(block=8), PerMatrix())
    assert np.all(np.isfinite(found)) and np.mean(keep_OI) == 0.5


def test_a_wrong_field_is_named():
  assert [name for name, _, _ in SparseGpt(damping=-1., block=0).check()] == ['damping', 'block']
  assert not list(SparseGpt().check())
