"""Chooses the implementation of an operation: by the device for 'auto', by name otherwise, never by fallback."""
import dataclasses
from collections.abc import Callable, Mapping

import jax

# The first words of a device's kind -> its family. Kernels are written for a family; within one they differ in tiles.
FAMILIES = {
  'NVIDIA H100': 'hopper', 'NVIDIA H200': 'hopper', 'NVIDIA H800': 'hopper', 'NVIDIA GH200': 'hopper',
  'NVIDIA B200': 'blackwell', 'NVIDIA B300': 'blackwell', 'NVIDIA GB200': 'blackwell', 'NVIDIA GB300': 'blackwell',
}


@dataclasses.dataclass(frozen=True)
class Device:
  """What a kernel must know of the device that it is compiled for. num_cores: multiprocessors of a GPU, None elsewhere."""
  platform: str
  kind: str
  num_cores: int | None = None

  @property
  def families(self) -> tuple[str, ...]:
    """Names that an implementation may be for, the most specific first; '' is any device."""
    named = tuple(family for kind, family in FAMILIES.items() if self.kind.startswith(kind))
    return (*named, self.platform, '')


def device() -> Device:
  """The device that what is being traced will run on: that of the mesh in force (`jax.set_mesh`), which may be of a machine
  that is not here, or else the default device."""
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  if abstract is not None:
    platform = {'cuda': 'gpu'}.get(abstract.platform, abstract.platform)
    return Device(platform, abstract.device_kind, abstract.num_cores)
  here = jax.devices()[0]
  return Device(here.platform, here.device_kind, getattr(here, 'core_count', None))


# A context that jit's caches know of: a function traced under one preference is not used under another.
_preferred = jax.make_user_context(())


def prefer(**names: str):
  """A context in which 'auto' stands for these implementations: `with prefer(grouped_matmul='xla'): …`, by operation. For
  whole models, whose layers ask for 'auto': to compare implementations, or to rule one out. A name is taken at its word."""
  return _preferred(tuple(sorted((dict(_preferred.value) | names).items())))


@dataclasses.dataclass(frozen=True)
class Implementation:
  """One way to compute an operation.

  run: the function, with the arguments of the operation.
  on: families of devices that it runs on.
  auto: families of devices on which 'auto' may take it; `on` by default.
  refuses: called with the same arguments; says in a few words why `run` cannot take them, '' if it can.
  """
  run: Callable
  on: tuple[str, ...] = ('',)
  auto: tuple[str, ...] | None = None
  refuses: Callable[..., str] = lambda *arguments, **options: ''


def run(op: str, implementations: Mapping[str, Implementation], name: str, *arguments, **options):
  """Computes `op` by the implementation of that name, or, if it is 'auto', by the first that suits device and arguments.

  Args:
    op: the operation's name, for error messages.
    implementations: by name, the fastest first.

  Raises:
    ValueError: the named implementation does not exist, is for other devices, or refuses the arguments. Another one never
      takes its place: a benchmark that silently measured something else is worse than one that stopped.
  """
  here = device()
  if name == 'auto': name = dict(_preferred.value).get(op, 'auto')
  if name == 'auto':
    name = next(name for name, one in implementations.items()
                if _overlap(one.on if one.auto is None else one.auto, here) and not one.refuses(*arguments, **options))
  if name not in implementations:
    raise ValueError(f"{op} has no implementation {name!r}: choose 'auto' or one of {sorted(implementations)}")
  chosen = implementations[name]
  if not _overlap(chosen.on, here):
    raise ValueError(f"{op} implementation {name!r} is for {' or '.join(chosen.on)}, but the device is a "
                     f"{here.kind} ({here.platform}): choose 'auto' or another of {sorted(implementations)}")
  if why := chosen.refuses(*arguments, **options):
    raise ValueError(f'{op} implementation {name!r} cannot take this: {why}')
  return chosen.run(*arguments, **options)


def _overlap(families: tuple[str, ...], here: Device) -> bool:
  return bool(set(families) & set(here.families))
