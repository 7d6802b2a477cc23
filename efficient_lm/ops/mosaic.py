"""What Mosaic kernels, on TPU and GPU, have in common."""
from collections.abc import Callable

import jax

from efficient_lm.ops import dispatch


def kernel(module, name: str, families: str | tuple[str, ...],
           refuses: Callable[..., str] | None = None) -> dispatch.Implementation:
  """The function `name` of a kernel's module as an implementation for a family of devices, or for several; the module, which
  may be lazy, is imported where it is called. refuses: that of the module by default. None of them takes arrays that the
  compiler cuts."""
  def run(*arguments, **options): return getattr(module, name)(*arguments, **options)
  def why_not(*arguments, **options) -> str:
    return (refuses or module.refuses)(*arguments, **options) or cut_by_compiler()
  return dispatch.Implementation(run, on=(families,) if isinstance(families, str) else families, refuses=why_not)


def cut_by_compiler() -> str:
  """Why a Mosaic kernel cannot stand here, '' if it can: where the compiler is to cut arrays over devices, it cannot cut a
  kernel. Inside `shard_map` over all axes that have several devices, nothing is left to cut."""
  mesh = jax.sharding.get_abstract_mesh()
  automatic = [name for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
               if size > 1 and kind is not jax.sharding.AxisType.Manual]
  return f'a kernel is not cut over mesh axes {automatic} by the compiler: call it inside shard_map' if automatic else ''
