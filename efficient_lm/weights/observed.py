"""Weights that are watched: `Observed` leaves the forward pass alone, and what autodiff calls the gradient of its statistics
is what it saw. So calibration is one `jax.grad`, through scans, experts and meshes alike; the backward pass proper is dead
code, which XLA drops.

Statistics of the rows x (M, I) that a weight multiplies, its inputs merged; float32, stacks of layers and experts in front:

  gram       (..., I, I)   x^T x
  magnitude  (..., I)      the sum of |x|
  square     (..., I)      the sum of x^2
  peak       (..., I)      the largest |x|
  histogram  (..., BINS)   how many |x| that are not zero fall into each bin (see `bin_edges`); not of experts
  count      (..., 1)      the number of rows that are not all zeros; of experts, of what each was sent

Rows of zeros add nothing to any of them: so does padding, whose hidden states calibration sets to zero.

All but `peak` add up, over batches and over devices.
"""
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from efficient_lm.ops.grouped_matmul import grouped_matmul
from efficient_lm.tree import rewrite
from efficient_lm.weights.layout import Layout, matrix_shape
from efficient_lm.weights.weight import Frozen, Weight, Wrapper

MANTISSA = 5   # bits of a float's mantissa by which bins are cut: a bin's edges differ by at most 1/32
BINS = 2 ** (8 + MANTISSA)


class Statistic(nnx.Variable):
  """Something observed."""


def shape_of(statistic: str, num_inputs: int) -> tuple[int, ...]:
  """Of a weight with so many inputs."""
  return {'gram': (num_inputs, num_inputs), 'histogram': (BINS,), 'count': (1,)}.get(statistic, (num_inputs,))


def joined(statistic: str, a, b):
  """Of two sets of rows, that of both."""
  return jnp.maximum(a, b) if statistic == 'peak' else a + b


class Observed(Wrapper):
  """Multiplies as `inner`. `wanted` names the statistics, which are zero until a gradient says otherwise. `real`: a bool for
  each row, False for those that are not to count (see `of_real`), or None."""
  real = None

  def __init__(self, inner: Weight, wanted: tuple[str, ...]):
    self.inner = inner
    layout, self.size = Layout.of(inner), matrix_shape(inner)[1]
    lead = inner.shape[:len(inner.stack) + len(layout.experts)]
    sizes = {name: shape_of(name, self.size) for name in wanted}
    # On a mesh experts' statistics lie where the experts do, those of others everywhere.
    self.statistics = nnx.Dict({name: Statistic(jnp.zeros((*lead, *size)), axes=layout.experts + '1' * len(size))
                                for name, size in sizes.items()})

  def contract(self, equation, x, dtype=None):
    """Products over other dims than the inputs, and dense ones of all experts, are not observed."""
    if equation.split(',')[0].endswith(self.inputs) and not self.axes.startswith('E'):
      real_M = None if self.real is None else self.real.get_value()
      x = tap(x.reshape(-1, self.size), self._values(), real_M).reshape(x.shape)
    return self.inner.contract(equation, x, dtype)

  def contract_grouped(self, x_MD, sizes_E):
    return self.inner.contract_grouped(tap_grouped(x_MD, self._values(), sizes_E), sizes_E)

  def _values(self): return {name: variable.get_value() for name, variable in self.statistics.items()}


def of_real(tree, real_BT):
  """A tree in which observed weights leave out rows of tokens that are not real. A layer with biases makes something of
  padding that is zero. (Experts are sent no padding.)"""
  def change(_, node):
    made = Observed(node.inner, tuple(node.statistics))
    made.statistics, made.real = node.statistics, Frozen(real_BT.reshape(-1))
    return made
  return rewrite(tree, Observed, change)


@jax.custom_vjp
def tap(x_MI, statistics, real_M=None):
  """x; the gradient of each statistic is that of x's rows, of those that are real, whatever the loss makes of x."""
  return x_MI


def _tap_backward(saved, g_MI):
  x_MI, statistics, real_M = saved
  x_MI = x_MI.astype(jnp.float32)
  if real_M is not None: x_MI = jnp.where(real_M[:, None], x_MI, 0)
  return g_MI, {name: _OF_ROWS[name](x_MI) for name in statistics}, None


tap.defvjp(lambda x_MI, statistics, real_M=None: (x_MI, (x_MI, statistics, real_M)), _tap_backward)


@jax.custom_vjp
def tap_grouped(x_MI, statistics, sizes_E):
  """As `tap`, for rows sorted by expert, sizes_E of each: those past the sum count for none."""
  return x_MI


