"""Weights that are watched: `Observed` leaves the forward pass alone, and what autodiff calls the gradient of its statistics
is what it saw. So calibration is one `jax.grad`, through scans, experts and meshes alike; the backward pass proper is dead
code, which XLA drops.

Statistics of the rows x (M, K) that a weight multiplies, its inputs merged; float32, stacks of layers and experts in front:

  gram       (..., K, K)   x^T x
  magnitude  (..., K)      the sum of |x|
  peak       (..., K)      the largest |x|
  count      (..., 1)      the number of rows, M; of experts, what each was sent

All but `peak` add up, over batches and over devices.
"""
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from efficient_lm.ops.grouped_matmul import grouped_matmul
from efficient_lm.weights.quantized import Layout
from efficient_lm.weights.weight import Weight, Wrapper


class Statistic(nnx.Variable):
  """Something observed."""


def shape_of(statistic: str, K: int) -> tuple[int, ...]:
  """Of a weight with K inputs."""
  return {'gram': (K, K), 'magnitude': (K,), 'peak': (K,), 'count': (1,)}[statistic]


def joined(statistic: str, a, b):
  """Of two sets of rows, that of both."""
  return jnp.maximum(a, b) if statistic == 'peak' else a + b


class Observed(Wrapper):
  """Multiplies as `inner`. `wanted` names the statistics, which are zero until a gradient says otherwise."""

  def __init__(self, inner: Weight, wanted: tuple[str, ...]):
    self.inner = inner
    layout, shape = Layout.of(inner), jax.eval_shape(lambda weight: weight.materialize(), inner).shape
    at = len(shape) - len(inner.axes)
    self.size = math.prod(shape[at + inner.axes.index(letter)] for letter in inner.inputs)
    lead, sizes = shape[:at + len(layout.experts)], {name: shape_of(name, self.size) for name in wanted}
    # On a mesh experts' statistics lie where the experts do, those of others everywhere.
    self.statistics = nnx.Dict({name: Statistic(jnp.zeros((*lead, *size)), axes=layout.experts + '1' * len(size))
                                for name, size in sizes.items()})

  def contract(self, equation, x, dtype=None):
    """Products over other dims than the inputs, and dense ones of all experts, are not observed."""
    if equation.split(',')[0].endswith(self.inputs) and not self.axes.startswith('E'):
      x = tap(x.reshape(-1, self.size), self._values()).reshape(x.shape)
    return self.inner.contract(equation, x, dtype)

  def contract_grouped(self, x_MD, sizes_E):
    return self.inner.contract_grouped(tap_grouped(x_MD, self._values(), sizes_E), sizes_E)

  def _values(self): return {name: variable.get_value() for name, variable in self.statistics.items()}


@jax.custom_vjp
def tap(x_MK, statistics):
  """x; the gradient of each statistic is that of x's rows, whatever the loss makes of x."""
  return x_MK


def _tap_backward(saved, g_MK):
  x_MK, statistics = saved
  return g_MK, {name: _OF_ROWS[name](x_MK.astype(jnp.float32)) for name in statistics}


tap.defvjp(lambda x_MK, statistics: (x_MK, (x_MK, statistics)), _tap_backward)


@jax.custom_vjp
def tap_grouped(x_MK, statistics, sizes_E):
  """As `tap`, for rows sorted by expert, sizes_E of each: those past the sum count for none."""
  return x_MK


def _tap_grouped_backward(saved, g_MK):
  x_MK, statistics, sizes_E = saved
  x_MK = x_MK.astype(jnp.float32)
  mesh = jax.sharding.get_abstract_mesh()
  # Where 'tensor' cuts the hidden units, each device has some columns of the rows that all of them hold together.
  if 'tensor' in mesh.manual_axes and any(value.shape[-1] not in (1, x_MK.shape[1]) for value in statistics.values()):
    x_MK = lax.all_gather(x_MK, 'tensor', axis=1, tiled=True)
  found = {name: _once(name, _OF_GROUPS[name](x_MK, sizes_E), mesh) for name in statistics}
  return g_MK, found, None


tap_grouped.defvjp(lambda x_MK, statistics, sizes_E: (x_MK, (x_MK, statistics, sizes_E)), _tap_grouped_backward)


def _once(statistic: str, value, mesh):
  """A share that gives the whole when `shard_map` adds it up over the axes that do not cut experts."""
  repeated = tuple(name for name in mesh.manual_axes if name == 'tensor' or (statistic == 'peak' and name != 'expert'))
  if statistic == 'peak' and repeated: value = lax.pmax(value, repeated)
  return value / math.prod(mesh.shape[name] for name in repeated)


def _gram(x_MK):
  return jnp.matmul(x_MK.T, x_MK, precision='highest')


def _gram_of_groups(x_MK, sizes_E):
  """The gradient of the grouped product by its matrices, x being both what it multiplies and what comes back."""
  K = x_MK.shape[1]
  with jax.default_matmul_precision('highest'):
    _, pull = jax.vjp(lambda w_EKK: grouped_matmul(x_MK, w_EKK, sizes_E), jnp.zeros((sizes_E.shape[0], K, K)))
    return pull(x_MK)[0]


def _group_of(x_MK, sizes_E):
  """The group of each row, E past the last."""
  return jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(x_MK.shape[0]), side='right')


_OF_ROWS = {
  'gram': _gram,
  'magnitude': lambda x_MK: jnp.sum(jnp.abs(x_MK), 0),
  'peak': lambda x_MK: jnp.max(jnp.abs(x_MK), 0),
  'count': lambda x_MK: jnp.full(1, x_MK.shape[0], jnp.float32),
}
_OF_GROUPS = {
  'gram': _gram_of_groups,
  'magnitude': lambda x_MK, sizes_E: jax.ops.segment_sum(jnp.abs(x_MK), _group_of(x_MK, sizes_E), sizes_E.shape[0]),
  'peak': lambda x_MK, sizes_E: jnp.maximum(
    jax.ops.segment_max(jnp.abs(x_MK), _group_of(x_MK, sizes_E), sizes_E.shape[0]), 0),
  'count': lambda x_MK, sizes_E: sizes_E[:, None].astype(jnp.float32),
}
