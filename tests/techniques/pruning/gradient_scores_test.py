"""SNIP and Taylor are their formulas, and tell a weight that matters from one that does not."""
import jax.numpy as jnp
import numpy as np

from efficient_lm.techniques.pruning.gradient_scores import Snip, Taylor


def test_they_are_the_formulas_of_their_papers():
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
