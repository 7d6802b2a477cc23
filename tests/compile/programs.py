"""Programs compiled for a target, and what is read off them."""
import ctypes
import dataclasses
import re
from collections.abc import Iterator

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from efficient_lm.benches import ops
from efficient_lm.ops import dispatch
from tests.compile import targets

# What XLA calls a kernel of ours, by platform.
CUSTOM_CALLS = {'tpu': 'tpu_custom_call', 'gpu': 'mosaic_gpu'}
# Without a GPU nothing can be timed: XLA must not try which of its own kernels is the fastest.
OPTIONS = {'tpu': {}, 'gpu': {'xla_gpu_autotune_level': 0}}


def parameters(platform: str) -> list:
  """A pytest parameter for each target of the platform, operation and case; one that is skipped where nothing compiles."""
  reason = targets.missing(platform)
  if reason: return [pytest.param(None, None, None, id='none', marks=pytest.mark.skip(reason=reason))]
  return [pytest.param(target, name, case, id=f'{target}, {name}, {case}') for target in targets.of(platform)
          for name, op in ops.every().items() for case in op.bench(platform)]


def whole(tree, mesh):
  """Shapes of a tree, each array whole on every device of the mesh."""
  sharding = NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def lower(case, name: str, mesh):
  """The case lowered for the mesh, or None where the named implementation refuses its arguments."""
  # Outside of the mesh: what is not traced would be run, on devices that are not here.
  arguments = whole(jax.eval_shape(case.arguments), mesh)
  with jax.set_mesh(mesh):
    try: return jax.jit(case.call(name), keep_unused=True).lower(*arguments)
    except ValueError as error:
      if name == 'auto' or 'cannot take this: ' not in str(error): raise


def running(op: ops.Op, mesh) -> dict[str, dispatch.Implementation]:
  """Implementations that run on the mesh's devices; not the definition, which is not meant for such sizes."""
  with jax.set_mesh(mesh): here = dispatch.device()
  return {name: one for name, one in op.implementations.items() if ops.suits(one, here) and name != ops.REFERENCE}


def finish(lowered, target: str):
  """The lowered program compiled for a target."""
  return lowered.compile(compiler_options=OPTIONS[targets.TARGETS[target].platform])


def compiled(target: str, op: ops.Op, case) -> Iterator:
  """(implementation, program) by each kernel that runs on the target and takes the case, by 'auto', and, on the first target
  of a platform, by each other that runs there; a program that is one of those before is left out. The others may want more
  memory than there is."""
  seen, mesh = set(), targets.mesh(target)
  kernels = {name: ops.is_kernel(one) for name, one in running(op, mesh).items()}
  others = [name for name in kernels if not kernels[name]] if target in ('v5e', 'H200') else []
  for name in (*(name for name in kernels if kernels[name]), 'auto', *others):
    lowered = lower(case, name, mesh)
    if lowered is None or (text := lowered.as_text()) in seen: continue
    seen.add(text)
    try: yield name, finish(lowered, target)
    except jax.errors.JaxRuntimeError as error:
      if kernels.get(name, True) or 'RESOURCE_EXHAUSTED' not in str(error): raise


def unused_kernels(target: str, op: ops.Op) -> set[str]:
  """Kernels for the target that refuse every case: nothing would be known of them. Not cuDNN, which needs a GPU to ask."""
  mesh, cases = targets.mesh(target), op.bench(targets.TARGETS[target].platform).values()
  return {name for name, one in running(op, mesh).items()
          if ops.is_kernel(one) and name != 'cudnn' and all(lower(case, name, mesh) is None for case in cases)}


def kernel_names(program, platform: str) -> list[str]:
  """The name of each kernel that a compiled program calls, from XLA's record of where an operation is from; '' where it has
  none, as for what XLA put in and for some that are mapped over a batch."""
  calls = [line for line in program.as_text().splitlines() if f'custom_call_target="{CUSTOM_CALLS[platform]}' in line]
  names = [re.search(r'op_name="([^"]*)"|$', line)[1] or '' for line in calls]
  return [name.removesuffix('/pallas_call').removesuffix('/mpmd_map').rpartition('/')[2] for name in names]


def launches(program) -> list[str]:
  """What a compiled program for a GPU launches, one after another: the operations of its entry that are no views."""
  entry = re.sub(r'/\*.*?\*/', '', program.as_text().partition('\nENTRY ')[2].partition('\n}')[0])
  operations = re.findall(r'^ *(?:ROOT )?%\S+ = (?:\([^)]*\)|\S+) ([a-z-]+)\(', entry, re.MULTILINE)
  return [name for name in operations if name not in ('parameter', 'constant', 'bitcast', 'tuple', 'get-tuple-element')]


def check_memory(program, arguments, target: str):
  """Arguments take their size, and what tiles pad; all that is alive at once fits the device."""
  memory, needed = program.memory_analysis(), sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments))
  assert memory.argument_size_in_bytes >= needed, f'arguments of {needed} bytes: {memory}'
  alive = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  assert alive <= targets.TARGETS[target].memory, f'{alive / 1e9:.1f} GB do not fit the {target}: {memory}'


@dataclasses.dataclass(frozen=True)
class Assembled:
  """What the compiler of NVIDIA's machine code said. spills: bytes by kernel. shared_memory: bytes that each kernel asks
  for. complaints: sentences about lost performance."""
  spills: dict[str, int]
  shared_memory: list[int]
  complaints: list[str]


def assembled(text: str) -> Assembled:
  """Reads the output of ptxas, and that of Mosaic about resources."""
  kernels = {re.search(r"'(\S+)'", block)[1]: sum(map(int, re.findall(r'(\d+) bytes spill', block)))
             for block in text.split('Compiling entry function')[1:]}
  return Assembled(kernels, [int(size) for size in re.findall(r'smem_scratch_bytes=(\d+)', text)],
                   re.findall(r'.*Potential Performance Loss.*', text))


def said(capfd) -> str:
  """What was written to the file descriptors of output and errors since the last call; also by C, through its buffers."""
  ctypes.CDLL(None).fflush(None)
  return ''.join(capfd.readouterr())
