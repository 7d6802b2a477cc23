"""Kernels are refused where the compiler would have to partition them, and run on the families that they are for."""
import types

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from efficient_lm.ops import mosaic


@pytest.mark.parametrize(('size', 'kind', 'fits'), [
  (1, AxisType.Auto, True), (2, AxisType.Auto, False), (2, AxisType.Manual, True), (2, AxisType.Explicit, False)])
def test_kernels_are_refused_on_axes_of_several_devices_outside_of_shard_map(size, kind, fits):
  assert not mosaic.cut_by_compiler()
  with jax.sharding.use_abstract_mesh(AbstractMesh((size,), ('fsdp',), axis_types=(kind,))):
    assert (not mosaic.cut_by_compiler()) == fits
    assert fits or 'fsdp' in mosaic.cut_by_compiler()


def test_a_kernel_may_be_for_several_families():
  module = types.SimpleNamespace(twice=lambda x: 2 * x, refuses=lambda x: 'odd' if x % 2 else '')
  for families in ('hopper', ('hopper', 'blackwell')):
    one = mosaic.kernel(lambda: module, 'twice', families)
    assert one.on == (('hopper',) if families == 'hopper' else families)
    assert one.run(2) == 4 and one.refuses(3) == 'odd' and not one.refuses(2)
