"""Random pruning: no order but that of the key."""
import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.techniques import PruneOnce, Random
from efficient_lm.tree import select
from efficient_lm.weights.masked import Masked
from tests.compressing import Context, model_of


def masks(seed):
  stage = PruneOnce(score=Random(), sparsity=0.5, where='(gate|up)$')
  pruned, _ = stage(model_of(), Context(key=jax.random.key(seed)))
  return [np.asarray(weight.keep.get_value()) for _, weight in select(pruned, Masked)]


def test_the_key_decides_and_each_weight_has_a_mask_of_its_own():
  first, again, other = masks(0), masks(0), masks(1)
  assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
  assert not np.array_equal(first[0], first[1]) and not np.array_equal(first[0], other[0])
  assert not np.array_equal(first[0][0], first[0][1]), 'and each layer'
  assert all(keep.mean() == 0.5 for keep in first)


def test_magnitudes_do_not_matter():
  score = Random().of(jnp.arange(1e4).reshape(100, 100), {'key': jax.random.key(0)})
  assert abs(np.corrcoef(np.arange(1e4), np.asarray(score).reshape(-1))[0, 1]) < 0.05   # 5 deviations of 1 / sqrt(1e4)
