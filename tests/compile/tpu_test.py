"""Every operation compiles for every kind of TPU: its kernels fit VMEM, and the implementation of 'auto' compiles."""
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from efficient_lm.benches import ops
from tests.compile import programs, targets

pytestmark = pytest.mark.skipif(bool(targets.missing('tpu')), reason=targets.missing('tpu') or 'it is not missing')


@pytest.mark.parametrize(('target', 'name', 'case'), programs.parameters('tpu'))
def test_compiles_and_fits(target, name, case):
  op = ops.every()[name]
  case = op.bench('tpu')[case]
  for implementation, program in programs.compiled(target, op, case):
    kernel = implementation != 'auto' and ops.is_kernel(op.implementations[implementation])
    if kernel or implementation == 'auto': programs.check_memory(program, jax.eval_shape(case.arguments), target)
    # Gradients may be dense products of XLA.
    if kernel and getattr(case, 'of', 'forward') == 'forward':
      assert programs.kernel_names(program, 'tpu'), f'{implementation} calls no kernel'


@pytest.mark.parametrize('target', targets.of('tpu'))
def test_each_kernel_takes_some_case(target):
  assert not {name: unused for name, op in ops.every().items() if (unused := programs.unused_kernels(target, op))}


@pytest.mark.parametrize('target', targets.of('tpu'))
def test_the_gradient_of_the_loss_takes_a_quarter_of_its_logits(target):
  """A quarter of the logits in bfloat16. An unfused loss has them at least twice, once of these in float32."""
  case = ops.every()['linear_cross_entropy'].bench('tpu')['16k x 4096 x 128k, backward']
  program = programs.finish(programs.lower(case, 'pallas_tpu', targets.mesh(target)), target)
  logits = case.batch * case.length * case.vocab * 2
  assert program.memory_analysis().temp_size_in_bytes <= logits / 4 + 2 ** 20   # vectors


def twice(x, block):
  def kernel(x_ref, y_ref): y_ref[...] = 2 * x_ref[...]
  spec = pl.BlockSpec((block, x.shape[1]), lambda i: (i, 0))
  return pl.pallas_call(kernel, name='twice', grid=(x.shape[0] // block,), in_specs=[spec], out_specs=spec,
                        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


@pytest.mark.parametrize('target', targets.of('tpu'))
def test_a_kernel_is_found_and_one_that_does_not_fit_is_refused(target):
  mesh = targets.mesh(target)
  x = programs.whole(jax.ShapeDtypeStruct((65_536, 1024), jnp.float32), mesh)
  with jax.set_mesh(mesh):
    lowered = lambda block: jax.jit(lambda x: twice(x, block)).lower(x)
    assert programs.kernel_names(programs.finish(lowered(64), target), 'tpu') == ['twice']
    with pytest.raises(jax.errors.JaxRuntimeError, match='vmem'): programs.finish(lowered(65_536), target)
