"""The operations that have kernels: what each package of `efficient_lm/ops` says of itself, without naming any.

Such a package has `IMPLEMENTATIONS`, by name, the fastest first (see `ops/dispatch.py`), and a module `cases` whose
`bench(platform)` gives cases by name. A case has
  arguments(): arrays, drawn from a fixed key; can be evaluated abstractly
  call(implementation, tiles=None): the function of those arguments that is timed: one pass
  flops, bytes: of one call, the latter the least that must be moved
  precision: dtype of the products, by which its roofline is chosen
  tolerance: how far from the reference a result may be, relative to the reference's largest number
  baselines(): by name, what one would write without the operation
"""
import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import efficient_lm.ops
from efficient_lm.ops import dispatch

REFERENCE = 'reference'   # the definition: exact, and too large where an implementation is needed at all
# 'operation/implementation' -> kinds of device on which `bench --ops` has run it, to be added to when it has.
RAN: dict[str, tuple[str, ...]] = {}


@dataclasses.dataclass(frozen=True)
class Op:
  """An operation. bench: platform -> its cases by name."""
  name: str
  implementations: Mapping[str, dispatch.Implementation]
  bench: Callable[[str], dict[str, Any]]


def every() -> dict[str, Op]:
  """All operations whose package has cases to bench, by name."""
  found = {}
  for module in pkgutil.iter_modules(efficient_lm.ops.__path__):
    if not module.ispkg: continue
    package, cases = (importlib.import_module(f'efficient_lm.ops.{module.name}{part}') for part in ('', '.cases'))
    if hasattr(cases, 'bench'): found[module.name] = Op(module.name, package.IMPLEMENTATIONS, cases.bench)
  return found


def families(one: dispatch.Implementation, auto: bool = False) -> tuple[str, ...]:
  """Devices that an implementation is for, or those on which 'auto' may take it."""
  return one.on if one.auto is None or not auto else one.auto


def suits(one: dispatch.Implementation, device: dispatch.Device, auto: bool = False) -> bool:
  """Whether an implementation runs on that device, or whether 'auto' may take it there."""
  return bool(set(families(one, auto)) & set(device.families))


def is_kernel(one: dispatch.Implementation) -> bool:
  """Whether it is written for certain devices, not for any."""
  return '' not in one.on


def elsewhere(operations: Mapping[str, Op], device: dispatch.Device) -> list[str]:
  """A sentence for each kernel that does not run on this device: what it is for, and where it ever ran."""
  return [f'{op.name}, {name}: for {" or ".join(one.on)}, not run here; {_history(op, name)}'
          for op in operations.values() for name, one in op.implementations.items()
          if is_kernel(one) and not suits(one, device)]


def _history(op: Op, name: str) -> str:
  ran = RAN.get(f'{op.name}/{name}')
  return f'was run on {", ".join(ran)}' if ran else 'never run on a device'
