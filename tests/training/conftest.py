"""What compiling costs: nearly all that these tests spend their time on."""
import jax
import pytest


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  """What the tests state holds of any program."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
