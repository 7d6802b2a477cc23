"""Machines that are not here, for which their compilers compile nevertheless: TPUs with libtpu, GPUs with the CUDA plug-in.

A compilation proves that the compiler accepts a program, and how much memory it needs. It proves no results and no speed.
"""
import dataclasses
import importlib.util
import os

# libtpu reads these when it starts: it must not look for a TPU virtual machine, and several processes may compile at once.
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-8')
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', 'true')
# Mosaic reads these when it compiles a kernel: it prints the output of ptxas, and the memory that the kernel asks for.
os.environ.setdefault('MOSAIC_GPU_DUMP_PTXAS', '1')
os.environ.setdefault('MOSAIC_GPU_DUMP_RESOURCES', '1')

import jax
import numpy as np
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Tpu:
  """topology: its name in libtpu. memory: bytes of one device, which is a core of tpu7x or a chip of the others."""
  topology: str
  memory: float
  platform = 'tpu'

  def devices(self) -> list:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=self.topology).devices)


@dataclasses.dataclass(frozen=True)
class Gpu:
  """The figures of NVIDIA's data sheets, and of the table of compute capabilities in the CUDA programming guide."""
  kind: str
  capability: int      # major; minor is 0
  num_cores: int       # multiprocessors
  memory: float        # bytes
  bandwidth: float     # bytes a second
  cache: int           # bytes, level 2
  clock: float         # GHz
  platform = 'gpu'
  shared_memory = 227 * 1024   # bytes that one block may ask for; a multiprocessor has 1 KiB more for the system

  def devices(self) -> list:
    description = f'''
      gpu_device_info {{
        cuda_compute_capability {{ major: {self.capability} minor: 0 }} core_count: {self.num_cores} fpus_per_core: 128
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 clock_rate_ghz: {self.clock}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        shared_memory_per_block: {48 * 1024} shared_memory_per_block_optin: {self.shared_memory}
        shared_memory_per_core: {self.shared_memory + 1024}
        registers_per_core_limit: 65536 registers_per_block_limit: 65536 l2_cache_size: {self.cache}
        memory_bandwidth: {self.bandwidth:.0f} device_memory_size: {self.memory:.0f}
      }}
      platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{self.kind}"'''
    return list(topologies.get_topology_desc(
      platform='cuda', topology_name=self.kind, topology='1x1x1', target_config=description).devices)


TARGETS = {
  'v5e': Tpu('v5e:2x4', 16e9), 'v5p': Tpu('v5p:2x2x1', 95e9), 'v6e': Tpu('v6e:2x4', 32e9), 'tpu7x': Tpu('tpu7x:2x2x1', 96e9),
  'H200': Gpu('NVIDIA H200', 9, 132, 141e9, 4.8e12, 50 * 2 ** 20, 1.98),
  'B200': Gpu('NVIDIA B200', 10, 148, 180e9, 8e12, 126 * 2 ** 20, 1.965),
}
PACKAGES = {'tpu': ('libtpu', 'make check-tpu-compile'), 'gpu': ('jax_cuda13_plugin', 'make check-gpu-compile')}


# Mosaic GPU assembles all kernels of a process for the compute capability of the first one: a process has one kind of GPU.
GPU = os.environ.get('COMPILE_FOR_GPU', 'H200')


def of(platform: str) -> list[str]:
  """The names of the targets of that platform for which this process compiles."""
  return [name for name, target in TARGETS.items() if target.platform == platform and (platform != 'gpu' or name == GPU)]


def missing(platform: str) -> str:
  """Why nothing can be compiled for that platform here; '' if it can."""
  package, command = PACKAGES[platform]
  return '' if importlib.util.find_spec(package) else f'{package} is not installed: {command} builds an environment with it'


def mesh(name: str) -> jax.sharding.Mesh:
  """One device of the target."""
  return jax.sharding.Mesh(np.array(TARGETS[name].devices()[:1]), ('data',))
