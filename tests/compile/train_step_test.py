"""The train step of a mixture of experts: compiled for machines that are not here, it calls the kernels of operations; and
on a CPU its loss is the same with every implementation."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from configs import moe
from efficient_lm import axes
from efficient_lm.benches import ops
from efficient_lm.config.mesh import Mesh
from efficient_lm.ops import attention, dispatch, grouped_matmul, linear_cross_entropy
from efficient_lm.parallel.sharding import placed
from efficient_lm.training.learner import assemble, initial_state
from efficient_lm.training.optimizers import AdamW
from efficient_lm.training.trainer import compiled_step
from tests.compile import programs, targets

IMPLEMENTATIONS = {module.__name__.rpartition('.')[2]: module.IMPLEMENTATIONS
                   for module in (grouped_matmul, linear_cross_entropy, attention)}
BATCH = dict(inputs_BT=np.int32, targets_BT=np.int32, weights_BT=np.float32, bytes_BT=np.int32, segments_BT=np.int32,
             positions_BT=np.int32)


def few_layers(variant: str):
  """configs/moe.py with two layers. Layers are a loop, so that their number does not change what is compiled."""
  experiment = moe.get_config(variant)
  stacks = tuple(dataclasses.replace(stack, num_layers=2, unroll=1) for stack in experiment.model.stacks)
  return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, stacks=stacks))


def lowered(mesh, sequences: int, **preferred: str):
  """The train step of gpt2_124m, lowered for the mesh from shapes alone, with so many sequences on each device."""
  experiment = few_layers('gpt2_124m')
  model = jax.eval_shape(lambda: experiment.model.build(rngs=nnx.Rngs(params=jax.random.key(0))))
  learner = assemble(model, experiment.train.optimizer.build(100), (), jax.random.key(0))
  state = jax.eval_shape(lambda model: initial_state(learner.replace(model=model)), model)
  shape = (sequences * mesh.size, experiment.train.sequence_length)
  batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(axes.BATCH)))
           for name, dtype in BATCH.items()}
  state = placed(state, mesh)
  # Only the lowering has the mesh: operations that are not traced would run on its devices, which are not here.
  with jax.set_mesh(mesh), dispatch.prefer(**preferred): return compiled_step(learner).lower(state, learner.loss, batch)


def num_kernels(text: str, platform: str) -> int:
  """The number of calls of Mosaic kernels in a lowered program."""
  return text.count(f'custom_call @{programs.CUSTOM_CALLS[platform]}')


def there(target: str, count: int | None = None):
  """The mesh of a config over the first `count` devices of a target."""
  reason = targets.missing(targets.TARGETS[target].platform)
  if reason: pytest.skip(reason)
  return Mesh(fsdp=-1, data=1).build(targets.TARGETS[target].devices()[:count])


@pytest.mark.parametrize(('target', 'count'), [('v5e', 1), ('v5e', 8), ('H200', 1)])
def test_compiles_and_fits(target, count):
  mesh, platform = there(target, count), targets.TARGETS[target].platform
  step = lowered(mesh, 4)
  program = programs.finish(step, target)
  assert len(programs.kernel_names(program, platform)) >= (num_kernels(step.as_text(), platform) > 0)
  memory = program.memory_analysis()
  assert memory.alias_size_in_bytes > 0, 'the donated state is not reused'
  assert memory.argument_size_in_bytes + memory.temp_size_in_bytes <= targets.TARGETS[target].memory


@pytest.mark.parametrize(('target', 'count'), [('v5e', 1), ('v5e', 8), ('H200', 1)])
@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_the_kernel_of_the_device_is_called(name, target, count):
  """With 'xla' in its place the program has fewer kernels. Several devices run the kernel on their own shards."""
  mesh, platform = there(target, count), targets.TARGETS[target].platform
  with jax.set_mesh(mesh): here = dispatch.device()
  kernels = [kernel for kernel, one in IMPLEMENTATIONS[name].items()
             if ops.is_kernel(one) and ops.suits(one, here, auto=True)]
  assert kernels, f'{name} has no kernel for the {target}'
  if kernels == ['cudnn']: pytest.skip('JAX asks cuDNN while it traces, which takes a GPU')
  ours, without = lowered(mesh, 4), lowered(mesh, 4, **{name: 'xla'})
  assert num_kernels(ours.as_text(), platform) > num_kernels(without.as_text(), platform)


def batch_of(experiment):
  shape, (tokens, targets) = (2, 64), jax.random.randint(jax.random.key(1), (2, 2, 64), 0, experiment.model.vocab_size)
  return dict(inputs_BT=tokens, targets_BT=targets, weights_BT=jnp.ones(shape), bytes_BT=jnp.ones(shape, jnp.int32),
              segments_BT=jnp.sort(tokens % 3, axis=1), positions_BT=jnp.broadcast_to(jnp.arange(64), shape))


@pytest.fixture(scope='module')
def measured():
  """Measures the loss and the norm of the gradient of a step, with the implementations that 'auto' stands for."""
  # Compilation takes nearly all the time of these tests; what they state holds for any program.
  jax.config.update('jax_disable_most_optimizations', True)
  experiment = few_layers('tiny')
  model = jax.jit(lambda: experiment.model.build(rngs=nnx.Rngs(params=jax.random.key(0))))()
  def measure(**preferred):
    learner = assemble(model, AdamW().build(10), (), jax.random.key(0))
    with dispatch.prefer(**preferred):
      _, metrics = compiled_step(learner)(initial_state(learner), learner.loss, batch_of(experiment))
    return [float(metrics[name]) for name in ('loss', 'grad_norm')]
  yield functools.cache(measure)
  jax.config.update('jax_disable_most_optimizations', False)


def others(implementations) -> list[str]:
  """The implementations for any device, without the one that 'auto' chooses on a CPU if none refuses."""
  cpu = dispatch.Device('cpu', 'cpu')
  taken = next(name for name, one in implementations.items() if ops.suits(one, cpu, auto=True))
  return [name for name, one in implementations.items() if not ops.is_kernel(one) and name != taken]


@pytest.mark.thinned
@pytest.mark.parametrize(('name', 'implementation'), [
  (name, implementation) for name, implementations in IMPLEMENTATIONS.items() for implementation in others(implementations)])
def test_the_loss_is_the_same_by_every_implementation(measured, name, implementation):
  """In float32, in another order of summation: sums of at most a thousand products leave five digits."""
  np.testing.assert_allclose(measured(**{name: implementation}), measured(), rtol=1e-5)
