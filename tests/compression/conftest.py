"""Fixtures of tests of compression."""
import jax
import pytest


@pytest.fixture(scope='module')
def quick_compilation():
  """For tests that spend nearly all their time on compiling, and state what holds of any program."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
