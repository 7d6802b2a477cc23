"""The fused loss agrees with log-softmax of the logits, in value and gradient."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.ops.linear_cross_entropy import linear_cross_entropy
from efficient_lm.ops.linear_cross_entropy.cases import CASES

# Gradients are sums over the tokens, weighted with 1, 2, …; in bfloat16 both sides round the gradient to 8 bits.
TOLERANCE = {'float32': 1e-5, 'bfloat16': 2 ** -7}


@pytest.mark.parametrize('name', CASES)
def test_equals_the_reference_in_value_and_gradient(name):
  hidden, head, labels = CASES[name].arrays()
  weights_T = jnp.arange(1., labels.shape[1] + 1)
  def run(implementation, hidden, head):
    mixed = lambda h, w: sum(jnp.sum(part * weights_T) for part in
                             linear_cross_entropy(h, w, labels, implementation=implementation))
    return linear_cross_entropy(hidden, head, labels, implementation=implementation), jax.grad(mixed, (0, 1))(hidden, head)
  for got, wanted in zip(jax.tree.leaves(jax.jit(run, static_argnums=0)('xla', hidden, head)),
                         jax.tree.leaves(run('reference', hidden, head))):
    assert got.dtype == wanted.dtype
    got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE[hidden.dtype.name] * max(1, np.abs(wanted).max()))


def test_equal_logits_cost_the_log_of_the_vocabulary():
  nll, logsumexp = linear_cross_entropy(jnp.ones((1, 3, 4)), jnp.zeros((4, 32)), jnp.array([[0, 5, 31]]))
  np.testing.assert_allclose(nll, np.log(32), rtol=1e-6)
  np.testing.assert_allclose(logsumexp, np.log(32), rtol=1e-6)
