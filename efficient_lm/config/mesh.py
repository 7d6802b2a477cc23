"""The mesh that a config asks for: four axes, always all of them, so that every sharding rule can name each."""
from __future__ import annotations

import dataclasses
import math

from efficient_lm import axes
from efficient_lm.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class Mesh:
  """How the devices split the work; one axis may be -1, all the devices that the others leave.

  data: batch, parameters repeated. fsdp: batch, parameters split (ZeRO-3). expert: batch, and the experts of a mixture.
  tensor: heads, hidden units and vocabulary.
  """
  data: int = -1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1

  def check(self):
    for name, size in dataclasses.asdict(self).items():
      if size < 1 and size != -1: yield name, size, 'must be at least 1, or -1 for the devices that are left'
    free = [name for name, size in dataclasses.asdict(self).items() if size == -1]
    if len(free) > 1: yield free[1], -1, f'must be a number: {free[0]} is -1 already'

  def sizes(self, num_devices: int) -> tuple[int, ...]:
    """Sizes in the order of `axes.MESH`, whose product is num_devices; ConfigError if it cannot be."""
    sizes = dataclasses.asdict(self)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = -1 in sizes.values()
    if num_devices % fixed or (fixed != num_devices and not free):
      raise ConfigError('mesh', self, f'needs {"a multiple of " * free}{fixed} devices, but there are {num_devices}')
    return tuple(num_devices // fixed if sizes[name] == -1 else sizes[name] for name in axes.MESH)

  def build(self, devices=None):
    """The `jax.sharding.Mesh` over `devices` (default: all of them), all axes automatic."""
    import jax
    devices = jax.devices() if devices is None else devices
    types = (jax.sharding.AxisType.Auto,) * len(axes.MESH)
    return jax.make_mesh(self.sizes(len(devices)), axes.MESH, axis_types=types, devices=devices)
