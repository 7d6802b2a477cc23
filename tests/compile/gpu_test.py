"""Every operation compiles for NVIDIA GPUs: its kernels fit registers and shared memory, and the implementation of 'auto'
compiles, also for a GPU that no kernel is for."""
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from efficient_lm.benches import ops
from efficient_lm.lazy import lazy
from tests.compile import programs, targets

plgpu = lazy('jax.experimental.pallas.mosaic_gpu')

needs_plugin = pytest.mark.skipif(bool(targets.missing('gpu')), reason=targets.missing('gpu') or 'it is not missing')


@needs_plugin
@pytest.mark.parametrize(('target', 'name', 'case'), programs.parameters('gpu'))
def test_compiles_and_fits(target, name, case, capfd):
  op = ops.every()[name]
  case = op.bench('gpu')[case]
  programs.said(capfd)
  for implementation, program in programs.compiled(target, op, case):
    kernel = implementation != 'auto' and ops.is_kernel(op.implementations[implementation])
    if kernel or implementation == 'auto': programs.check_memory(program, jax.eval_shape(case.arguments), target)
    found = programs.assembled(programs.said(capfd))
    called = set(programs.kernel_names(program, 'gpu'))
    # Gradients may be dense products of XLA.
    if kernel and getattr(case, 'of', 'forward') == 'forward': assert called, f'{implementation} calls no kernel'
    if called: assert found.spills, 'nothing was heard of ptxas'
    assert not any(found.spills.values()), f'{implementation} spills bytes: {found.spills}'
    assert not found.warnings, f'{implementation}: {found.warnings}'
    assert max(found.shared_memory, default=0) <= targets.Gpu.shared_memory


@needs_plugin
@pytest.mark.parametrize('target', targets.of('gpu'))
def test_each_kernel_takes_some_case(target):
  assert not {name: unused for name, op in ops.every().items() if (unused := programs.unused_kernels(target, op))}


# A launch takes two or three microseconds, and reading the operands of these cases about ten.
LAUNCHES = {
  ('quantized_matmul', 'W4A16 up M=1'): 1, ('quantized_matmul', 'W4A16 up M=16'): 1, ('quantized_matmul', 'W8A16 up M=1'): 1,
  ('quantized_matmul', 'W4A16 down M=1'): 2, ('quantized_matmul', 'W4A16 down M=16'): 2,   # XLA adds parts of the inputs
  ('decode_attention', 'Llama-3.1-8B, 64 x 8k, bfloat16'): 1, ('decode_attention', 'Llama-3.1-8B, 64 x 8k, int8'): 1,
  ('decode_attention', 'Llama-3.1-8B, 1 x 128k, int8'): 2,   # a kernel joins splits of the tokens
  ('quantize', 'normalised, rotated, to float8, 16384 x 4096'): 1,
}


@needs_plugin
@pytest.mark.skipif(targets.GPU != 'H200', reason='kernels for Hopper')
@pytest.mark.parametrize(('name', 'case'), LAUNCHES)
def test_a_short_operation_is_few_launches(name, case):
  lowered = programs.lower(ops.every()[name].bench('gpu')[case], 'pallas_gpu', targets.mesh('H200'))
  found = programs.launches(programs.finish(lowered, 'H200'))
  assert len(found) == LAUNCHES[name, case], found


@needs_plugin
@pytest.mark.skipif(targets.GPU != 'H200', reason='this is the process for another GPU')
def test_the_same_holds_for_another_gpu_in_a_process_of_its_own():
  again = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-n', '0', __file__], capture_output=True, text=True,
                         env=os.environ | {'COMPILE_FOR_GPU': 'B200'})
  assert again.returncode == 0, again.stdout[-4000:]


def twice(x, scratch):
  def kernel(x_ref, y_ref, scratch_ref): y_ref[...] = 2 * x_ref[...]
  return plgpu.kernel(kernel, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype), kernel_name='twice',
                      scratch_types=[plgpu.SMEM((scratch,), jnp.int8)])(x)


@needs_plugin
def test_a_kernel_is_found_and_one_that_does_not_fit_is_refused(capfd):
  mesh = targets.mesh(targets.GPU)
  x = programs.whole(jax.ShapeDtypeStruct((128,), jnp.float32), mesh)
  with jax.set_mesh(mesh):
    program = programs.finish(jax.jit(lambda x: twice(x, 1024)).lower(x), targets.GPU)
    assert programs.kernel_names(program, 'gpu') == ['twice']
    found = programs.assembled(programs.said(capfd))
    assert list(found.spills.values()) == [0] and found.shared_memory[0] >= 1024
    with pytest.raises(ValueError, match='shared memory'): jax.jit(lambda x: twice(x, 300_000)).lower(x)


def test_what_ptxas_says_is_read():
  text = '''
    Resources(smem_scratch_bytes=196608, tmem_scratch_cols=0)
    ptxas info    : Compiling entry function 'some_kernel' for 'sm_90a'
        16 bytes stack frame, 24 bytes spill stores, 8 bytes spill loads
    ptxas info    : Used 168 registers, used 16 barriers
    ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
    ptxas info    : Compiling entry function 'other' for 'sm_90a'
        0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads'''
  found = programs.assembled(text)
  assert found.spills == {'some_kernel': 32, 'other': 0} and found.shared_memory == [196608] and len(found.warnings) == 1
