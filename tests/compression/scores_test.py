"""Scores of entries: the least important goes, an earlier mask first; each is its formula."""
import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.compression.patterns import NofM, PerMatrix, PerOutput
from efficient_lm.compression.scores import Magnitude, Random, Snip, Taylor
from efficient_lm.techniques import PruneOnce
from efficient_lm.tree import select
from efficient_lm.weights.masked import Masked
from tests.compressing import Context, model_of

W_OI = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8)), jnp.float32)


def test_the_smallest_magnitudes_go_and_the_matrix_stays():
  w_OI, keep_OI = Magnitude().pruned(W_OI, None, {}, PerOutput(), 0.5)
  assert w_OI is W_OI
  np.testing.assert_array_equal(np.asarray(keep_OI), np.argsort(np.argsort(np.abs(W_OI), -1), -1) >= 4)


def test_zeros_of_an_earlier_mask_count_and_none_comes_back():
  _, first = Magnitude().pruned(W_OI, None, {}, NofM(), 0.5)
  for share in (0.5, 0.75):
    _, second = Magnitude().pruned(W_OI, first, {}, PerMatrix(), share)
    assert not np.any(second & ~first) and np.mean(second) == 1 - share


def test_a_mask_over_what_is_zero_takes_none_of_what_is_kept_in_its_place():
  """A kept zero, as of an input that was never active, has the lowest score there is, and still is kept longer."""
  w_OI, keep_OI = jnp.zeros((1, 8)), jnp.arange(8)[None] >= 4
  _, again = Magnitude().pruned(w_OI, keep_OI, {}, PerMatrix(), 0.5)
  np.testing.assert_array_equal(again, keep_OI)


def test_saliencies_are_the_formulas_of_their_papers():
  rng = np.random.default_rng(0)
  w_OI, gradients = rng.normal(size=(3, 4)), rng.normal(size=(5, 3, 4))
  mean, square = (jnp.asarray(x, jnp.float32) for x in (gradients.mean(0), (gradients ** 2).mean(0)))
  w = jnp.asarray(w_OI, jnp.float32)
  np.testing.assert_allclose(Snip().of(w, {'mean': mean}), np.abs(w_OI * gradients.mean(0)), rtol=1e-5)
  np.testing.assert_allclose(Taylor().of(w, {'mean_square': square}), ((w_OI * gradients) ** 2).mean(0), rtol=1e-5)


def test_taylor_does_not_cancel_between_batches():
  w, gradients = jnp.ones((1, 2)), jnp.array([[[1., .5]], [[-1., .5]]])
  assert Snip().of(w, {'mean': gradients.mean(0)}).argmin() == 0
  assert Taylor().of(w, {'mean_square': (gradients ** 2).mean(0)}).argmin() == 1


def random_masks(seed):
  stage = PruneOnce(score=Random(), sparsity=0.5, where='(gate|up)$')
  pruned, _ = stage(model_of(), Context(key=jax.random.key(seed)))
  return [np.asarray(weight.keep.get_value()) for _, weight in select(pruned, Masked)]


def test_by_chance_the_key_decides_and_each_weight_has_a_mask_of_its_own():
  first, again, other = random_masks(0), random_masks(0), random_masks(1)
  assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
  assert not np.array_equal(first[0], first[1]) and not np.array_equal(first[0], other[0])
  assert not np.array_equal(first[0][0], first[0][1]), 'and each layer'
  assert all(keep.mean() == 0.5 for keep in first)


def test_by_chance_magnitudes_do_not_matter():
  score = Random().of(jnp.arange(1e4).reshape(100, 100), {'key': jax.random.key(0)})
  assert abs(np.corrcoef(np.arange(1e4), np.asarray(score).reshape(-1))[0, 1]) < 0.05   # 5 deviations of 1 / sqrt(1e4)
