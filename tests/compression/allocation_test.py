"""Allocations share out as many zeros as were asked for, by the formulas of their papers."""
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.compression.allocation import Erk, Global, Matrices, Owl, Uniform
from efficient_lm.compression.patterns import GONE, PerMatrix
from efficient_lm.errors import IncompatibleError
from efficient_lm.weights.weight import Dense

MATRICES = st.builds(Matrices, st.sampled_from([(), (2,), (3, 4)]), st.integers(1, 60), st.integers(1, 60))


def zeros(matrices, shares):
  return sum(float(np.mean(share)) * matrices[path].size * matrices[path].count for path, share in shares.items())


def test_a_weight_is_as_many_matrices_as_it_has_layers_and_experts():
  experts = Dense(jnp.zeros((2, 4, 6, 5)), 'EFD', 'F')
  assert Matrices.of(experts) == Matrices((2, 4), 5, 6)
  assert Matrices.of(Dense(jnp.zeros((3, 8, 2, 4)), 'DNH', 'D')) == Matrices((3,), 8, 8)


@given(st.dictionaries(st.sampled_from('abcd'), MATRICES, min_size=1), st.floats(0.01, 0.99))
@settings(deadline=None)
def test_uniform_and_erk_sum_to_the_budget(matrices, sparsity):
  total = sum(one.size * one.count for one in matrices.values())
  for allocation in (Uniform(), Erk()):
    shares = allocation.shares(matrices, sparsity)
    assert all(share.shape == matrices[path].lead and np.all((share >= 0) & (share <= 1)) for path, share in shares.items())
    np.testing.assert_allclose(zeros(matrices, shares), sparsity * total, rtol=1e-5, atol=1e-5 * total)   # float32 shares


def test_erk_keeps_in_proportion_to_the_sides_over_the_area():
  matrices = {'large': Matrices((2,), 200, 300), 'small': Matrices((), 100, 150)}
  shares = Erk().shares(matrices, 0.8)
  ratio = (1 - shares['small']) / (1 - shares['large'][0])
  np.testing.assert_allclose(ratio, (250 / 15000) / (500 / 60000), rtol=1e-5)


def test_erk_keeps_all_of_what_would_keep_more():
  matrices = {'large': Matrices((), 100, 100), 'tiny': Matrices((), 2, 2)}
  shares = Erk().shares(matrices, 0.5)
  assert shares['tiny'] == 0 and abs(zeros(matrices, shares) - 0.5 * 10004) < 0.01


@pytest.mark.parametrize('sparsity', [0.1, 0.5, 0.9])
@pytest.mark.parametrize('ties', [False, True])
def test_global_is_one_threshold_over_all(sparsity, ties):
  rng = np.random.default_rng(0)
  scores = {'a': rng.random((2, 6, 8)), 'b': rng.random((5, 5)) * 3, 'c': rng.random((1, 4))}
  if ties: scores = {path: np.round(score * 4) for path, score in scores.items()}
  scores['c'] = np.full((1, 4), GONE)
  matrices = {path: Matrices(score.shape[:-2], *score.shape[-2:]) for path, score in scores.items()}
  candidates = {path: jnp.asarray(one, jnp.float32).reshape(*one.shape[:-2], -1) for path, one in scores.items()}
  shares = Global().shares(matrices, sparsity, candidates=candidates)
  gone, kept = [], []
  for path, score in scores.items():
    keep = np.asarray(PerMatrix().keep(jnp.asarray(score, jnp.float32), shares[path]))
    gone.append(score[~keep])
    kept.append(score[keep])
  gone, kept = np.concatenate(gone), np.concatenate(kept)
  assert len(gone) == np.floor(sparsity * (len(gone) + len(kept))) and gone.max() <= kept.min()


def layers_of(*scores):
  return [{'w': (i, jnp.asarray(score, jnp.float32))} for i, score in enumerate(scores)]


def test_owl_follows_the_paper():
  """Section 3 and the authors' code: outliers above so many means, scaled to twice `most`, and moved to the mean share."""
  rng, allocation = np.random.default_rng(0), Owl(outlier=3., most=0.1)
  scores = [rng.exponential(size=(20, 30)) ** power for power in (1, 2, 3, 1.5)]
  shares = allocation.shares({'w': Matrices((4,), 20, 30)}, 0.7, layers=layers_of(*scores))['w']
  ratios = np.array([np.mean(score > 3 * score.mean()) for score in scores])
  kept = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * 0.1 * 2)
  np.testing.assert_allclose(1 - shares, kept - kept.mean() + 0.3, rtol=1e-5)
  assert len(set(shares)) == 4 and abs(shares.mean() - 0.7) < 1e-6


def test_owl_of_layers_that_are_alike_is_uniform():
  shares = Owl().shares({'w': Matrices((2,), 4, 4)}, 0.5, layers=layers_of(np.eye(4), np.eye(4)))
  np.testing.assert_allclose(shares['w'], 0.5)


def test_owl_that_would_leave_nothing_of_a_layer_is_refused():
  scores = layers_of(np.ones((4, 8)), np.eye(4, 8))
  with pytest.raises(IncompatibleError, match=r'Owl: shares of zeros from 0\.80 to 1\.00: lower .most'):
    Owl(most=0.1).shares({'w': Matrices((2,), 4, 8)}, 0.9, layers=scores)


def test_a_wrong_field_is_named():
  assert [name for name, _, _ in Owl(outlier=1., most=1.).check()] == ['outlier', 'most'] and not list(Owl().check())
