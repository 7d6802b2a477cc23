"""The choice of an operation's implementation: by the device for 'auto', by name otherwise, and never by fallback."""
import dataclasses
from collections.abc import Callable, Mapping

import jax

# The first words of a device's kind -> its family. A kernel is written for a family; devices of one family may differ in
# tiles.
FAMILIES = {
  'NVIDIA H100': 'hopper', 'NVIDIA H200': 'hopper', 'NVIDIA H800': 'hopper', 'NVIDIA GH200': 'hopper',
  'NVIDIA B200': 'blackwell', 'NVIDIA B300': 'blackwell', 'NVIDIA GB200': 'blackwell', 'NVIDIA GB300': 'blackwell',
}


@dataclasses.dataclass(frozen=True)
class Device:
  """The properties of a device that kernels are compiled for. num_cores: multiprocessors of a GPU, None elsewhere."""
  platform: str
  kind: str
  num_cores: int | None = None

  @property
  def families(self) -> tuple[str, ...]:
    """The names by which implementations may address this device, the most specific first; '' addresses any device."""
    named = tuple(family for kind, family in FAMILIES.items() if self.kind.startswith(kind))
    return (*named, self.platform, '')

  @property
  def may_be_cpu(self) -> bool:
    """Whether a program that is traced here may run on a CPU."""
    return self.platform in ('cpu', ANY)


ANY = 'any'   # the platform of a program for all platforms


def device() -> Device:
  """The device for which a function is being traced: any at all inside `portable`; else that of the mesh in force
  (`jax.set_mesh`), which may belong to another machine; else the default device."""
  if _portable.value: return Device(ANY, 'device of any kind')
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  if abstract is not None:
    platform = {'cuda': 'gpu'}.get(abstract.platform, abstract.platform)
    return Device(platform, abstract.device_kind, abstract.num_cores)
  here = jax.devices()[0]
  return Device(here.platform, here.device_kind, getattr(here, 'core_count', None))


# A context that is part of the keys of jit's caches: a function traced under one preference is not used under another.
_preferred = jax.make_user_context(())


def prefer(**names: str):
  """A context in which 'auto' stands for the named implementations, by operation: `with prefer(grouped_matmul='xla'): …`.

  It serves to compare implementations in a whole model, whose layers ask for 'auto', or to rule one out. As with any name,
  an implementation that cannot run is an error.
  """
  return _preferred(tuple(sorted((dict(_preferred.value) | names).items())))


_portable = jax.make_user_context(False)   # part of those keys, too


def portable():
  """A context in which functions are traced for devices of every kind at once, as an exported program needs it: 'auto' takes
  what runs everywhere, whatever device is here."""
  return _portable(True)


@dataclasses.dataclass(frozen=True)
class Implementation:
  """One implementation of an operation.

  run: the function, which takes the arguments of the operation.
  on: families of devices on which it runs.
  auto: families of devices on which 'auto' may choose it; `on` by default.
  refuses: takes the same arguments and returns why `run` cannot take them, in a few words, or '' if it can.
  """
  run: Callable
  on: tuple[str, ...] = ('',)
  auto: tuple[str, ...] | None = None
  refuses: Callable[..., str] = lambda *arguments, **options: ''


def given(**options) -> dict:
  """The options that are not None: implementations that do not know an option are called as without it, where it is not
  asked for, and refuse it by name where it is."""
  return {name: value for name, value in options.items() if value is not None}


def run(op: str, implementations: Mapping[str, Implementation], name: str, *arguments, **options):
  """Computes `op` by the implementation `name`, or, if that is 'auto', by the first one that suits device and arguments.

  Args:
    op: the operation's name, for error messages.
    implementations: by name, the fastest first.

  Raises:
    ValueError: the named implementation does not exist, is for other devices, or refuses the arguments. No other takes its
      place: a benchmark that silently measured something else would be worse than one that stopped.
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
