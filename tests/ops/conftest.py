"""The interpreter of GPU kernels that tests share, extended by an instruction that the kernels use."""
import functools

import jax
import numpy as np
import pytest

from efficient_lm.ops import dispatch


def accepting_registers(interpreted):
  """The interpreter's product, also for a left operand in registers, which the interpreter of jax 0.11 and 0.12 lacks."""
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
  from jax._src.pallas.mosaic_gpu.interpret.shared_memory import HostAllocationKey

  @functools.wraps(interpreted)
  def product(*, token, thread, **given):
    left = np.asarray(given['a_allocation_key_as_array'])
    if left.ndim == 1: return interpreted(token=token, thread=thread, **given)   # the address of an operand in shared memory
    memory = gpu_callbacks._get_shared_memory()
    log = dict(logging_info=gpu_callbacks.memory.GPULoggingInfo(given['mesh_location'], thread, given['source_info']))
    def place(name):
      key = HostAllocationKey.from_array(given[f'{name}_allocation_key_as_array'])
      transforms = gpu_callbacks._remove_noop_transforms(given[f'{name}_transforms'])
      return key, memory.access(key, jax.tree.map(int, transforms))
    right, sums = (memory.get_buffer_content(*place(name), thread, **log)[0] for name in ('b', 'acc'))
    memory.store_buffer_content(*place('acc'), sums + np.matmul(left, right, dtype=sums.dtype), thread, **log)
    return token
  return product


@pytest.fixture
def gpu_interpreter(monkeypatch):
  """Interprets GPU kernels as on four multiprocessors, and reports races."""
  if jax.__version_info__ < (0, 11): pytest.skip('jax interprets GPU kernels from 0.11 on')
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
  from jax.experimental.pallas import mosaic_gpu as plgpu
  monkeypatch.setattr(gpu_callbacks, 'wgmma', accepting_registers(gpu_callbacks.wgmma))
  monkeypatch.setattr(dispatch, 'device', lambda: dispatch.Device('gpu', 'NVIDIA H200', 4))
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)): yield
  assert not gpu_callbacks.get_races().races_found
