"""A mesh has four axes whose product is the number of devices, or one sentence says why not."""
import jax
import pytest

from efficient_lm import axes
from efficient_lm.config.mesh import Mesh
from efficient_lm.errors import ConfigError


def test_default_is_data_parallel():
  mesh = Mesh().build()
  assert mesh.axis_names == axes.MESH and mesh.axis_sizes == (jax.device_count(), 1, 1, 1)
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_one_axis_takes_the_rest():
  assert Mesh(data=2, fsdp=-1, tensor=2).sizes(32) == (2, 8, 1, 2)


def test_one_device():
  assert Mesh().build(jax.devices()[:1]).axis_sizes == (1, 1, 1, 1)


@pytest.mark.parametrize('mesh, devices, message', [
  (Mesh(data=3), 8, r'mesh = Mesh\(data=3, .*\): needs 3 devices, but there are 8'),
  (Mesh(data=2, expert=8), 8, 'needs 16 devices, but there are 8'),
  (Mesh(expert=3), 8, 'needs a multiple of 3 devices, but there are 8'),
])
def test_a_product_that_is_not_the_device_count_is_refused(mesh, devices, message):
  with pytest.raises(ConfigError, match=message): mesh.sizes(devices)


def test_checks():
  assert not list(Mesh().check())
  assert [problem[0] for problem in Mesh(fsdp=0).check()] == ['fsdp']
  assert [problem[0] for problem in Mesh(tensor=-1).check()] == ['tensor']
