"""Programs compiled for a target, and the properties that tests read from them."""
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

# The custom call of a Mosaic kernel in XLA's programs, by platform.
CUSTOM_CALLS = {'tpu': 'tpu_custom_call', 'gpu': 'mosaic_gpu'}
# XLA must not autotune its own kernels: without a GPU nothing can be timed.
OPTIONS = {'tpu': {}, 'gpu': {'xla_gpu_autotune_level': 0}}


def parameters(platform: str) -> list:
  """A pytest parameter for each target of the platform, operation and case; a single skipped one where nothing compiles."""
  reason = targets.missing(platform)
  if reason: return [pytest.param(None, None, None, id='none', marks=pytest.mark.skip(reason=reason))]
  return [pytest.param(target, name, case, id=f'{target}, {name}, {case}') for target in targets.of(platform)
          for name, op in ops.every().items() for case in op.bench(platform)]


def whole(tree, mesh):
  """The shapes of a tree of arrays that are replicated over the mesh."""
  sharding = NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def lower(case, name: str, mesh):
  """The case lowered for the mesh, or None where the named implementation refuses its arguments."""
  # Arguments are evaluated outside of the mesh: operations that are not traced would run on its devices, which are not here.
  arguments = whole(jax.eval_shape(case.arguments), mesh)
  with jax.set_mesh(mesh):
    try: return jax.jit(case.call(name), keep_unused=True).lower(*arguments)
    except ValueError as error:
      if name == 'auto' or 'cannot take this: ' not in str(error): raise


def running(op: ops.Op, mesh) -> dict[str, dispatch.Implementation]:
  """The implementations that run on the mesh's devices, without the reference, which is not meant for such sizes."""
  with jax.set_mesh(mesh): here = dispatch.device()
  return {name: one for name, one in op.implementations.items() if ops.suits(one, here) and name != ops.REFERENCE}


def finish(lowered, target: str):
  """The lowered program compiled for a target."""
  return lowered.compile(compiler_options=OPTIONS[targets.TARGETS[target].platform])


def compiled(target: str, op: ops.Op, case) -> Iterator:
  """(implementation, program) for each kernel that runs on the target and takes the case, for 'auto', and on the first
  target of a platform for each other implementation; programs that equal a previous one are left out. Implementations that
  are no kernels may need more memory than the target has, and are left out then."""
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
  """The kernels for the target that refuse every case, so that none of their programs is compiled. cuDNN is left out,
  because JAX asks it on a GPU only."""
  mesh, cases = targets.mesh(target), op.bench(targets.TARGETS[target].platform).values()
  return {name for name, one in running(op, mesh).items()
          if ops.is_kernel(one) and name != 'cudnn' and all(lower(case, name, mesh) is None for case in cases)}


def kernel_names(program, platform: str) -> list[str]:
  """The name of each kernel that a compiled program calls, from the metadata of operations; '' where these have none, as for
  operations that XLA inserted, and for some that are mapped over a batch."""
  calls = [line for line in program.as_text().splitlines() if f'custom_call_target="{CUSTOM_CALLS[platform]}' in line]
  names = [re.search(r'op_name="([^"]*)"|$', line)[1] or '' for line in calls]
  return [name.removesuffix('/pallas_call').removesuffix('/mpmd_map').rpartition('/')[2] for name in names]


def launches(program) -> list[str]:
  """The operations that a compiled program for a GPU launches, in order: those of its entry computation that are no
  views."""
  entry = re.sub(r'/\*.*?\*/', '', program.as_text().partition('\nENTRY ')[2].partition('\n}')[0])
  operations = re.findall(r'^ *(?:ROOT )?%\S+ = (?:\([^)]*\)|\S+) ([a-z-]+)\(', entry, re.MULTILINE)
  return [name for name in operations if name not in ('parameter', 'constant', 'bitcast', 'tuple', 'get-tuple-element')]


def check_memory(program, arguments, target: str):
  """Checks that arguments take at least their size, and that arguments, results and temporaries fit the device together."""
  memory, needed = program.memory_analysis(), sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments))
  assert memory.argument_size_in_bytes >= needed, f'arguments of {needed} bytes: {memory}'
  alive = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  assert alive <= targets.TARGETS[target].memory, f'{alive / 1e9:.1f} GB do not fit the {target}: {memory}'


@dataclasses.dataclass(frozen=True)
class Assembled:
  """The output of ptxas, NVIDIA's assembler. spills: bytes by kernel. shared_memory: bytes that each kernel asks for.
  warnings: its warnings about performance."""
  spills: dict[str, int]
  shared_memory: list[int]
  warnings: list[str]


def assembled(text: str) -> Assembled:
  """Reads the output of ptxas, and Mosaic's output about resources."""
  kernels = {re.search(r"'(\S+)'", block)[1]: sum(map(int, re.findall(r'(\d+) bytes spill', block)))
             for block in text.split('Compiling entry function')[1:]}
  return Assembled(kernels, [int(size) for size in re.findall(r'smem_scratch_bytes=(\d+)', text)],
                   re.findall(r'.*Potential Performance Loss.*', text))


def said(capfd) -> str:
  """The text written to the file descriptors of stdout and stderr since the last call, including the buffers of C."""
  ctypes.CDLL(None).fflush(None)
  return ''.join(capfd.readouterr())
