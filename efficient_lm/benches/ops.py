"""The operations with several implementations, as the packages of `efficient_lm/ops` describe themselves.

Such a package has `IMPLEMENTATIONS`, by name, the fastest first (see `ops/dispatch.py`), and a module `cases` whose
`bench(platform)` returns cases by name. A case has
  arguments(): arrays, drawn from a fixed key; can be evaluated abstractly
  call(implementation, tiles=None): the function of those arguments that is timed, one pass
  flops, bytes: those of one call; bytes are the least that must be moved
  precision: the dtype of the products, which determines the roofline
  tolerance: the largest error of a result, relative to the reference's largest number
  baselines(): by name, functions that one would write without the operation
"""
import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import efficient_lm.ops
from efficient_lm.ops import dispatch

REFERENCE = 'reference'   # the definition, which needs too much memory or time at realistic sizes
# 'operation/implementation' -> kinds of device on which `bench --ops` has run it; to be extended when it has.
RAN: dict[str, tuple[str, ...]] = {}


@dataclasses.dataclass(frozen=True)
class Op:
  """An operation. bench: platform -> cases by name."""
  name: str
  implementations: Mapping[str, dispatch.Implementation]
  bench: Callable[[str], dict[str, Any]]


def every() -> dict[str, Op]:
  """All operations by name: each package in `efficient_lm/ops` is one."""
  found = {}
  for module in pkgutil.iter_modules(efficient_lm.ops.__path__):
    if not module.ispkg: continue
    package, cases = (importlib.import_module(f'efficient_lm.ops.{module.name}{part}') for part in ('', '.cases'))
    found[module.name] = Op(module.name, package.IMPLEMENTATIONS, cases.bench)
  return found


def families(one: dispatch.Implementation, auto: bool = False) -> tuple[str, ...]:
  """The families of devices that an implementation is for, or those on which 'auto' may choose it."""
  return one.on if one.auto is None or not auto else one.auto


def suits(one: dispatch.Implementation, device: dispatch.Device, auto: bool = False) -> bool:
  """Whether an implementation runs on that device, or whether 'auto' may choose it there."""
  return bool(set(families(one, auto)) & set(device.families))


def is_kernel(one: dispatch.Implementation) -> bool:
  """Whether an implementation is written for certain devices."""
  return '' not in one.on


def elsewhere(operations: Mapping[str, Op], device: dispatch.Device) -> list[str]:
  """A line for each kernel that does not run on this device: the devices it is for, and those on which it has run."""
  return [f'{op.name}, {name}: for {" or ".join(one.on)}, not run here; {_history(op, name)}'
          for op in operations.values() for name, one in op.implementations.items()
          if is_kernel(one) and not suits(one, device)]


def _history(op: Op, name: str) -> str:
  ran = RAN.get(f'{op.name}/{name}')
  return f'was run on {", ".join(ran)}' if ran else 'never run on a device'