def _tap_grouped_backward(saved, g_MI):
  x_MI, statistics, sizes_E = saved
  x_MI = x_MI.astype(jnp.float32)
  mesh = jax.sharding.get_abstract_mesh()
  # Where 'tensor' cuts the hidden units, each device has some columns of the rows that all of them hold together.
  if 'tensor' in mesh.manual_axes and any(value.shape[-1] not in (1, x_MI.shape[1]) for value in statistics.values()):
    x_MI = lax.all_gather(x_MI, 'tensor', axis=1, tiled=True)
  found = {name: _once(name, _OF_GROUPS[name](x_MI, sizes_E), mesh) for name in statistics}
  return g_MI, found, None


tap_grouped.defvjp(lambda x_MI, statistics, sizes_E: (x_MI, (x_MI, statistics, sizes_E)), _tap_grouped_backward)


def _once(statistic: str, value, mesh):
  """A share that gives the whole when `shard_map` adds it up over the axes that do not cut experts."""
  repeated = tuple(name for name in mesh.manual_axes if name == 'tensor' or (statistic == 'peak' and name != 'expert'))
  if statistic == 'peak' and repeated: value = lax.pmax(value, repeated)
  return value / math.prod(mesh.shape[name] for name in repeated)


def _gram(x_MI):
  return jnp.matmul(x_MI.T, x_MI, precision='highest')


def _gram_of_groups(x_MI, sizes_E):
  """The gradient of the grouped product by its matrices, x being both what it multiplies and what comes back."""
  empty_EII = jnp.zeros((sizes_E.shape[0], x_MI.shape[1], x_MI.shape[1]))
  with jax.default_matmul_precision('highest'):
    _, pull = jax.vjp(lambda w_EII: grouped_matmul(x_MI, w_EII, sizes_E), empty_EII)
    return pull(x_MI)[0]


def _group_of(x_MI, sizes_E):
  """The group of each row, E past the last."""
  return jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(x_MI.shape[0]), side='right')


def _bin_of(x):
  """The number of the bin of |x|: the first bits of a float32, which are ordered as the floats are."""
  return (lax.bitcast_convert_type(jnp.abs(x), jnp.uint32) >> (23 - MANTISSA)).astype(jnp.int32)


def bin_edges():
  """BINS lower edges of the bins of `histogram`, float32, ascending; the last ones are infinite or no numbers."""
  return lax.bitcast_convert_type(jnp.arange(BINS, dtype=jnp.uint32) << (23 - MANTISSA), jnp.float32)


def quantile(histogram_N, zeros, share: float):
  """The number that a share of all |x| is at most, of the histogram (..., BINS) and of how many are zero (...): the upper
  edge of the bin in which it lies, so that at least that share is at most it; 0 where so many are zero."""
  below_N = zeros[..., None] + jnp.cumsum(histogram_N, -1)
  found = jnp.sum(below_N < share * below_N[..., -1:], -1)
  upper = jnp.take(bin_edges(), jnp.minimum(found + 1, BINS - 1))
  return jnp.where(zeros >= share * below_N[..., -1], 0., upper)


def _histogram(x_MI):
  return jnp.zeros(BINS).at[_bin_of(x_MI).reshape(-1)].add((x_MI != 0).astype(jnp.float32).reshape(-1))


_OF_ROWS = {
  'gram': _gram,
  'magnitude': lambda x_MI: jnp.sum(jnp.abs(x_MI), 0),
  'square': lambda x_MI: jnp.sum(jnp.square(x_MI), 0),
  'peak': lambda x_MI: jnp.max(jnp.abs(x_MI), 0),
  'histogram': _histogram,
  'count': lambda x_MI: jnp.sum(jnp.any(x_MI != 0, -1), keepdims=True).astype(jnp.float32),
}
_OF_GROUPS = {
  'gram': _gram_of_groups,
  'magnitude': lambda x_MI, sizes_E: jax.ops.segment_sum(jnp.abs(x_MI), _group_of(x_MI, sizes_E), sizes_E.shape[0]),
  'square': lambda x_MI, sizes_E: jax.ops.segment_sum(jnp.square(x_MI), _group_of(x_MI, sizes_E), sizes_E.shape[0]),
  'peak': lambda x_MI, sizes_E: jnp.maximum(
    jax.ops.segment_max(jnp.abs(x_MI), _group_of(x_MI, sizes_E), sizes_E.shape[0]), 0),
  'count': lambda x_MI, sizes_E: sizes_E[:, None].astype(jnp.float32),
}
