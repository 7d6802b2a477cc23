"""The fused loss agrees with log-softmax of the logits, in value and gradient."""
import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.ops.linear_cross_entropy import linear_cross_entropy


def test_equals_the_reference_in_value_and_gradient():
  keys = jax.random.split(jax.random.key(0), 3)
  hidden, head = jax.random.normal(keys[0], (2, 7, 16)), jax.random.normal(keys[1], (16, 33))
  labels = jax.random.randint(keys[2], (2, 7), 0, 33)
  def run(implementation, hidden, head):
    mixed = lambda h, w: sum(jnp.sum(part * jnp.arange(1., 8)) for part in
                             linear_cross_entropy(h, w, labels, implementation=implementation))
    return linear_cross_entropy(hidden, head, labels, implementation=implementation), jax.grad(mixed, (0, 1))(hidden, head)
  for got, wanted in zip(jax.tree.leaves(jax.jit(run, static_argnums=0)('xla', hidden, head)),
                         jax.tree.leaves(run('reference', hidden, head))):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)   # gradients are sums of 14 weighted terms of size 50


def test_equal_logits_cost_the_log_of_the_vocabulary():
  nll, logsumexp = linear_cross_entropy(jnp.ones((1, 3, 4)), jnp.zeros((4, 32)), jnp.array([[0, 5, 31]]))
  np.testing.assert_allclose(nll, np.log(32), rtol=1e-6)
  np.testing.assert_allclose(logsumexp, np.log(32), rtol=1e-6)
