"""Root-mean-square normalisation equals its equation."""
import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.ops.rms_norm import rms_norm


def test_equals_its_equation_and_has_unit_mean_square():
  x = 3 * jax.random.normal(jax.random.key(0), (5, 64))
  np.testing.assert_allclose(jnp.mean(rms_norm(x, None, 0.0) ** 2, -1), 1, rtol=1e-5)   # sums of 64 numbers: 64 roundings
  scale = jnp.arange(64.)
  wanted = x / np.sqrt(np.mean(x ** 2, -1, keepdims=True) + 0.1) * scale
  np.testing.assert_allclose(rms_norm(x, scale, 0.1), wanted, rtol=1e-5)


def test_bfloat16_stays_bfloat16_with_float32_statistics():
  x = jax.random.normal(jax.random.key(0), (5, 64)).astype(jnp.bfloat16)
  got = rms_norm(x, None)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got, rms_norm(x.astype(jnp.float32), None), rtol=2 ** -8)   # one rounding to bfloat16
