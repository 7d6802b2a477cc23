"""Wanda is its one line: |w| times the norm of each input, compared within an output."""
import jax.numpy as jnp
import numpy as np

from efficient_lm.compression.patterns import PerOutput
from efficient_lm.techniques.pruning.wanda import Wanda


def test_it_is_the_formula_of_the_paper():
  rng = np.random.default_rng(0)
  w_OI, x_MI = rng.normal(size=(5, 8)), rng.normal(size=(30, 8)) * np.exp(rng.normal(size=8))
  found = {'square': jnp.asarray((x_MI ** 2).sum(0), jnp.float32)}
  score = np.abs(w_OI) * np.linalg.norm(x_MI, axis=0)
  np.testing.assert_allclose(Wanda().of(jnp.asarray(w_OI, jnp.float32), found), score, rtol=1e-5)   # float32
  _, keep_OI = Wanda().pruned(jnp.asarray(w_OI, jnp.float32), None, found, Wanda().pattern, 0.5)
  np.testing.assert_array_equal(keep_OI, score >= np.sort(score, -1)[:, 4:5])
  assert Wanda().pattern == PerOutput() and Wanda().needs == ('square',) and not Wanda().updates
