"""Mosaic kernels, for TPU and GPU, as implementations of an operation."""
import types
from collections.abc import Callable

import jax

from efficient_lm.ops import dispatch


def kernel(module: Callable[[], types.ModuleType], name: str, families: str | tuple[str, ...],
           refuses: Callable[..., str] | None = None) -> dispatch.Implementation:
  """A kernel as an implementation. It refuses arrays that the compiler would have to cut.

  Args:
    module: imports and returns the kernel's module. It is called when the kernel is asked for: importing Pallas takes a
      quarter of a second, which programs without kernels need not wait for.
    name: of the function in that module.
    families: of devices that the kernel is for, one or several: see `dispatch.Device`.
    refuses: see `dispatch.Implementation`; the module's own by default.
  """
  def run(*arguments, **options): return getattr(module(), name)(*arguments, **options)
  def why_not(*arguments, **options) -> str:
    return (refuses or module().refuses)(*arguments, **options) or cut_by_compiler()
  return dispatch.Implementation(run, on=(families,) if isinstance(families, str) else families, refuses=why_not)


def cut_by_compiler() -> str:
  """Why a Mosaic kernel cannot be called here, or '': the compiler cannot partition a kernel over the devices of a mesh.
  Inside `shard_map` over all axes that have several devices it need not."""
  mesh = jax.sharding.get_abstract_mesh()
  automatic = [name for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
               if size > 1 and kind is not jax.sharding.AxisType.Manual]
  return f'a kernel is not cut over mesh axes {automatic} by the compiler: call it inside shard_map' if automatic else ''
