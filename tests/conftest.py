"""Eight virtual CPU devices for every test; the flag is read when JAX starts."""
import os

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'

import pytest


@pytest.fixture
def mesh():
  """mesh(data, fsdp, expert, tensor): a context in which that mesh over eight devices is in force."""
  import jax

  from efficient_lm import axes
  from efficient_lm.parallel.mesh import Mesh
  if jax.device_count() != 8: pytest.skip('needs eight devices: run the tests on CPU')
  return lambda *sizes: jax.set_mesh(Mesh(**dict(zip(axes.MESH, sizes, strict=True))).build())
