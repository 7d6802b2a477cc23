"""A step computed twice from the same state and batch, and compared bit for bit: whether a device computes what it should.

A device that is faulty in silence gives other numbers without an error: copies of parameters stay equal where all devices
get the same wrong gradient, and the loss need not show it. It asks for programs that give the same bits for the same
arguments: those of CPUs do, as is tested, and those of NVIDIA GPUs are said to, with
XLA_FLAGS=--xla_gpu_deterministic_ops=true.
"""
from collections.abc import Callable

import jax

from efficient_lm.errors import DeviceFault
from efficient_lm.parallel import replicas
from efficient_lm.parallel.sharding import wait_on_cpu
from efficient_lm.tree import path_name


def twice(step_function: Callable, save: Callable, state, loss, batch):
  """What `step_function(state, loss, batch)` returns, computed twice.

  It costs a second step, two copies of the state (which a step is given for good: it is donated) and hashes of what comes
  out; in memory, the bytes of a second state. Results are compared by their hashes, of each array: a change within one word
  is always seen, any other with probability 1 - 2**-32. All processes compute the step together.

  save: (step, state, wait), of a state that is to be kept. Raises DeviceFault where the two differ, once the state before
  the step has been saved.
  """
  first = _hashes(step_function(_copied(state), loss, batch))
  result = step_function(_copied(state), loss, batch)
  again = _hashes(result)
  unlike = [name for name in first if first[name] != again[name]]
  if not unlike: return result
  step = int(state.step)
  save(step, state, True)
  more = f' and {len(unlike) - 1} more arrays' if len(unlike) > 1 else ''
  raise DeviceFault(f'step {step + 1}, computed twice, gave another {unlike[0]}{more} the second time, so a device does not '
                    f'compute what it should; the state before, of step {step}, is saved: take another machine, on which '
                    'the same command goes on from there')


def _copied(tree):
  """Each device copies what it holds."""
  return wait_on_cpu(jax.tree.map(lambda leaf: leaf.copy(), tree))


def _hashes(result) -> dict:
  """Of the arrays of a step's result, by their paths. The step itself is not kept."""
  leaves = jax.tree_util.tree_leaves_with_path(dict(zip(('state', 'metrics'), wait_on_cpu(result), strict=True)))
  return replicas.digests({path_name(path): leaf for path, leaf in leaves})
