"""What Mosaic kernels, on TPU and GPU, have in common."""
import jax


def cut_by_compiler() -> str:
  """Why a Mosaic kernel cannot stand here, '' if it can: where the compiler is to cut arrays over devices, it cannot cut a
  kernel. Inside `shard_map` over all axes that have several devices, nothing is left to cut."""
  mesh = jax.sharding.get_abstract_mesh()
  automatic = [name for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
               if size > 1 and kind is not jax.sharding.AxisType.Manual]
  return f'a kernel is not cut over mesh axes {automatic} by the compiler: call it inside shard_map' if automatic else ''
